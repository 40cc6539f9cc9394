"""Is the teacher one, and the student's beginning sane? Their cross-entropy on one batch, before the student learns.

A wrong tokenizer, path or preset leaves shapes that fit and a teacher that knows nothing: its cross-entropy is near
log(vocabulary), where that of any trained model, and even of the bare frequencies of tokens, is far below.
A student that knows nothing is near log(vocabulary), too; one far above it spends its first steps on unlearning.
"""

import math
from typing import Any

import jax
from flax.core.spmd import logical_axis_rules

from MaxText.config.keys import ConfigError, Distillation
from MaxText.console import say
from MaxText.loop import failures
from MaxText.models import fresh

# A teacher must undercut the uniform distribution by this share of its cross-entropy not to be warned of. A model that
# knows no more than how often each token occurs does so several times over; one on foreign tokens is above uniform.
MARGIN = 0.05
# A student is warned of above this multiple of the uniform distribution's cross-entropy. A fresh one whose logits have
# a deviation of 1 exceeds that by half a nat, so it is far below for any vocabulary of use.
SANE_START = 1.5


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


def check_student(config: Any, origin: str, ce: float, where: str) -> None:
    """Warns of a student that begins far above guessing, with what may be the reason.

    Args:
      config: MaxText's configuration of the student.
      origin: the setting by which it was restored, "" for a fresh one.
      ce: its cross-entropy on a batch, in nats per token.
      where: which batch.
    """
    uniform = math.log(config.vocab_size)
    if ce > SANE_START * uniform:
        say(
            f"warning: THE STUDENT BEGINS FAR ABOVE GUESSING: its cross-entropy on {where} is {ce:.4f}, "
            f"log({config.vocab_size}) is {uniform:.4f}. {reason(config, origin)}"
        )


def reason(config: Any, origin: str) -> str:
    if origin:
        return f"It was restored ({origin}): wrong tokenizer, path or preset, or has it diverged?"
    if config.logits_via_embedding:
        normalised = "" if fresh.is_tied_unnormalised(config) else " and normalised"
        return (
            f"It is fresh, with a head tied{normalised} to an embedding table of standard deviation "
            f"{fresh.table_std(config):g}; kd_embedding_std={config.emb_dim**-0.5:.2g} (1/sqrt(width)) begins near it"
        )
    return "It is fresh, with a head of its own, which MaxText draws so that it begins near: what was set of its model?"


def check_on_evaluation(config: Any, kd: Distillation, student: Any, steps: Any) -> bool:
    """Both checks on the first evaluation batch, by the compiled evaluation step.

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
    check_student(config, student.origin, ce, "the first evaluation batch")
    return True


def check_on_first_step(config: Any, kd: Distillation, origin: str, scalars: dict[str, Any]) -> None:
    """Both checks on the first training batch, from the metrics of its step: of the student as it was before the step.

    Upstream's step has no cross-entropy without the z-loss, which is small.
    """
    if not float(scalars["learning/total_weights"]):
        return
    ce = float(scalars["learning/ce_loss" if kd.distils else "learning/lm_loss"])
    if kd.distils:
        check(config, kd, ce, float(scalars["learning/teacher_ce_loss"]), "the first training batch")
    check_student(config, origin, ce, "the first training batch")
