"""A cache as grain reads it: rows by their number, as a student's batch has them. No engine: workers import this."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from MaxText.cache.reading import Rows
from MaxText.cache.row import to_batch_arrays


class StudentRows:
    """A split's rows as arrays: a source for `grain.MapDataset.source`, so that its workers decode.

    The source, and not a transformation of bytes, for it can name the file and the row that is damaged.

    Args:
      folder: the cache's.
      split: "train" or "eval".
      slots: K of `row.to_batch_arrays`; None: what the cache has.
      vocabulary: V of the student; None: the teacher's.
    """

    def __init__(self, folder: Path, split: str, *, slots: int | None = None, vocabulary: int | None = None):
        self.rows = Rows(folder, split)
        self.slots = slots or self.rows.manifest.contents.slots
        self.vocabulary = vocabulary or self.rows.manifest.contents.vocab_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        return to_batch_arrays(self.rows[index], self.slots, self.vocabulary)

    def __repr__(self) -> str:
        """What decides the arrays: grain compares it when a run goes on."""
        return f"StudentRows({self.rows!r}, slots={self.slots}, vocabulary={self.vocabulary})"
