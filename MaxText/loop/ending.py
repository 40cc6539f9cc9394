"""What a run says when its training data ends before its schedule does."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def data_has_ended(
    config: Any, schedule: Callable[[int], Any], start: int, done: int, tokens: float, last: Mapping[str, Any] | None
) -> list[str]:
    """The end of the data in words, and a warning where the learning rate had still some way to go.

    Args:
      config: MaxText's configuration of the student.
      schedule: step -> learning rate.
      start: the first step of this process.
      done: the last step that was made.
      tokens: that counted in these steps.
      last: the batch of the last step, in which rows may be missing; None if no step was made.
    """
    steps = done + 1 - start
    rows = steps * config.global_batch_size_to_train_on
    if last is not None and jax.process_count() == 1:
        rows -= int((np.asarray(last["inputs_segmentation"]) == 0).all(axis=1).sum())
    counted = [f"{steps} steps"] if config.enable_rampup_batch_size else [f"{steps} steps", f"{rows:,} rows"]
    read = ", ".join([*counted, f"{tokens:,.0f} tokens read"])
    epochs = f"{config.num_epoch} epoch{'s' * (config.num_epoch != 1)} (num_epoch)"
    since = f" since step {start}" if start else ""
    what = f"{read}{since}, {epochs} in all"
    lines = [f"training stopped: the training data has ended before step {done + 1} of {config.steps}: {what}"]
    final = config.learning_rate_schedule_steps - 1
    now, end = float(schedule(max(done, 0))), float(schedule(final))
    if done < final and not math.isclose(now, end, rel_tol=1e-3):
        lines.append(
            f"warning: the learning rate has not reached its end: {now:.2e} at step {done}, planned was {end:.2e} at "
            f"step {final}. More data, a larger num_epoch, or steps={done + 1} from the beginning lead there"
        )
    return lines
