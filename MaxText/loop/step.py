"""The train step with the teacher in it, and the evaluation step: pure functions of (state, teacher, batch).

The step is upstream's train step with another loss: what upstream's branches on, and this one does not carry, is
refused by name in config/checks.py. Sums and counts leave the loss; they are divided once, after the last reduction.
Left out on purpose: use_kd=false, which runs upstream's own step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import upstream
from MaxText.config.keys import Distillation
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens
from MaxText.distill.stored import StoredTeacher
from MaxText.distill.truncation import Scalar
from MaxText.loop import parts, schedules
from MaxText.models import frozen, heads, mtp, positions

Batch = dict[str, jax.Array]
Scalars = dict[str, jax.Array]
CHOSEN = "kd_chosen"  # of a microbatch's positions, those that are taught


@dataclasses.dataclass(frozen=True)
class Models:
    """What a step knows before it is traced: the two models' graphs and settings.

    Attributes:
      config: MaxText's configuration of the student and of the run.
      student: graph of MaxText's train state (model and optimizer).
      teacher_config: MaxText's configuration of the teacher; None without one.
      teacher: graph of the teacher; None where the batch holds what was stored of one.
      stored_temperature: of the weights in the batch; None where it holds none.
      kd: the distillation settings.
      mesh: the run's mesh.

    Both models end in hidden states (`heads.ends_in_hidden_states`): neither's logits [B, L, V] ever exist.
    """

    config: Any
    student: nnx.GraphDef
    teacher_config: Any
    teacher: nnx.GraphDef | None
    kd: Distillation
    mesh: jax.sharding.Mesh
    stored_temperature: float | None = None

    @functools.cached_property
    def schedules(self) -> schedules.Schedules:
        return schedules.build(self.kd, self.config)


def train_step(
    models: Models, params_shardings: nnx.State, state: nnx.State, teacher: nnx.State | None, batch: Batch
) -> tuple[nnx.State, dict[str, Any]]:
    """One update of the student.

    Returns:
      The new state, and {"scalar": metrics}: scalars named as in the metrics file.
    """
    config = models.config
    train_state = nnx.merge(models.student, state)
    before = jax.tree.map(lambda x: x, nnx.state(train_state.model, nnx.Param))
    alpha, temperature = models.schedules.at(train_state.optimizer.step[...])
    share = None
    if models.kd.chooses_positions and config.gradient_accumulation_steps > 1:
        chosen = chosen_of_all(models, train_state.model, batch)
        batch, share = batch | {CHOSEN: chosen.mask}, chosen.share

    def loss_fn(  # upstream's signature
        model: nnx.Module, config: Any, data: Batch, dropout_rng: Any, params: Any, is_train: bool = True
    ) -> tuple[jax.Array, dict[str, Any]]:
        frozen.hold(config, model)
        return distillation_loss(models, model, teacher, data, is_train, alpha, temperature, share)

    if config.gradient_accumulation_steps > 1:
        _, aux, raw_grads = upstream.gradient_accumulation.gradient_accumulation_loss_and_grad(
            loss_fn, config, train_state.model, None, params_shardings, batch, None
        )
    else:
        aux, raw_grads = loss_and_gradient(loss_fn, config, train_state.model, params_shardings, batch)
    raw_grads = jax.tree.map(lambda g: g.astype(config.grad_dtype) if g.dtype == jnp.float32 else g, raw_grads)
    grads = raw_grads
    if config.gradient_clipping_threshold > 0:
        grads = upstream.maxtext_utils.apply_gradient_clipping(raw_grads, None, config.gradient_clipping_threshold)

    metrics = training_metrics(models, aux["sums"])
    metrics |= {"learning/kd_alpha": alpha, "learning/kd_temperature": jnp.float32(temperature)}
    metrics["learning/grad_norm"] = upstream.max_utils.l2norm_pytree(grads)
    metrics["learning/raw_grad_norm"] = upstream.max_utils.l2norm_pytree(raw_grads)
    if config.skip_step_on_spikes:
        train_state.apply_gradients(grads, loss=metrics["learning/loss"], grad_norm=metrics["learning/grad_norm"])
        optimizer = nnx.to_pure_dict(nnx.state(train_state.optimizer))["opt_state"]
        if "is_skipped" in optimizer:  # it lies deeper where some parameters are frozen
            metrics["optim/step_skipped"] = optimizer["is_skipped"].astype(jnp.float32)
    else:
        train_state.apply_gradients(grads)
    if config.routed_bias and config.routed_bias_update_rate > 0:
        add_routed_bias_updates(train_state.model, aux["intermediate_outputs"], config)
    if config.use_qk_clip:
        reported = aux["intermediate_outputs"]
        train_state = upstream.qk_clip_utils.apply_qk_clip_nnx(train_state, reported, config)
        largest = upstream.qk_clip_utils.calculate_max_logit_metric(reported)
        if largest is not None:
            metrics["learning/max_logits"] = largest
    frozen.put_back(config, before, train_state.model)
    metrics["learning/param_norm"] = upstream.max_utils.l2norm_pytree(nnx.state(train_state.model, nnx.Param))
    output = {"scalar": metrics, "scalars": {}}
    if config.record_internal_nn_metrics:
        upstream.metric_logger.record_activation_metrics(output, aux["intermediate_outputs"], config)
    return nnx.state(train_state, nnx.Not(nnx.Intermediate)), output


def eval_step(models: Models, state: nnx.State, teacher: nnx.State | None, batch: Batch) -> dict[str, Scalars]:
    """Sums over one evaluation batch; metrics.py adds them up and divides by the token count of all batches.

    The temperature is that of the update which the evaluation follows.
    """
    train_state = nnx.merge(models.student, state)
    alpha, temperature = models.schedules.before(train_state.optimizer.step[...])
    _, aux = distillation_loss(models, train_state.model, teacher, batch, False, alpha, temperature)
    sums = aux["sums"]
    scalars = {f"evaluation/{name}": value for name, value in sums.items()}
    return {"scalar": scalars}


def distillation_loss(
    models: Models,
    model: nnx.Module,
    teacher: nnx.State | None,
    data: Batch,
    is_train: bool,
    alpha: jax.Array,
    temperature: Scalar,
    share: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """The objective of one (micro)batch and the sums it is made of.

    loss = ((1 - alpha) CE + alpha T^2 D + z-loss) / n + MoE load balancing + MTP, times n under gradient
    accumulation, where upstream divides by the token count of all microbatches.

    `share`: of the step's tokens those that `data` says are chosen; None: the choice is made here.

    Returns:
      The loss; and aux with "sums" (float32 scalars that may be added over microbatches), "intermediate_outputs" (what
      the student's layers reported), and the keys that upstream's gradient accumulation reads.
    """
    config, kd = models.config, models.kd
    rows = config.micro_batch_size_to_train_on if is_train else config.micro_batch_size_to_eval_on
    data = {key: value[:rows] for key, value in data.items()}  # per_device_batch_size < 1 loads more than it trains on
    dropout = config.enable_dropout and is_train
    with jax.named_scope(parts.STUDENT):
        reported = forward(model, config, data, dropout)
        learner = heads.Side(config, heads.head_of(model), heads.normed_hidden_states(model, reported, dropout))
    with jax.named_scope(parts.TEACHER):
        guide = teachers_side(models, teacher, data, is_train)
    tokens = Tokens(data["targets"], data["targets_segmentation"] != 0)
    weights = Weights(alpha, temperature, config.z_loss_multiplier)
    with jax.named_scope(parts.LOSS):
        chosen = None
        if kd.chooses_positions and is_train:
            chosen = chosen_here(models, learner, tokens.mask) if share is None else heads.Chosen(data[CHOSEN], share)
        objective, found = heads.kd_objective(
            models.mesh, kd, learner, guide, tokens, weights, evaluation=not is_train, chosen=chosen
        )
    n = found.n
    moe_lb_loss, mtp_loss = load_balancing_loss(config, reported), jnp.float32(0)
    sums: Scalars = {name: value for name, value in found._asdict().items() if value is not None}
    if config.mtp_num_layers > 0 and is_train:
        with jax.named_scope(parts.LOSS):
            mtp_loss, mtp_ce, mtp_kd = mtp.loss(models.mesh, kd, learner, guide, data, reported, temperature)
        if kd.kd_mtp_alpha > 0:
            sums |= {"mtp_ce_loss_sum": n * mtp_ce, "mtp_kd_loss_sum": n * mtp_kd}
    elif not is_train and config.mtp_eval_target_module > 0:
        accepted = mtp.acceptance(models.mesh, kd, learner, data, reported)
        sums |= {"mtp_accepted_sum": accepted.agreement_sum, "mtp_n": accepted.n}  # type: ignore[dict-item]
    objective = objective + n * (moe_lb_loss + mtp_loss)
    aux = {
        "sums": sums
        | {"objective": objective, "z_loss_sum": config.z_loss_multiplier * found.log_z_sq_sum}
        | {"moe_lb_loss_sum": n * moe_lb_loss, "mtp_loss_sum": n * mtp_loss},
        "intermediate_outputs": reported,
        "xent_sum": objective,
        "total_weights": n,
        "moe_lb_loss": moe_lb_loss,
        "mtp_loss": mtp_loss,
        "indexer_loss": 0.0,
    }
    summed = config.gradient_accumulation_steps > 1 and is_train
    return (objective if summed else objective / jnp.maximum(n, 1)), aux


def chosen_here(models: Models, learner: heads.Side, mask: jax.Array) -> heads.Chosen:
    """Where a batch that is the whole step's is taught."""
    kd = models.kd
    return positions.choose(positions.entropies(models.mesh, kd, learner, mask), mask, float(kd.kd_positions))


def chosen_of_all(models: Models, model: nnx.Module, batch: Batch) -> heads.Chosen:
    """Where a step's batch is taught, by a forward pass over each of its microbatches, without dropout.

    A row's microbatch is its number modulo theirs, as upstream has it.
    """
    config = models.config
    steps, rows = config.gradient_accumulation_steps, config.micro_batch_size_to_train_on
    graphdef, state = nnx.split(model)
    apart = {key: jnp.swapaxes(x.reshape(-1, steps, *x.shape[1:]), 0, 1) for key, x in batch.items()}
    mask = (apart["targets_segmentation"] != 0) & (jnp.arange(apart["targets"].shape[1]) < rows)[:, None]

    def of_microbatch(data: Batch) -> jax.Array:
        local = nnx.merge(graphdef, state, copy=True)
        data = {key: value[:rows] for key, value in data.items()}
        reported = forward(local, config, data, enable_dropout=False)
        learner = heads.Side(config, heads.head_of(local), heads.normed_hidden_states(local, reported, False))
        return positions.entropies(models.mesh, models.kd, learner, data["targets_segmentation"] != 0)

    found = jax.lax.map(of_microbatch, apart)
    found = jnp.pad(found, ((0, 0), (0, mask.shape[1] - rows), (0, 0)))
    found, mask = (jnp.swapaxes(x, 0, 1).reshape(batch["targets"].shape) for x in (found, mask))
    return positions.choose(found, mask, float(models.kd.kd_positions))


def teachers_side(models: Models, teacher: nnx.State | None, data: Batch, is_train: bool) -> heads.Side | StoredTeacher:
    """What the teacher says of a (micro)batch: by a forward pass, or what was stored of one."""
    if models.teacher is None:
        assert models.stored_temperature is not None
        return stored_teacher(models.kd, models.stored_temperature, data)
    model = nnx.merge(models.teacher, jax.lax.stop_gradient(teacher), copy=True)
    # Routes that the data forces are the student's.
    data = {key: value for key, value in data.items() if key != "forced_routed_experts"}
    config = models.teacher_config
    rules = config.logical_axis_rules if is_train else config.logical_axis_rules_for_eval
    with logical_axis_rules(rules):
        reported = forward(model, config, data, enable_dropout=False)
    hidden = heads.normed_hidden_states(model, reported, enable_dropout=False)
    return heads.Side(config, heads.head_of(model), hidden)


def stored_teacher(kd: Distillation, temperature: float, data: Batch) -> StoredTeacher:
    """What a batch of a cache's rows holds of the teacher at `temperature` (data/cached.py)."""
    return StoredTeacher(
        data["teacher_ids"],
        data["teacher_log_weights"],
        data.get("teacher_log_tail"),
        data["teacher_target_log_prob"],
        data["teacher_entropy"],
        temperature,
        kd.kd_vocab_size,
        is_asked_at_own=kd.kd_temperature == temperature,
    )


def forward(model: nnx.Module, config: Any, data: Batch, enable_dropout: bool) -> dict[str, Any]:
    """Runs a model and returns what its layers reported (upstream: intermediates), the last hidden states among it."""
    extra = {key: data[key] for key in ("forced_routed_experts",) if key in data}
    model(
        decoder_input_tokens=data["inputs"],
        decoder_positions=data["inputs_position"],
        decoder_segment_ids=data["inputs_segmentation"],
        enable_dropout=enable_dropout,
        decoder_target_tokens=data["targets"],
        decoder_target_mask=data["targets_segmentation"],
        **extra,
    )
    reported = nnx.pop(model, nnx.Intermediate).to_pure_dict()
    return upstream.moe.finalize_deferred_intermediates(reported, config)


def load_balancing_loss(config: Any, reported: dict[str, Any]) -> jax.Array:
    """MoE's, a mean over the batch with its weight in it, as upstream defines it; 0 for dense models."""
    layers = upstream.maxtext_utils.collect_intermediates_by_suffix(reported, "moe_lb_loss")
    if config.num_experts <= 1 or not layers:
        return jnp.float32(0)
    reduce = jnp.sum if upstream.moe.uses_megatron_seq_aux_loss(config) else jnp.mean
    return reduce(jnp.concatenate(layers)).astype(jnp.float32)


def loss_and_gradient(
    loss_fn: Callable[..., tuple[jax.Array, dict[str, Any]]],
    config: Any,
    model: nnx.Module,
    params_shardings: nnx.State,
    batch: Batch,
) -> tuple[dict[str, Any], nnx.State]:
    """One forward and backward pass; the model's other variables (random streams, statistics) advance in place."""
    nnx.pop(model, nnx.Intermediate)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    if config.shard_optimizer_over_data:  # ZeRO-1: stored over data, gathered here once for both passes
        params = jax.tree.map(
            lambda x, s: upstream.sharding.maybe_shard_with_name(x, s, shard_mode=config.shard_mode),
            params,
            params_shardings,
        )
        nnx.update(model, params)

    def loss_of(params: nnx.State, rest: nnx.State) -> tuple[jax.Array, tuple[dict[str, Any], nnx.State]]:
        local = nnx.merge(graphdef, params, rest, copy=True)
        loss, aux = loss_fn(local, config, batch, None, None)
        return loss, (aux, nnx.state(local, nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate))))

    (_, (aux, advanced)), grads = jax.value_and_grad(loss_of, has_aux=True)(params, rest)
    nnx.update(model, advanced)
    return aux, grads


def add_routed_bias_updates(model: nnx.Module, reported: dict[str, Any], config: Any) -> None:
    """Moves each router's bias by what its layer reported (auxiliary-loss-free balancing, arXiv:2408.15664).

    Under gradient accumulation layers report tokens per expert, here added up over microbatches, not updates. Scanned
    layers report [layers, experts]. Biases that are parameters are stacked along `param_scan_axis`; those that MaxText
    keeps apart (MoEBiasVar), along the first.
    """
    for path, update in jax.tree_util.tree_leaves_with_path(reported):
        names = [part.key for part in path if hasattr(part, "key")]
        if "moe_bias_updates" not in names:
            continue
        update = jnp.asarray(update)
        if jnp.issubdtype(update.dtype, jnp.integer):
            rate = config.routed_bias_update_rate
            update = upstream.moe.load_balance_updates_from_counts(update, config.num_experts, rate)
        layer = model
        for name in names[: names.index("moe_bias_updates")]:
            layer = layer[name] if isinstance(layer, (nnx.List, nnx.Dict)) else getattr(layer, str(name))
        for _, node in nnx.iter_graph(layer):
            if type(node).__name__ == "GateLogit" and node.bias is not None:
                is_stacked_parameter = update.ndim == 2 and isinstance(node.bias, nnx.Param)
                moved = jnp.moveaxis(update, 0, config.param_scan_axis) if is_stacked_parameter else update
                node.bias.set_value(node.bias.get_value() + moved)


def training_metrics(models: Models, sums: Scalars) -> Scalars:
    """Scalars of one step from its sums, each divided once by the token count of the whole step."""
    n = jnp.maximum(sums["n"], 1)
    ce = sums["ce_sum"] / n
    lm_loss = ce + sums["z_loss_sum"] / n  # as upstream means it: with the z-loss
    distilled_mtp = ("mtp_ce_loss", "mtp_kd_loss") if models.kd.kd_mtp_alpha > 0 else ()
    kept = {"learning/kd_kept_mass": sums["kept_mass_sum"] / n} if "kept_mass_sum" in sums else {}  # not of draws
    return {
        "learning/loss": sums["objective"] / n,
        "learning/ce_loss": ce,
        "learning/lm_loss": lm_loss,
        "learning/perplexity": jnp.exp(lm_loss),
        "learning/kd_loss": sums["kd_sum"] / n,
        "learning/teacher_ce_loss": sums["teacher_ce_sum"] / n,
        "learning/z_loss": sums["z_loss_sum"] / n,
        "learning/moe_lb_loss": sums["moe_lb_loss_sum"] / n,
        "learning/mtp_loss": sums["mtp_loss_sum"] / n,
        "learning/total_weights": sums["n"],
        **kept,
        **{f"learning/{name}": sums[f"{name}_sum"] / n for name in distilled_mtp},
    }
