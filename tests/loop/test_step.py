"""Laws of the step, seen from inside: what is differentiated, what is masked, what stays as it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lab as lab_lib
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText.distill.kd_loss import kd_sums
from MaxText.distill.terms.named import term_named
from MaxText.loop import step

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def lab(tmp_path_factory, teacher):
    return lab_lib.make(
        tmp_path_factory.mktemp("lab"), teacher, kd_alpha=0.7, kd_temperature=2, gradient_clipping_threshold=0
    )


def loss_and_gradient(lab, batch, **kd):
    """Metrics and raw gradient of one step."""
    with jax.set_mesh(lab.student.mesh), logical_axis_rules(lab.run.student.logical_axis_rules):
        return jitted(lab, **kd)(lab.student.state, lab.teacher.state, batch)


@functools.cache
def jitted(lab, **kd):
    models = dataclasses.replace(lab.models, kd=lab.run.kd.model_copy(update=kd))
    config = models.config

    def run(state, teacher, batch):
        model = nnx.merge(models.student, state).model

        def loss_fn(model, config, data, dropout_rng, params, is_train=True):
            return step.distillation_loss(models, model, teacher, data, is_train, *models.schedules.at(0))

        if config.gradient_accumulation_steps > 1:
            accumulate = step.upstream.gradient_accumulation.gradient_accumulation_loss_and_grad
            _, aux, grads = accumulate(loss_fn, config, model, None, lab.student.params_shardings, batch, None)
        else:
            aux, grads = step.loss_and_gradient(loss_fn, config, model, lab.student.params_shardings, batch)
        return step.training_metrics(models, aux["sums"]), grads

    return jax.jit(run)


def metrics_of(lab, batch, **kd):
    """Metrics of one step that is not differentiated."""
    models = dataclasses.replace(lab.models, kd=lab.run.kd.model_copy(update=kd))

    def run(state, teacher, batch):
        model = nnx.merge(models.student, state).model
        _, aux = step.distillation_loss(models, model, teacher, batch, True, *models.schedules.at(0))
        return step.training_metrics(models, aux["sums"])

    return lab.under(run, lab.student.state, lab.teacher.state, batch)


@pytest.fixture(scope="module")
def steps(lab):
    return lab.steps()


def logits_of(model, config, batch):
    """Dense logits through upstream's own output head."""
    (hidden,) = step.forward(model, config, batch, enable_dropout=False)["decoder"]["hidden_states"]
    return model.logits_from_hidden_states_for_vocab_tiling(hidden, True, "train")


def test_the_gradient_is_that_of_the_blend_over_valid_positions(lab):
    batch = lab_lib.padded_batch()
    models, alpha, temperature = lab.models, 0.7, 2.0
    mask = batch["targets_segmentation"] != 0

    def plain(params, rest, teacher):  # the definition, without anything of ours
        model = nnx.merge(graphdef, params, rest, copy=True)
        student = logits_of(model, models.config, batch)
        target = logits_of(nnx.merge(models.teacher, teacher, copy=True), models.teacher_config, batch)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(student), batch["targets"][..., None], -1)[..., 0]
        p, q = jax.nn.log_softmax(target / temperature), jax.nn.log_softmax(student / temperature)
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return jnp.sum(((1 - alpha) * ce + alpha * temperature**2 * kl) * mask) / jnp.sum(mask)

    model = nnx.merge(models.student, lab.student.state).model
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    with jax.set_mesh(lab.student.mesh), logical_axis_rules(models.config.logical_axis_rules):
        loss, expected = jax.jit(jax.value_and_grad(plain))(params, rest, lab.teacher.state)
    metrics, grads = loss_and_gradient(lab, batch)
    assert float(metrics["learning/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["learning/total_weights"]) == float(jnp.sum(mask))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), expected, grads)


def test_a_student_equal_to_its_teacher_has_the_kd_that_its_strategy_defines(tmp_path, teacher):
    same = lab_lib.make(tmp_path, teacher, load_parameters_path=f"{teacher}/5/items")
    batch, temperature = lab_lib.padded_batch(), 2.0

    def dense(teacher):
        return logits_of(nnx.merge(same.models.teacher, teacher, copy=True), same.models.teacher_config, batch)

    logits = np.asarray(same.under(dense, same.teacher.state), np.float64)
    p = np.exp(logits / temperature)
    kept = np.sort(p / p.sum(-1, keepdims=True), axis=-1)[..., -8:].sum(-1)
    valid = np.asarray(batch["targets_segmentation"]) != 0
    expected = {
        "renormalize": 0.0,
        "other_bucket": 0.0,
        "renormalize_teacher": -(temperature**2) * np.log(kept)[valid].mean(),
    }
    for strategy, kd in expected.items():
        settings = {"kd_temperature": temperature, "kd_top_k": 8, "kd_truncation_strategy": strategy}
        metrics = metrics_of(same, batch, **settings)
        assert float(metrics["learning/kd_loss"]) == pytest.approx(kd, abs=1e-5)
        assert float(metrics["learning/kd_kept_mass"]) == pytest.approx(kept[valid].mean(), rel=1e-5)


@pytest.mark.parametrize("name", ("jsd", pytest.param("skew_kl", marks=pytest.mark.slow)))
def test_each_divergence_is_that_of_the_dense_logits(lab, name):
    batch, settings = lab_lib.padded_batch(), {"top_k": 8, "truncation_strategy": "other_bucket"}
    models, term = lab.models, term_named(name, jsd_beta=0.1, skew=0.2)

    def dense(state, teacher):
        student = logits_of(nnx.merge(models.student, state).model, models.config, batch)
        target = logits_of(nnx.merge(models.teacher, teacher, copy=True), models.teacher_config, batch)
        mask = batch["targets_segmentation"] != 0
        return kd_sums(student, target, batch["targets"], mask, temperature=2.0, term=term, **settings)

    sums = lab.under(dense, lab.student.state, lab.teacher.state)
    kd = {"kd_divergence": name, "kd_jsd_beta": 0.1, "kd_skew": 0.2} | {f"kd_{key}": settings[key] for key in settings}
    assert float(metrics_of(lab, batch, **kd)["learning/kd_loss"]) == pytest.approx(
        float(sums.kd_sum / sums.n), rel=1e-5
    )


def test_what_stands_at_padding_changes_nothing(lab):
    batch = lab_lib.padded_batch()
    valid = batch["targets_segmentation"] != 0
    other = batch | {"targets": jnp.where(valid, batch["targets"], 1)}
    first, second = loss_and_gradient(lab, batch), loss_and_gradient(lab, other)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_batch_of_padding_alone_has_loss_and_gradient_zero(lab):
    batch = lab_lib.padded_batch()
    nothing = {key: jnp.zeros_like(value) if "segmentation" in key else value for key, value in batch.items()}
    metrics, grads = loss_and_gradient(lab, nothing)
    assert float(metrics["learning/loss"]) == 0
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))


def test_no_gradient_reaches_the_teacher_whatever_the_loss_makes_of_it(lab, monkeypatch):
    batch, models = lab_lib.padded_batch(), lab.models
    params, rest = lab.teacher.state.split(nnx.Param, ...)

    def loss(params):
        model = nnx.merge(models.student, lab.student.state).model
        merged = nnx.State.merge(params, rest)
        return step.distillation_loss(models, model, merged, batch, True, *models.schedules.at(0))[0]

    blockwise = step.heads.kd_objective

    def with_a_term_of_the_teacher(mesh, kd, student, teacher, *batch, **settings):
        objective, sums = blockwise(mesh, kd, student, teacher, *batch, **settings)
        return objective + jnp.sum(teacher.hidden) + sum(map(jnp.sum, jax.tree.leaves(teacher.head.arrays))), sums

    monkeypatch.setattr(step.heads, "kd_objective", with_a_term_of_the_teacher)
    gradient = jax.tree.leaves(lab.under(jax.grad(loss), params))
    assert gradient and all(not np.any(np.asarray(leaf)) for leaf in gradient)


def test_training_leaves_the_teacher_unchanged_and_compiles_nothing_more(lab, steps):
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(nnx.filter_state(lab.teacher.state, nnx.Param))]
    state = jax.tree.map(jnp.copy, lab.student.state)
    batch = lab.student.data_loader.load_next_batch()
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _seconds, **_more: compilations.append(name) if "backend_compile" in name else None
    )
    jax.jit(lambda x: x + 17)(1)
    assert compilations, "the listener hears no compilation"
    compilations.clear()
    for _ in range(3):
        with jax.set_mesh(lab.student.mesh), logical_axis_rules(lab.run.student.logical_axis_rules):
            state, metrics = steps.train(state, batch)
    assert float(metrics["scalar"]["learning/kd_loss"]) > 0
    jax.monitoring.clear_event_listeners()
    assert compilations == []
    after = jax.tree.leaves(nnx.filter_state(lab.teacher.state, nnx.Param))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_step_returns_the_students_parameters_and_two_moments_of_each_and_nothing_more(lab, steps):
    batch = lab.student.data_loader.load_next_batch()
    with jax.set_mesh(lab.student.mesh), logical_axis_rules(lab.run.student.logical_axis_rules):
        state, _ = steps.train(jax.tree.map(jnp.copy, lab.student.state), batch)
    returned = nnx.merge(lab.student.graphdef, state)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(returned.model, nnx.Param)))
    moments = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(returned.optimizer)) if leaf.size > 1)
    assert moments == 2 * parameters  # Adam's
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1) == 3 * parameters + random_streams(state)


def random_streams(state):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.RngState)) if leaf.size > 1)


def test_the_teacher_runs_without_dropout(tmp_path, teacher, lab):
    dropping = lab_lib.make(tmp_path, teacher, enable_dropout="true", dropout_rate=0.5)
    batch = lab_lib.padded_batch()
    metrics, calm = metrics_of(dropping, batch), metrics_of(lab, batch)
    assert float(metrics["learning/teacher_ce_loss"]) == float(calm["learning/teacher_ce_loss"])
    assert float(metrics["learning/ce_loss"]) != float(calm["learning/ce_loss"])


def test_microbatches_add_up_to_the_whole_batch(tmp_path, teacher, lab):
    accumulating = lab_lib.make(
        tmp_path,
        teacher,
        kd_alpha=0.7,
        kd_temperature=2,
        gradient_clipping_threshold=0,
        gradient_accumulation_steps=2,
        per_device_batch_size=2,
    )
    batch = lab_lib.padded_batch()
    whole, summed = loss_and_gradient(lab, batch), loss_and_gradient(accumulating, batch)
    for name, value in whole[0].items():
        assert float(summed[0][name]) == pytest.approx(float(value), rel=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole[1], summed[1])
