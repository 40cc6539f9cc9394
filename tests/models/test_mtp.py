"""Laws of multi-token prediction under distillation: its heads go through the blockwise loss and lose nothing by it."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import lab as lab_lib
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import upstream
from MaxText.distill.kd_loss import cross_entropy, divergence, kl_divergence
from MaxText.distill.terms.jensen_shannon import JensenShannon
from MaxText.loop import step
from MaxText.models import heads

pytestmark = pytest.mark.e2e

DEPTHS = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3}
TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def make(tmp_path_factory, teacher):
    """make(key=value, ...): a student with MTP heads at two depths, and its teacher."""

    def made(**keys):
        keys = {"kd_temperature": TEMPERATURE, "eval_interval": 3, "eval_steps": 1} | DEPTHS | keys
        return lab_lib.make(tmp_path_factory.mktemp("mtp"), teacher, **keys)

    return made


def packed_batch(lab):
    """Rows of two documents and padding, each with its boundaries elsewhere."""
    config = lab.run.student
    batch = lab_lib.padded_batch(config.micro_batch_size_to_train_on, config.max_target_length, config.vocab_size)
    second = np.arange(config.max_target_length) >= np.array([[5], [9], [14], [20]])
    for name in ("inputs_segmentation", "targets_segmentation"):
        batch[name] = jnp.where(batch[name] > 0, batch[name] + second, 0)
    return batch


def mtp_loss(lab, batch):
    """(mtp_loss, the sums) of our loss, and the gradient of mtp_loss."""
    return lab.sums_and_gradient(batch, of=lambda loss, aux: aux["mtp_loss"])


def engines(lab, batch, result, transform=jax.value_and_grad):
    """result(what the engine's own model reports), and its gradient."""
    graphdef, params, rest = nnx.split(nnx.merge(lab.student.graphdef, lab.student.state).model, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits = model(
            batch["inputs"],
            batch["inputs_position"],
            batch["inputs_segmentation"],
            enable_dropout=False,
            decoder_target_tokens=batch["targets"],
            decoder_target_mask=batch["targets_segmentation"],
        )
        reported = {"logits": logits}
        for kind in (upstream.multi_token_prediction.mtp_losses, upstream.multi_token_prediction.mtp_acceptance):
            reported[kind.__name__] = nnx.pop(model, kind).to_pure_dict()
        return result(reported, lab.run.student)

    return lab.under(transform(loss), params)


def assert_same_gradient(got, expected):
    got, expected = (dict(nnx.to_flat_state(gradient)) for gradient in (got, expected))
    assert got.keys() == expected.keys()
    assert any("mtp_block" in path and np.any(leaf.get_value()) for path, leaf in expected.items())
    for path, leaf in expected.items():
        np.testing.assert_allclose(got[path].get_value(), leaf.get_value(), atol=1e-6, rtol=1e-4, err_msg=str(path))


def test_without_a_teacher_the_loss_is_the_engines_own(make):
    lab = make()
    batch = packed_batch(lab)
    (loss, sums), gradient = mtp_loss(lab, batch)
    expected, expected_gradient = engines(lab, batch, upstream.multi_token_prediction.calculate_mtp_loss)
    assert float(expected) > 0
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums["mtp_loss_sum"] / sums["n"], expected, rtol=1e-5)
    assert_same_gradient(gradient, expected_gradient)


@pytest.mark.parametrize("depth", (2, pytest.param(1, marks=pytest.mark.slow)))
def test_the_acceptance_rate_is_the_engines_own(make, depth):
    # The learning rate's first steps leave a student that agrees with itself here and there.
    lab = make(mtp_eval_target_module=depth)
    batch = packed_batch(lab)
    scalars = lab.under(
        lambda *arguments: step.eval_step(lab.models, *arguments), lab.student.state, lab.teacher.state, batch
    )["scalar"]
    rate = upstream.multi_token_prediction.calculate_mtp_acceptance_rate
    expected = engines(lab, batch, rate, transform=lambda rate: rate)
    got = 100 * scalars["evaluation/mtp_accepted_sum"] / scalars["evaluation/mtp_n"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def dense_mtp_loss(lab, batch, alpha, take, **settings):
    """The loss by its definition, from dense logits and by shifts along plain rows."""
    models = lab.models
    config, teacher_config = models.config, models.teacher_config
    graphdef, params, rest = nnx.split(nnx.merge(models.student, lab.student.state).model, nnx.Param, ...)

    def ahead(x, k):
        if k == 0:
            return x
        return jnp.concatenate([x[:, k:], jnp.zeros_like(x[:, :k])], axis=1)

    def loss(params, teacher):
        model = nnx.merge(graphdef, params, rest, copy=True)
        reported = step.forward(model, config, batch, False)
        knowing = nnx.merge(models.teacher, teacher, copy=True)
        known = heads.normed_hidden_states(knowing, step.forward(knowing, teacher_config, batch, False), False)
        logits = heads.project(*heads.head_of(knowing), known)
        segment, ce, kl, n = batch["inputs_segmentation"], 0.0, 0.0, 0
        for k, hidden in enumerate(reported["decoder"][heads.MTP_HIDDEN_STATES], start=1):
            drafted = heads.project(*heads.head_of(model), hidden)
            # MaxText asks for the last of the k steps alone to be within one document.
            is_step = ahead(segment, k) == ahead(segment, k - 1)
            valid = is_step & (ahead(segment, k - 1) > 0) & (ahead(batch["targets_segmentation"], k) > 0)
            found = take(drafted, ahead(logits, k), temperature=TEMPERATURE, **settings)
            kl += TEMPERATURE**2 * jnp.sum(jnp.where(valid, found, 0.0))
            ce += jnp.sum(jnp.where(valid, cross_entropy(drafted, ahead(batch["targets"], k)), 0.0))
            n += valid.sum()
        return config.mtp_loss_scaling_factor * ((1 - alpha) * ce + alpha * kl) / n, (ce / n, kl / n)

    return lab.under(jax.value_and_grad(loss, has_aux=True), params, lab.teacher.state)


@pytest.mark.parametrize("name", ("forward_kl", pytest.param("jsd", marks=pytest.mark.slow)))
def test_the_heads_learn_the_teachers_next_token_where_their_predictions_lie(make, name):
    lab = make(kd_mtp_alpha=0.4, kd_top_k=8, kd_truncation_strategy="other_bucket", kd_divergence=name)
    batch = packed_batch(lab)
    (loss, sums), gradient = mtp_loss(lab, batch)
    settings = {"top_k": 8, "truncation_strategy": "other_bucket"}
    take = kl_divergence if name == "forward_kl" else functools.partial(divergence, term=JensenShannon(0.5))
    (expected, (ce, kl)), expected_gradient = dense_mtp_loss(lab, batch, 0.4, take, **settings)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums["mtp_ce_loss_sum"] / sums["n"], ce, rtol=1e-5)
    np.testing.assert_allclose(sums["mtp_kd_loss_sum"] / sums["n"], kl, rtol=1e-5)
    assert_same_gradient(gradient, expected_gradient)
    logged = step.training_metrics(lab.models, sums)
    for name, value in (("loss", expected), ("ce_loss", ce), ("kd_loss", kl)):
        assert float(logged[f"learning/mtp_{name}"]) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", (0.4, 0.0))
def test_no_logits_of_an_mtp_head_exist(make, alpha):
    lab = make(kd_mtp_alpha=alpha, per_device_batch_size=32, kd_block_mib=1)
    config, whole = lab.run.student, lab_lib.padded_batch(rows=32)
    run = functools.partial(step.train_step, lab.models, lab.student.params_shardings)
    with jax.set_mesh(lab.student.mesh), logical_axis_rules(config.logical_axis_rules):
        program = jax.jit(run).lower(lab.student.state, lab.teacher.state, whole).compile()
    shapes = [
        [int(size) for size in dims.split(",")] for dims in re.findall(r"[a-z]\d+\[([\d,]+)\]", program.as_text())
    ]
    assert max(math.prod(shape) for shape in shapes if config.vocab_size in shape) < 32 * 32 * config.vocab_size


@pytest.mark.slow
def test_distilled_heads_log_both_parts_of_their_loss(make):
    lab = make(kd_mtp_alpha=0.4, gradient_accumulation_steps=2)
    run = functools.partial(step.train_step, lab.models, lab.student.params_shardings)
    _, output = lab.under(run, lab.student.state, lab.teacher.state, lab_lib.padded_batch(rows=8))
    parts = {name: float(output["scalar"][f"learning/mtp_{name}"]) for name in ("loss", "ce_loss", "kd_loss")}
    assert parts["kd_loss"] > 0
    assert parts["loss"] == pytest.approx(0.3 * (0.6 * parts["ce_loss"] + 0.4 * parts["kd_loss"]), rel=1e-5)
