"""Rows of a cache, by their number or one after the other."""

import bisect
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from MaxText.cache import manifest
from MaxText.cache.codec import Damaged, decode
from MaxText.cache.row import Row
from MaxText.console import RunError, first_line

# Nothing is read ahead: rows are asked for in any order.
OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class Rows:
    """The rows of a split by their number, in the order of the shards' names. It can be sent to other processes.

    Raises:
      ConfigError: there is no such cache, it is not complete, or a file of it is missing or of another size.
      RunError: (when a row is taken) a file is damaged; it names file and row.
    """

    def __init__(self, folder: Path, split: str = "train"):
        self.folder, self.split = Path(folder), split
        self.manifest = manifest.check(self.folder, split)
        self.shards = self.manifest.splits[split].shards
        self.ends = list(itertools.accumulate(shard.rows for shard in self.shards))
        self.__setstate__({})

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self.ends, index)
        place = index - self.ends[shard] + self.shards[shard].rows
        file = self.folder / self.split / self.shards[shard].name
        try:
            return decode(self.reader(shard).read([place])[0])
        except (Damaged, RuntimeError) as error:  # RuntimeError: ArrayRecord's own hash
            raise RunError(f"{file}: row {place} is damaged ({first_line(error)}); cache the split anew") from error

    def __repr__(self) -> str:
        return f"Rows({str(self.folder)!r}, {self.split!r})"

    def reader(self, shard: int) -> Any:
        with self.opening:
            if shard not in self.readers:
                file = self.folder / self.split / self.shards[shard].name
                reader = array_record_module.ArrayRecordReader(str(file), OPTIONS)
                if (found := reader.num_records()) != self.shards[shard].rows:
                    raise Damaged(f"the file holds {found} rows, its manifest says {self.shards[shard].rows}")
                self.readers[shard] = reader
            return self.readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Open files and locks stay in the process that has them."""
        return {name: value for name, value in vars(self).items() if name not in ("readers", "opening")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.readers: dict[int, Any] = {}
        self.opening = threading.Lock()


def rows(path: str | Path, split: str = "train") -> Iterator[Row]:
    """The rows of a cache, in the order in which they were written.

    Args:
      path: the cache's folder.
      split: "train" or "eval".

    Returns:
      An iterator of rows of NumPy arrays (row.py): inputs, targets, segmentation, target_log_prob and entropy, [L]
      each; ids and weights of all positions after each other, those of position i from offsets[i] to offsets[i + 1].

    Raises:
      ConfigError: there is no such cache, it is not complete, or a file of it is missing or of another size.
      RunError: a file is damaged; it names file and row.
    """
    found = Rows(Path(path), split)
    return map(found.__getitem__, range(len(found)))
