"""Laws of gradient accumulation: one step on a batch, in however many microbatches, for every kind of model.

Under plain gradient descent at rate 1 what a parameter moves by is its gradient: the laws are about the whole step.
"""

import functools

import conftest
import jax
import jax.numpy as jnp
import lab as lab_lib
import numpy as np
import pytest
from flax import nnx

from MaxText.loop import step

pytestmark = pytest.mark.e2e

DESCENT = {"opt_type": "sgd", "learning_rate": 1, "warmup_steps_fraction": 0, "gradient_clipping_threshold": 0}
MATRICES = {key: conftest.EXPERTS[key] for key in ("sparse_matmul", "megablox")}
EXPERTS = conftest.EXPERTS | {"load_balance_loss_weight": 0.1}
DENSE_TEACHER = {"kd_teacher_model_name": "tiny-llama"}
MTP = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}


@pytest.fixture(scope="module")
def make(tmp_path_factory, teacher):
    """make(microbatches, key=value, ...): a run on a global batch of eight rows."""

    def made(microbatches=1, checkpoint=teacher, **keys):
        keys = DESCENT | {"kd_alpha": 0.7, "kd_temperature": 2, "eval_interval": 3, "eval_steps": 1} | keys
        keys |= {"gradient_accumulation_steps": microbatches, "per_device_batch_size": 8 // microbatches}
        return lab_lib.make(tmp_path_factory.mktemp("accumulation"), checkpoint, **keys)

    return made


@pytest.fixture(scope="module")
def expert_teacher(experts):
    return str(experts.folder / "checkpoints")


def update(lab, batch):
    """Metrics of one step, and what it moved every variable of the model by."""
    run = functools.partial(step.train_step, lab.models, lab.student.params_shardings)
    after, output = lab.under(run, lab.student.state, lab.teacher.state, batch)
    return output["scalar"], moved(lab.student.state, after)


def moved(before, after):
    """Of every variable of the model but its random streams: path -> by what it moved."""
    flat = [dict(nnx.to_flat_state(nnx.filter_state(s["model"], nnx.Not(nnx.RngState)))) for s in (before, after)]
    return {path: np.asarray(new.get_value()) - np.asarray(flat[0][path].get_value()) for path, new in flat[1].items()}


def logged_loss_and_its_gradient(lab, batch):
    """The loss as it is logged, differentiated: a sum over microbatches, divided once, in a plain loop."""
    models, count = lab.models, lab.run.student.gradient_accumulation_steps
    graphdef, params, rest = nnx.split(nnx.merge(models.student, lab.student.state).model, nnx.Param, ...)

    def logged(params, teacher):
        totals = {}
        for index in range(count):
            data = {key: value[index::count] for key, value in batch.items()}
            model = nnx.merge(graphdef, params, rest, copy=True)
            _, aux = step.distillation_loss(models, model, teacher, data, True, *models.schedules.at(0))
            totals = {name: value + totals.get(name, 0) for name, value in aux["sums"].items()}
        return step.training_metrics(models, totals)["learning/loss"]

    return lab.under(jax.value_and_grad(logged), params, lab.teacher.state)


def assert_logged_is_optimised(lab, batch):
    """The logged parts add up to the logged loss, and parameters move by its gradient."""
    metrics, change = update(lab, batch)
    parts = 0.3 * metrics["learning/ce_loss"] + 0.7 * metrics["learning/kd_loss"] + metrics["learning/z_loss"]
    parts += metrics["learning/moe_lb_loss"] + metrics["learning/mtp_loss"]
    assert float(metrics["learning/loss"]) == pytest.approx(float(parts), rel=1e-4)
    loss, gradient = logged_loss_and_its_gradient(lab, batch)
    assert float(metrics["learning/loss"]) == pytest.approx(float(loss), rel=1e-5)
    leaves = dict(nnx.to_flat_state(gradient))
    assert leaves
    for path, leaf in leaves.items():
        np.testing.assert_allclose(-change[path], leaf.get_value(), atol=1e-5, rtol=1e-4, err_msg=str(path))
    return metrics, change


def assert_same_step(one, other):
    for name, value in one[0].items():
        assert float(other[0][name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert one[1].keys() == other[1].keys()
    for path, change in one[1].items():
        np.testing.assert_allclose(other[1][path], change, atol=1e-5, err_msg=str(path))


# Dense ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("microbatches", "divergence"), [(4, "forward_kl"), (2, "jsd")])
def test_a_step_does_not_depend_on_the_number_of_microbatches(make, microbatches, divergence):
    batch, keys = lab_lib.padded_batch(rows=8), {"z_loss_multiplier": 1e-2, "kd_divergence": divergence}
    whole, parts = update(make(**keys), batch), update(make(microbatches, **keys), batch)
    assert float(whole[0]["learning/z_loss"]) > 0
    assert_same_step(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["experts", "mtp", "experts and distilled mtp"])
def test_microbatches_of_equally_many_tokens_add_up_for_every_kind_of_model(make, kind):
    keys = EXPERTS | DENSE_TEACHER if "experts" in kind else {}
    keys = keys | MTP if "mtp" in kind else keys
    keys = keys | {"kd_mtp_alpha": 0.5} if "distilled" in kind else keys
    batch = lab_lib.padded_batch(rows=8)
    batch |= {name: jnp.ones_like(batch[name]) for name in ("inputs_segmentation", "targets_segmentation")}
    whole = update(make(**keys), batch)
    assert float(whole[0]["learning/moe_lb_loss"] + whole[0]["learning/mtp_loss"]) > 0
    assert_same_step(whole, update(make(2, **keys), batch))


# Mixtures of experts --------------------------------------------------------------------------------------------------


def test_what_a_mixture_logs_is_what_it_optimises(make):
    lab = make(2, **EXPERTS | DENSE_TEACHER)
    metrics, change = assert_logged_is_optimised(lab, lab_lib.padded_batch(rows=8))
    assert float(metrics["learning/moe_lb_loss"]) > 0
    biases = [change[path] for path in change if path[-1] == "bias"]
    assert biases and all(np.any(bias) for bias in biases)


@pytest.mark.slow
def test_the_routers_of_a_dense_students_teacher_add_nothing(make, expert_teacher):
    def sums(lab):
        def run(state, teacher):
            model = nnx.merge(lab.models.student, state).model
            batch = lab_lib.padded_batch(rows=8)
            loss, aux = step.distillation_loss(lab.models, model, teacher, batch, True, *lab.models.schedules.at(0))
            return aux["sums"] | {"loss": loss}

        return lab.under(run, lab.student.state, lab.teacher.state)

    keys = MATRICES | {"kd_teacher_model_name": "deepseek3-mini"}
    loud = "{load_balance_loss_weight: 5.0, routed_bias_update_rate: 5.0}"
    balanced = make(1, expert_teacher, **keys, kd_teacher_overrides=loud)
    assert balanced.models.teacher_config.load_balance_loss_weight == 5
    first = sums(make(1, expert_teacher, **keys))
    assert float(first["moe_lb_loss_sum"]) == 0 and float(first["kd_sum"]) > 0
    jax.tree.map(np.testing.assert_array_equal, first, sums(balanced))


ROUTING = {
    "every token to its experts, by sparse products": {"sparse_matmul": "true", "megablox": "false"},
    "as many tokens to an expert as it has room for": MATRICES | {"capacity_factor": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTING)
def test_what_a_mixture_logs_is_what_it_optimises_however_it_routes(make, routing):
    lab = make(2, **EXPERTS | DENSE_TEACHER | ROUTING[routing])
    metrics, _ = assert_logged_is_optimised(lab, lab_lib.padded_batch(rows=8))
    assert float(metrics["learning/moe_lb_loss"]) > 0


@pytest.mark.slow
def test_a_mixture_learns_from_a_mixture(make, expert_teacher):
    metrics, _ = assert_logged_is_optimised(make(2, expert_teacher, **EXPERTS), lab_lib.padded_batch(rows=8))
    assert float(metrics["learning/moe_lb_loss"]) > 0 and float(metrics["learning/kd_loss"]) > 0


# Multi-token prediction -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_student_with_mtp_logs_is_what_it_optimises(make):
    metrics, _ = assert_logged_is_optimised(make(2, **MTP), lab_lib.padded_batch(rows=8))
    assert float(metrics["learning/mtp_loss"]) > 0


@pytest.mark.slow
def test_a_teachers_mtp_heads_are_left_in_its_checkpoint(make, train):
    checkpoint = str(train("mtp_teacher", init_weights_seed=7, **MTP).folder / "checkpoints")
    lab = make(2, checkpoint)
    assert not any("mtp_block" in path for path, _ in nnx.to_flat_state(lab.teacher.state))
    assert_logged_is_optimised(lab, lab_lib.padded_batch(rows=8))


@pytest.mark.slow
def test_the_acceptance_rate_of_an_mtp_head_is_logged(train, teacher):
    keys = {"use_kd": "true", "kd_teacher_parameters_path": teacher, "eval_interval": 3, "eval_steps": 1}
    result = train("mtp_student", **keys, **MTP, mtp_eval_target_module=1, kd_mtp_alpha=0.5)
    rates = result.column("eval/avg_mtp_acceptance_rate_percent")
    assert len(rates) == 3 and all(0 <= rate <= 100 for rate in rates)
    assert "mtp acceptance" in result.output
    for row in result.rows():
        mtp = 0.5 * row["learning/mtp_ce_loss"] + 0.5 * row["learning/mtp_kd_loss"]
        assert row["learning/mtp_loss"] == pytest.approx(0.3 * mtp, rel=1e-5)
