"""Is the teacher one? Its cross-entropy on one batch, before the student learns anything from it.

A wrong tokenizer, path or preset leaves shapes that fit and a teacher that knows nothing: its cross-entropy is near
log(vocabulary), where that of any trained model, and even of the bare frequencies of tokens, is far below.
"""

import math
from typing import Any

import jax
from flax.core.spmd import logical_axis_rules

from MaxText.config.keys import ConfigError, Distillation
from MaxText.console import say
from MaxText.loop import failures

# A teacher must undercut the uniform distribution by this share of its cross-entropy not to be warned of. A model that
# knows no more than how often each token occurs does so several times over; one on foreign tokens is above uniform.
MARGIN = 0.05


def check(config: Any, kd: Distillation, ce: float | None, teacher_ce: float, where: str) -> None:
    """Says what the teacher is worth, in nats per token.

    Args:
      config: MaxText's configuration of the student.
      kd: the distillation settings.
      ce: the student's cross-entropy on a batch; None where there is no student.
      teacher_ce: the teacher's.
      where: which batch.

    Raises:
      ConfigError: the teacher's cross-entropy is not finite, or above kd_teacher_max_ce.
    """
    tokens = kd.kd_vocab_size or config.vocab_size
    uniform = math.log(tokens)
    key = "kd_teacher_parameters_path" if kd.has_teacher else "kd_cache_path"
    path = f"{key}={getattr(kd, key)!r}"
    students = "" if ce is None else f", the student {ce:.4f}"
    if not math.isfinite(teacher_ce):
        lacks = f", or has tokens that it lacks (kd_vocab_size={kd.kd_vocab_size})" if kd.kd_vocab_size else ""
        raise ConfigError(f"{path}: its cross-entropy on {where} is {teacher_ce}: the teacher is broken{lacks}")
    if 0 < kd.kd_teacher_max_ce < teacher_ce:
        raise ConfigError(
            f"kd_teacher_max_ce={kd.kd_teacher_max_ce:g}: the teacher's cross-entropy on {where} is {teacher_ce:.4f} "
            f"(guessing among {tokens} tokens has {uniform:.4f}{students}). {path}"
        )
    say(f" teacher  ce {teacher_ce:.4f} on {where}; guessing has {uniform:.4f}{students}")
    if teacher_ce > (1 - MARGIN) * uniform:
        say(
            f"warning: THE TEACHER IS NO BETTER THAN GUESSING: its cross-entropy is {teacher_ce:.4f}, "
            f"log({tokens}) is {uniform:.4f}. Wrong tokenizer, path or preset?"
        )


def check_on_evaluation(config: Any, kd: Distillation, student: Any, steps: Any) -> bool:
    """`check` on the first evaluation batch, by the compiled evaluation step.

    Returns:
      Whether it was possible: not without evaluation data, nor where the iterator cannot be set back to its beginning.
    """
    iterator = student.eval_data_iterator
    if steps.evaluate is None or not hasattr(iterator, "reset"):
        return False
    batch = next(failures.batches(config, iter(iterator)), None)
    if batch is None:
        return False
    batch = jax.device_put(batch, steps.eval_data_sharding)
    with jax.set_mesh(student.mesh), logical_axis_rules(config.logical_axis_rules_for_eval):
        sums = steps.evaluate(student.state, batch)["scalar"]
    n = float(sums["evaluation/n"])
    if n == 0:
        return False
    ce, teacher_ce = (float(sums[f"evaluation/{name}"]) / n for name in ("ce_sum", "teacher_ce_sum"))
    check(config, kd, ce, teacher_ce, "the first evaluation batch")
    return True


def check_on_first_step(config: Any, kd: Distillation, scalars: dict[str, Any]) -> None:
    """`check` on the first training batch, from the metrics of its step: of the student as it was before the step."""
    if float(scalars["learning/total_weights"]):
        ce, teacher_ce = float(scalars["learning/ce_loss"]), float(scalars["learning/teacher_ce_loss"])
        check(config, kd, ce, teacher_ce, "the first training batch")
