"""What a run says when its training data ends before its schedule does."""

import math
from collections.abc import Callable
from typing import Any


def data_has_ended(config: Any, schedule: Callable[[int], Any], start: int, done: int, tokens: float) -> list[str]:
    """The end of the data in words, and a warning where the learning rate had still some way to go.

    Args:
      config: MaxText's configuration of the student.
      schedule: step -> learning rate.
      start: the first step of this process.
      done: the last step that was made.
      tokens: that counted in these steps.
    """
    steps = done + 1 - start
    rows = "" if config.enable_rampup_batch_size else f"{steps * config.global_batch_size_to_train_on:,} rows, "
    epochs = f"{config.num_epoch} epoch{'s' * (config.num_epoch != 1)} (num_epoch)"
    since = f" since step {start}" if start else ""
    read = f"{steps} steps, {rows}{tokens:,.0f} tokens read{since}, {epochs} in all"
    lines = [f"training stopped: the training data has ended before step {done + 1} of {config.steps}: {read}"]
    last = config.learning_rate_schedule_steps - 1
    now, end = float(schedule(max(done, 0))), float(schedule(last))
    if done < last and not math.isclose(now, end, rel_tol=1e-3):
        lines.append(
            f"warning: the learning rate has not reached its end: {now:.2e} at step {done}, planned was {end:.2e} at "
            f"step {last}. More data, a larger num_epoch, or steps={done + 1} from the beginning lead there"
        )
    return lines
