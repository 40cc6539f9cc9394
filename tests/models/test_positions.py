"""Laws of the positions that are taught: which they are, the loss, and that the teacher is read nowhere else."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import lab as lab_lib
import numpy as np
import pytest
from flax import nnx

from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens
from MaxText.loop import step
from MaxText.models import heads, positions

pytestmark = pytest.mark.e2e

SHARE, ALPHA, TEMPERATURE, Z_WEIGHT = 0.3, 0.7, 2.0, 0.01
DESCENT = {"opt_type": "sgd", "learning_rate": 1, "warmup_steps_fraction": 0, "gradient_clipping_threshold": 0}
BLEND = {"kd_alpha": ALPHA, "kd_temperature": TEMPERATURE, "z_loss_multiplier": Z_WEIGHT}


@pytest.fixture(scope="module")
def make(tmp_path_factory, teacher):
    """make(key=value, ...): a run on a global batch of eight rows, whose student has been moved away from its start."""

    def made(microbatches=1, **keys):
        keys = DESCENT | BLEND | {"gradient_accumulation_steps": microbatches} | keys
        keys |= {"per_device_batch_size": 8 // microbatches}
        lab = lab_lib.make(tmp_path_factory.mktemp("positions"), teacher, **keys)
        return dataclasses.replace(lab, student=dataclasses.replace(lab.student, state=noisy(lab.student.state)))

    return made


def noisy(state):
    """A fresh student is equally unsure everywhere."""
    random = np.random.default_rng(0)

    def moved(leaf):
        noise = (0.1 * random.normal(size=leaf.shape)).astype(leaf.dtype)
        return jax.device_put(np.asarray(leaf) + noise, leaf.sharding)

    params = jax.tree.map(moved, nnx.filter_state(state, nnx.Param))
    return nnx.merge_state(state, params)


@pytest.fixture(scope="module")
def lab(make):
    return make(kd_positions=SHARE)


@pytest.fixture(scope="module")
def everywhere(make):
    return make()


@pytest.fixture(scope="module")
def batch():
    return lab_lib.padded_batch(rows=8)


def update(lab, batch):
    """Metrics of one step, and what it moved the parameters by."""
    run = functools.partial(step.train_step, lab.models, lab.student.params_shardings)
    after, output = lab.under(run, lab.student.state, lab.teacher.state, batch)
    params = [nnx.filter_state(each["model"], nnx.Param) for each in (after, lab.student.state)]
    return output["scalar"], jax.tree.map(np.subtract, *jax.device_get(params))


def test_chosen_are_the_most_unsure_of_the_valid_positions_and_of_equals_the_first():
    entropies = jnp.array([[3.0, 9.0, 1.0, 2.0], [2.0, 0.0, 2.0, 8.0]])
    mask = jnp.array([[True, False, True, True], [True, True, True, False]])
    for share, expected in ((0.1, [0]), (0.5, [0, 3, 4]), (0.6, [0, 3, 4, 6]), (0.99, [0, 2, 3, 4, 5, 6])):
        found = positions.choose(entropies, mask, share)
        assert np.flatnonzero(found.mask).tolist() == expected
        assert float(found.share) == pytest.approx(len(expected) / 6)
    nothing = positions.choose(entropies, jnp.zeros_like(mask), 0.5)
    assert not nothing.mask.any() and float(nothing.share) > 0


def test_the_step_is_that_of_the_definition(lab, batch):
    """Cross-entropy in the mean over all positions, the KL in the mean over the share that is least sure."""
    models = lab.models
    mask = np.asarray(batch["targets_segmentation"]) != 0
    n = mask.sum()
    model = nnx.merge(models.student, lab.student.state).model
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logits_of(model, config):
        (hidden,) = step.forward(model, config, batch, enable_dropout=False)["decoder"]["hidden_states"]
        return model.logits_from_hidden_states_for_vocab_tiling(hidden, True, "train")

    def student_logits(params):
        return logits_of(nnx.merge(graphdef, params, rest, copy=True), models.config)

    q = np.asarray(lab.under(lambda params: jax.nn.log_softmax(student_logits(params)), params), np.float64)
    entropies = np.where(mask, -(np.exp(q) * q).sum(-1), -np.inf)
    number = round(SHARE * n)
    taught = np.zeros(mask.size, bool)
    taught[np.argsort(-entropies, axis=None, kind="stable")[:number]] = True
    taught = taught.reshape(mask.shape)
    assert np.ptp(entropies[mask]) > 0.1 and 0 < number < n

    def plain(params, teacher):
        student = student_logits(params)
        target = logits_of(nnx.merge(models.teacher, teacher, copy=True), models.teacher_config)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(student), batch["targets"][..., None], -1)[..., 0]
        ce += Z_WEIGHT * jax.nn.logsumexp(student, axis=-1) ** 2
        p, q = jax.nn.log_softmax(target / TEMPERATURE), jax.nn.log_softmax(student / TEMPERATURE)
        kl = TEMPERATURE**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        ce_mean, kl_mean = jnp.sum(ce * mask) / n, jnp.sum(kl * taught) / number
        z = Z_WEIGHT * jnp.sum(jax.nn.logsumexp(student, axis=-1) ** 2 * mask) / n
        of_teacher = -jnp.take_along_axis(jax.nn.log_softmax(target), batch["targets"][..., None], -1)[..., 0]
        teacher_ce = jnp.sum(of_teacher * taught) / number
        return (1 - ALPHA) * (ce_mean - z) + z + ALPHA * kl_mean, (kl_mean, teacher_ce)

    (loss, (kl, teacher_ce)), gradient = lab.under(jax.value_and_grad(plain, has_aux=True), params, lab.teacher.state)
    metrics, change = update(lab, batch)
    assert float(metrics["learning/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["learning/kd_loss"]) == pytest.approx(float(kl), rel=1e-5)
    assert float(metrics["learning/total_weights"]) == n
    assert float(metrics["learning/kd_kept_mass"]) == pytest.approx(1)
    assert float(metrics["learning/teacher_ce_loss"]) == pytest.approx(float(teacher_ce), rel=1e-5)
    jax.tree.map(lambda g, d: np.testing.assert_allclose(-d, g, atol=2e-6, rtol=1e-4), gradient, change)


def test_the_share_is_of_the_whole_step_however_many_its_microbatches(make, lab, batch):
    whole, parts = update(lab, batch), update(make(4, kd_positions=SHARE), batch)
    assert whole[0].keys() == parts[0].keys()
    for name, value in whole[0].items():
        assert float(parts[0][name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), whole[1], parts[1])


def test_elsewhere_the_teacher_is_not_read(lab, batch):
    models, random = lab.models, np.random.default_rng(0)
    model = nnx.merge(models.student, lab.student.state).model
    width = models.teacher_config.emb_dim
    of_teacher = jnp.asarray(random.normal(size=(8, 32, width)), jnp.float32)
    mask = batch["targets_segmentation"] != 0
    tokens, weights = Tokens(batch["targets"], mask), Weights(jnp.float32(ALPHA), TEMPERATURE)

    def objective(hidden):
        own = jnp.asarray(np.random.default_rng(1).normal(size=(8, 32, models.config.emb_dim)), jnp.float32)
        learner = heads.Side(models.config, heads.head_of(model), own)
        chosen = positions.choose(positions.entropies(models.mesh, models.kd, learner, mask), mask, SHARE)
        teacher = nnx.merge(models.teacher, lab.teacher.state, copy=True)
        guide = heads.Side(models.teacher_config, heads.head_of(teacher), hidden)
        return chosen.mask, heads.kd_objective(
            models.mesh, models.kd, learner, guide, tokens, weights, evaluation=False, chosen=chosen
        )

    taught, expected = lab.under(objective, of_teacher)
    _, found = lab.under(objective, jnp.where(taught[..., None], of_teacher, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    _, unlike = lab.under(objective, of_teacher.at[np.nonzero(np.asarray(taught))[0][0]].set(jnp.nan))
    assert not np.isfinite(unlike[0])


def program(lab, step, *bound, batch):
    return lab.lowered(functools.partial(step, lab.models, *bound), lab.student.state, lab.teacher.state, batch)


def test_evaluations_see_all_positions(lab, everywhere, batch):
    one, other = (program(each, step.eval_step, batch=batch) for each in (lab, everywhere))
    assert one == other


def test_without_a_share_no_entropies_are_taken(lab, everywhere, batch):
    with mock.patch.object(positions, "entropies", side_effect=AssertionError):
        assert program(everywhere, step.train_step, everywhere.student.params_shardings, batch=batch)
        with pytest.raises(AssertionError):
            program(lab, step.train_step, lab.student.params_shardings, batch=batch)
