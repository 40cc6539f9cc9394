"""Laws of the schedules of kd_alpha and kd_temperature: their values, what shares them, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMOKE

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.loop import schedules

KD = ["use_kd=true", "kd_teacher_parameters_path=anywhere"]
WSD = ["lr_schedule_type=wsd", "warmup_steps_fraction=0.2", "wsd_decay_steps_fraction=0.4"]


def course(*arguments, steps=11, over=None):
    """alpha and T at each step."""
    run = resolve.initialize(["train.py", SMOKE, "run_name=test", *KD, f"steps={steps}", *arguments])
    built = schedules.build(run.kd, run.student)
    values = [tuple(map(float, built.at(jnp.uint32(step)))) for step in range(over or steps)]
    return np.array(values).T


@pytest.mark.parametrize("quantity", ["kd_alpha", "kd_temperature"])
@pytest.mark.parametrize("form", ["linear", "cosine"])
@pytest.mark.parametrize(("first", "last"), [(0.9, 0.1), (0.25, 0.75)])
def test_linear_and_cosine_lead_from_the_value_to_the_end_and_hold_it(quantity, form, first, last):
    keys = [f"{quantity}={first}", f"{quantity}_schedule={form}", f"{quantity}_end={last}"]
    values = course(*keys, over=14)[int(quantity == "kd_temperature")]
    way = np.minimum(np.arange(14) / 10, 1)
    way = way if form == "linear" else (1 - np.cos(np.pi * way)) / 2
    np.testing.assert_allclose(values, first + (last - first) * way, rtol=1e-6)
    np.testing.assert_array_equal(values[[10, 13]], np.float32([last, last]))  # optax rounds the start


def test_constant_is_the_value_throughout_and_a_cosine_may_rise_from_zero():
    alpha, temperature = course("kd_alpha=0", "kd_alpha_schedule=cosine", "kd_alpha_end=1", "kd_temperature=3")
    assert (alpha[0], alpha[-1]) == (0, 1) and np.all(np.diff(alpha) > 0)
    assert set(temperature) == {3}


def test_a_schedule_of_one_step_is_the_value():
    assert course("kd_alpha=0.25", "kd_alpha_schedule=linear", "kd_alpha_end=1", steps=1)[0].tolist() == [0.25]


def test_wsd_moves_in_the_learning_rates_phases_alone():
    keys = ["kd_alpha=0.5", "kd_alpha_schedule=wsd", "kd_alpha_start=0.1", "kd_alpha_end=0"]
    alpha, _ = course(*keys, *WSD, steps=10, over=12)
    np.testing.assert_allclose(alpha, [0.1, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 1 / 3, 1 / 6, 0, 0, 0], atol=1e-7)
    held, _ = course(*keys[:2], keys[3], *WSD, steps=10)
    np.testing.assert_allclose(held, np.where(np.arange(10) < 2, 0.5, alpha[:10]), atol=1e-7)


@pytest.mark.e2e
@pytest.mark.parametrize("steps", [10, 37, 200])
def test_wsd_between_the_learning_rates_values_is_the_learning_rate(steps):
    keys = ["kd_alpha=0.5", "kd_alpha_schedule=wsd", "kd_alpha_start=0", "kd_alpha_end=0.1", *WSD, f"steps={steps}"]
    learning_rate = ["learning_rate=0.5", "learning_rate_final_fraction=0.2", "wsd_decay_style=linear"]
    run = resolve.initialize(["train.py", SMOKE, "run_name=test", *KD, *keys, *learning_rate])
    upstreams = upstream.maxtext_utils.create_learning_rate_schedule(run.student)
    built = schedules.build(run.kd, run.student)
    expected = [float(upstreams(step)) for step in range(steps)]
    np.testing.assert_allclose([float(built.alpha(jnp.int32(step))) for step in range(steps)], expected, atol=1e-6)


def test_an_evaluation_takes_the_values_of_the_step_it_follows():
    run = resolve.initialize(["train.py", SMOKE, "run_name=x", *KD, "kd_alpha_schedule=linear", "kd_alpha_end=0"])
    built = schedules.build(run.kd, run.student)
    for step in range(6):
        assert built.before(jnp.uint32(step + 1)) == built.at(jnp.uint32(step))
    assert built.before(jnp.uint32(0)) == built.at(jnp.uint32(0))


def test_only_a_constant_zero_leaves_the_teacher_out():
    def in_step(*keys):
        return resolve.initialize(["train.py", SMOKE, "run_name=x", *KD, *keys]).kd.teacher_in_step

    assert not in_step("kd_alpha=0")
    assert not in_step("kd_alpha=0", "kd_temperature_schedule=linear", "kd_temperature_end=2")
    assert in_step("kd_alpha=0", "kd_alpha_schedule=linear", "kd_alpha_end=0.5")
    assert in_step("kd_alpha=0", "kd_alpha_schedule=wsd", "kd_alpha_start=0.5", *WSD, "steps=10")


# In a run -------------------------------------------------------------------------------------------------------------

MOVING = dict(
    use_kd="true",
    kd_alpha=0.9,
    kd_alpha_schedule="linear",
    kd_alpha_end=0,
    kd_temperature=4,
    kd_temperature_schedule="cosine",
    kd_temperature_end=1,
)


@pytest.fixture(scope="module")
def moving(train, teacher):
    keys = dict(kd_teacher_parameters_path=teacher, eval_interval=2, eval_steps=1, checkpoint_period=2)
    return train("moving", **MOVING, **keys, z_loss_multiplier=1e-4)


@pytest.mark.e2e
def test_every_row_blends_its_terms_by_its_own_alpha_down_to_zero(moving):
    rows = moving.rows()
    np.testing.assert_allclose([row["learning/kd_alpha"] for row in rows], np.linspace(0.9, 0, 6), atol=1e-6)
    temperature = 1 + 3 * (1 + np.cos(np.pi * np.arange(6) / 5)) / 2
    np.testing.assert_allclose([row["learning/kd_temperature"] for row in rows], temperature, rtol=1e-6)
    for row in rows:
        alpha, ce, kd = (row[f"learning/{name}"] for name in ("kd_alpha", "ce_loss", "kd_loss"))
        assert row["learning/loss"] == pytest.approx((1 - alpha) * ce + alpha * kd + row["learning/z_loss"], rel=1e-5)
        assert kd > 0  # where alpha is 0, too
    assert "(1 - a) CE + a T^2 KL" in moving.output
    assert "a = 0.9 to 0 (linear), T = 4 to 1 (cosine)" in moving.output


@pytest.mark.slow
@pytest.mark.e2e
def test_a_resumed_run_has_the_schedule_of_the_uninterrupted_one(moving, train, teacher):
    keys = dict(kd_teacher_parameters_path=teacher, eval_interval=2, eval_steps=1, checkpoint_period=2)
    keys |= dict(MOVING, z_loss_multiplier=1e-4, learning_rate_schedule_steps=6)
    train("moving_broken", **keys, steps=4)
    again = train("moving_broken", **keys)
    assert "(resumed)" in again.output
    for name in ("kd_alpha", "kd_temperature"):
        assert again.column(f"learning/{name}") == moving.column(f"learning/{name}")
    np.testing.assert_allclose(again.column("learning/loss"), moving.column("learning/loss"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.e2e
def test_microbatches_see_one_value(train, teacher, moving):
    keys = dict(kd_teacher_parameters_path=teacher, z_loss_multiplier=1e-4)
    parts = train("moving_parts", **MOVING, **keys, gradient_accumulation_steps=2, per_device_batch_size=2)
    for name in ("kd_alpha", "kd_temperature"):
        assert parts.column(f"learning/{name}") == moving.column(f"learning/{name}")
    np.testing.assert_allclose(parts.column("learning/loss"), moving.column("learning/loss"), rtol=1e-4)


# name -> (arguments, what the message must hold)
CASES = {
    "end of a constant": (["kd_alpha_end=0.1"], ["kd_alpha_end=0.1", "kd_alpha_schedule=constant", "linear or cosine"]),
    "start of a line": (
        ["kd_temperature_schedule=linear", "kd_temperature_start=2", "kd_temperature_end=1"],
        ["kd_temperature_start=2", "kd_temperature_schedule=linear", "wsd"],
    ),
    "line without an end": (["kd_alpha_schedule=linear"], ["kd_alpha_schedule=linear", "needs kd_alpha_end"]),
    "wsd that goes nowhere": (["kd_alpha_schedule=wsd"], ["needs kd_alpha_start or kd_alpha_end"]),
    "unknown form": (["kd_alpha_schedule=exp"], ["kd_alpha_schedule='exp'", "constant", "linear", "cosine", "wsd"]),
    "alpha's end above 1": (["kd_alpha_schedule=linear", "kd_alpha_end=1.5"], ["kd_alpha_end=1.5", "equal to 1"]),
    "temperature's end 0": (
        ["kd_temperature_schedule=cosine", "kd_temperature_end=0"],
        ["kd_temperature_end=0", "greater than 0"],
    ),
    "a word for an end": (["kd_alpha_schedule=linear", "kd_alpha_end=low"], ["kd_alpha_end='low'", "number"]),
    "true for an end": (["kd_alpha_schedule=linear", "kd_alpha_end=true"], ["kd_alpha_end=True", "number"]),
    "wsd beside a cosine": (
        ["kd_alpha_schedule=wsd", "kd_alpha_end=0"],
        ["kd_alpha_schedule=wsd", "lr_schedule_type=cosine", "no such phases"],
    ),
    "wsd without a warm-up": (
        [*WSD[::2], "warmup_steps_fraction=0", "kd_alpha_schedule=wsd", "kd_alpha_start=0"],
        ["kd_alpha_start=0", "warmup_steps_fraction=0", "no step"],
    ),
    "wsd without a decay": (
        [*WSD[:2], "wsd_decay_steps_fraction=0.1", "kd_temperature_schedule=wsd", "kd_temperature_end=2"],
        ["kd_temperature_end=2", "wsd_decay_steps_fraction=0.1", "no step out of 6"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_without_meaning_ends_with_a_message(case):
    arguments, parts = CASES[case]
    with pytest.raises(ConfigError) as refused:
        resolve.initialize(["train.py", SMOKE, *KD, *arguments])
    assert all(part in str(refused.value) for part in parts), refused.value


def test_a_temperature_that_stays_is_a_number_and_no_array():
    """The compiler's then, who takes half of the exponentials where it is 1."""
    run = resolve.initialize(["train.py", SMOKE, "run_name=test", *KD, "kd_temperature=2"])
    assert schedules.build(run.kd, run.student).at(jnp.uint32(3))[1] == 2.0
    assert isinstance(schedules.build(run.kd, run.student).at(jnp.uint32(3))[1], float)
