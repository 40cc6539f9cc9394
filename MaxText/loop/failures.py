"""What ends a run that began well: a loss that is no number, a disk that takes no more. Each as one message.

Input that cannot be trained on is ConfigError, found before the first step (status 2). What is here is found
while training: status 1, and the newest checkpoint is good.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from MaxText import upstream
from MaxText.config.data import data_settings
from MaxText.console import RunError, first_line
from MaxText.data import faults

# The addends of the loss as the metrics name them; which of them a run has depends on its step.
TERMS = {"ce": "ce_loss", "kd": "kd_loss", "z": "z_loss", "moe": "moe_lb_loss", "mtp": "mtp_loss"}
# With the gradient as applied and the parameters finite, what the optimizer keeps of them is, too.
STATE = {"gradient norm": "grad_norm", "parameter norm": "param_norm"}


# Why a batch may hold no target: for messages.
NO_TOKEN_COUNTS = (
    "no token counts: each position is padding or masked (rows of one token have no target; where completions "
    "alone are trained on, nor have prompts as long as max_target_length)"
)
# After so many steps from the first in which no token counted, there is nothing to wait for.
MOST_EMPTY_STEPS = 10


def divergence(scalars: Mapping[str, Any], step: int) -> tuple[str, list[float]]:
    """What is not finite in the metrics of a step.

    A step that the optimizer skipped (skip_step_on_spikes) left the state as it was: its gradient does not count.

    Returns:
      A sentence, "" if all is well; and the values that are not finite, the loss's or else the state's.
    """

    def broken(names: Mapping[str, str]) -> dict[str, float]:
        values = {title: float(scalars.get(f"learning/{name}", 0.0)) for title, name in names.items()}
        return {title: value for title, value in values.items() if not np.isfinite(value)}

    loss, terms, state = broken({"loss": "loss"}), broken(TERMS), broken(STATE)
    if loss:
        listed = ", ".join(f"{title} {value}" for title, value in terms.items()) or "each term is finite, their sum not"
        return f"the loss of step {step} is {loss['loss']} ({listed})", list(loss.values())
    if state and not float(scalars.get("optim/step_skipped", 0.0)):
        listed = ", ".join(f"{title} {value}" for title, value in state.items())
        return f"step {step} left a state that is not finite ({listed})", list(state.values())
    return "", []


def state_is_finite(scalars: Mapping[str, Any]) -> bool:
    """Whether a step left a state worth saving."""
    if not np.isfinite(float(scalars.get("learning/param_norm", 0.0))):
        return False
    skipped = bool(float(scalars.get("optim/step_skipped", 0.0)))
    return skipped or all(np.isfinite(float(scalars.get(f"learning/{name}", 0.0))) for name in ("loss", "grad_norm"))


@contextlib.contextmanager
def saving(config: Any) -> Iterator[None]:
    """Whatever fails while a checkpoint is written, in types of tensorstore's and of file systems', as RunError."""
    try:
        yield
    except upstream.exceptions.StopTraining:
        raise
    except Exception as error:
        reason = first_line(error)
        key = f"base_output_directory={config.base_output_directory!r}"
        raise RunError(f"{key}: the checkpoint could not be written to {config.checkpoint_dir} ({reason})") from error


@contextlib.contextmanager
def writing(config: Any, manager: Any) -> Iterator[None]:
    """Around the loop: its failures to write as RunError; a save that is under way when it ends is finished."""
    try:
        yield
    except OSError as error:
        finish(manager)
        raise RunError(f"base_output_directory={config.base_output_directory!r}: {first_line(error)}") from error
    except BaseException:
        finish(manager)
        raise


def batches(config: Any, iterator: Iterator[Any]) -> Iterator[Any]:
    """What the iterator of evaluation data yields; that it fails, in whichever type of the pipelines' own, as RunError.

    Upstream guards training data itself.
    """
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            what = faults.named(config, error, ("eval",)) or first_line(error)
            raise RunError(f"{data_settings(config)}: the evaluation data could not be read ({what})") from error
        yield batch


def finish(manager: Any) -> None:
    """Lets a save that is under way end; that it fails, too, is no news."""
    if manager is not None:
        with contextlib.suppress(Exception):
            upstream.checkpointing.wait_until_finished(manager)
