"""What a train step is made of, as a compiled one names it: the teacher, the student's two passes, the loss, the rest.

The step puts its scopes around what it calls; transformations of jax's write themselves around them.
"""

import re
from typing import Any

from MaxText import upstream
from MaxText.config.keys import Distillation

STUDENT, TEACHER, LOSS = "student", "teacher", "loss"  # scopes
FORWARD, BACKWARD, REST = "student forward", "backward", "optimizer"


def part_of(place: str) -> str:
    """The part that an operation belongs to, by its place in the program; "" without one.

    What stands in no scope is taken for the update, with clipping, norms and metrics; of the engine's own step, which
    has no scopes, the loss is among the student's passes.
    """
    within = re.split(r"[/()]", place)
    if not place:
        return ""
    for scope in (TEACHER, LOSS):
        if scope in within:
            return scope
    if "transpose" in within:
        return BACKWARD
    return FORWARD if STUDENT in within or "jvp" in within else REST


def flops(config: Any, teacher_config: Any | None, kd: Distillation) -> dict[str, float]:
    """Part -> FLOPs per device and step that the models' shapes ask for, as MaxText counts them. Recomputation is not
    in it. The heads are the loss's, but in the engine's own step, where they are among the passes.

    Args:
      config: of the student and the run.
      teacher_config: None where no teacher runs in the step.
      kd: whether it distils.
    """
    student = 1e12 * upstream.tflops_per_step(config, None)
    if not kd.distils:
        return {FORWARD: student / 3, BACKWARD: student * 2 / 3, REST: 0.0}
    head, teacher_head, teacher = head_flops(config), 0.0, {}
    if teacher_config is not None:
        teacher_head = head_flops(teacher_config)
        teacher = {TEACHER: 1e12 * upstream.tflops_per_step(config, teacher_config) - student - teacher_head}
    return teacher | {
        FORWARD: student / 3 - head,
        LOSS: 3 * head + teacher_head,
        BACKWARD: student * 2 / 3 - 2 * head,
        REST: 0.0,
    }


def head_flops(config: Any) -> float:
    """Of one projection of all tokens of a device's step."""
    tokens = config.per_device_batch_size * config.max_target_length * config.gradient_accumulation_steps
    return 2 * tokens * config.emb_dim * config.vocab_size
