"""A cache as grain reads it: rows by their number, as a student's batch has them. No engine: workers import this."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from MaxText.cache.reading import Rows
from MaxText.cache.row import to_batch_arrays


class StudentRows:
    """A split's rows as arrays: a source for `grain.MapDataset.source`, so that its workers decode.

    The source, and not a transformation of bytes, for it can name the file and the row that is damaged. Rows of zeros,
    which count nothing, make their number a multiple of `hosts`: one with a batch less than the others would leave them
    waiting for it in the last step.

    Args:
      folder: the cache's.
      split: "train" or "eval".
      first: how many are read, from the first on; 0: all.
      hosts: that read the split.
      slots: K of `row.to_batch_arrays`; None: what the cache has.
      vocabulary: V of the student; None: the teacher's.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        first: int = 0,
        hosts: int = 1,
        slots: int | None = None,
        vocabulary: int | None = None,
    ):
        self.rows = Rows(folder, split)
        self.count = min(first or len(self.rows), len(self.rows))
        self.hosts = hosts
        self.slots = slots or self.rows.manifest.contents.slots
        self.vocabulary = vocabulary or self.rows.manifest.contents.vocab_size

    def __len__(self) -> int:
        return math.ceil(self.count / self.hosts) * self.hosts

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        if index >= self.count:
            return {name: np.zeros_like(array) for name, array in self[0].items()}
        return to_batch_arrays(self.rows[index], self.slots, self.vocabulary)

    def __repr__(self) -> str:
        """What decides the arrays: grain compares it when a run goes on."""
        kept = f"slots={self.slots}, vocabulary={self.vocabulary}"
        return f"StudentRows({self.rows!r}, {self.count} for {self.hosts}, {kept})"
