"""A run's data, each row once: for what computes something of every row and keeps it.

The pipelines are those of training and evaluation, for one epoch and to the last row. Where a pipeline can tell its
position it is given with each batch, so that reading goes on there; where it cannot, the rows before are read again.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from MaxText import upstream
from MaxText.config.data import data_settings
from MaxText.config.keys import ConfigError
from MaxText.console import RunError, first_line
from MaxText.data import faults, pipelines

Position = dict[str, Any]


class Read(NamedTuple):
    """A host's rows of a batch, and where its data stands after them."""

    batch: dict[str, np.ndarray]
    position: Position


def check(config: Any) -> None:
    """Raises ConfigError for data that has no rows of its own."""
    fine = {"colocated_python_data_input": False, "grain_use_elastic_iterator": False, "use_dpo": False}
    for key, allowed in fine.items():
        if getattr(config, key) != allowed:
            raise ConfigError(f"{key}={getattr(config, key)}: its rows cannot be kept; allowed is {allowed}")
    if config.dataset_type == "synthetic":
        raise ConfigError("dataset_type=synthetic: all rows are alike; there is nothing to keep")
    if config.expansion_factor_real_data not in (-1, 1):
        raise ConfigError(
            f"expansion_factor_real_data={config.expansion_factor_real_data:g}: hosts that read no data have none to "
            "keep; allowed is -1"
        )


def opened(config: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The splits of a run, "train" and, with evaluations, "eval" -> what reads this host's batches of it."""
    alone = upstream.with_settings(config, num_epoch=1)
    with pipelines.mended(alone, each_row_once=True):
        train, held_out = upstream.input_pipeline_interface.create_data_iterator(alone, mesh)
    return {split: found.dataloader for split, found in (("train", train), ("eval", held_out)) if found is not None}


def batches(config: Any, split: str, reader: Any, after: Position | None) -> Iterator[Read]:
    """A host's batches of a split, as many on each host.

    Args:
      config: MaxText's configuration of the run.
      split: for what is wrong with it.
      reader: of `opened`.
      after: the position of a batch, to go on after it. None: from the beginning.

    Raises:
      RunError: the data cannot be read.
    """
    done = 0 if after is None else after["batches"]
    reader.begin = None if after is None else after["state"]
    reading = iter(reader)
    with contextlib.closing(reading), unreadable_as_run_error(config, split):
        if done and reader.begin is None:
            next(itertools.islice(reading, done - 1, None), None)
        for number, batch in enumerate(reading, start=done + 1):
            yield Read(batch, {"batches": number, "state": reader.state})


@contextlib.contextmanager
def unreadable_as_run_error(config: Any, split: str) -> Iterator[None]:
    """Pipelines fail in types of their own; whichever, the data is what is wrong."""
    try:
        yield
    except Exception as error:
        what = faults.named(config, error, (split,)) or first_line(error)
        raise RunError(f"{data_settings(config)}: the data could not be read ({what})") from error
