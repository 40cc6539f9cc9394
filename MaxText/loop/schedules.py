"""Weight and temperature of the distillation term as functions of the optimizer's step.

The step is that of the train state, so a restart goes on where the run stood, and all microbatches of an update see one
value. The clock is the learning rate's, `learning_rate_schedule_steps` (by default: steps): its last step is where
every form has reached its end, and after it the end is held. A run of fewer steps is the beginning of that longer one.
Left out on purpose: forms that depend on what the training measures.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from MaxText import upstream
from MaxText.config.keys import Distillation
from MaxText.distill.truncation import Scalar

Schedule = Callable[[Int[Array, ""]], Any]


@dataclasses.dataclass(frozen=True)
class Schedules:
    """What `at` evaluates: (step -> value), once each for kd_alpha and kd_temperature."""

    alpha: Schedule
    temperature: Schedule

    def at(self, step: Int[Array, ""]) -> tuple[Float[Array, ""], Scalar]:
        """alpha and T of the optimizer's step, which counts from 0; float32.

        A constant T is a number, which the loss makes use of.
        """
        step = jnp.asarray(step, jnp.int32)  # upstream's counter is unsigned: differences of steps would wrap
        temperature = self.temperature(step)
        if not isinstance(temperature, float):
            temperature = jnp.asarray(temperature, jnp.float32)
        return jnp.asarray(self.alpha(step), jnp.float32), temperature

    def before(self, step: Int[Array, ""]) -> tuple[Float[Array, ""], Scalar]:
        """Those of the update that led to a state of this step; of step 0 where none has been made."""
        return self.at(jnp.maximum(jnp.asarray(step, jnp.int32) - 1, 0))


def build(kd: Distillation, config: Any) -> Schedules:
    """Chooses the forms.

    Args:
      kd: the distillation settings, checked by config/checks.py.
      config: MaxText's configuration of the student, for the learning rate's phases.
    """
    return Schedules(
        _FORMS[kd.kd_alpha_schedule](kd.kd_alpha_start, kd.kd_alpha, kd.kd_alpha_end, config),
        _FORMS[kd.kd_temperature_schedule](kd.kd_temperature_start, kd.kd_temperature, kd.kd_temperature_end, config),
    )


def _constant(start: None, value: float, end: None, config: Any) -> Schedule:
    return optax.constant_schedule(value)


def _linear(start: None, value: float, end: float, config: Any) -> Schedule:
    return optax.linear_schedule(value, end, max(config.learning_rate_schedule_steps - 1, 1))


def _cosine(start: None, value: float, end: float, config: Any) -> Schedule:
    # optax's form falls to a fraction of where it begins, and so cannot rise from 0: taken as the share of the way.
    left = optax.cosine_decay_schedule(1.0, max(config.learning_rate_schedule_steps - 1, 1))
    return lambda step: end + (value - end) * left(step)


def _wsd(start: float | None, value: float, end: float | None, config: Any) -> Schedule:
    """Warm-up, stable phase and decay of the learning rate's own wsd schedule, at its boundaries.

    Source: Peng et al., "Pre-training Distillation for Large Language Models: A Design Space Exploration" (2024),
    arXiv:2410.16215, which schedules the weight of the loss so.
    """
    phases = upstream.wsd_phases(config)
    pieces, boundaries = [optax.constant_schedule(value)], []
    if start is not None:
        pieces.insert(0, optax.linear_schedule(start, value, phases.warmup))
        boundaries.append(phases.warmup)
    if end is not None:
        # As the learning rate: the last step of the decay has reached its end. A decay of one step is the end alone.
        steps = phases.decay - 1
        pieces.append(optax.linear_schedule(value, end, steps) if steps else optax.constant_schedule(end))
        boundaries.append(phases.warmup + phases.stable)
    return optax.join_schedules(pieces, boundaries)


_FORMS: dict[str, Callable[[Any, float, Any, Any], Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}
