"""The files of a split: rows in order, a file at a time, each under its name only when it is whole.

A shard ends with a batch, so what stands beside it can say where the input data goes on. A caching that was killed
loses the shard that it was writing, and writes it again: the same rows give the same bytes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
from array_record.python import array_record_module

from MaxText.cache.manifest import Part, Shard, sha256, write_whole
from MaxText.config.keys import ConfigError
from MaxText.console import RunError, first_line

SUFFIX = ".arrayrecord"
# Records are packed already, and each is read by itself.
OPTIONS = "group_size:1,uncompressed"


class Written(Part):
    """<shard>.json: what a shard holds, and where the input data stands after it."""

    shard: Shard
    position: dict[str, Any] | None


class Writer:
    """Writes one host's rows of a split, after those that it wrote before.

    Args:
      folder: the cache's.
      split: "train" or "eval".
      batches_per_shard: how many batches of the input's a shard is of, the same on all hosts, so that they complete
        their shards together.
      host, hosts: which of how many this is.

    Attributes:
      rows: how many rows have been written.
      tokens: how many positions of these count.
      position: where the input data stands after the last batch in a whole shard, as `write` was given it; None: at its
        beginning.

    Raises:
      ConfigError: the folder cannot be written; it holds shards of another number of hosts; or one is missing or not as
        it was written.
    """

    def __init__(self, folder: Path, split: str, *, batches_per_shard: int, host: int = 0, hosts: int = 1):
        self.folder, self.batches_per_shard = folder / split, batches_per_shard
        self.host, self.hosts = f"host-{host:03d}", f"of-{hosts:03d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.take(self.whole_shards())
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error.strerror or error})") from error

    def take(self, whole: list[Written]) -> None:
        self.whole = whole
        self.unfinished: Unfinished | None = None
        self.rows = sum(written.shard.rows for written in whole)
        self.tokens = sum(written.shard.tokens for written in whole)
        self.position = whole[-1].position if whole else None

    @property
    def batches(self) -> int:
        """How many batches the whole shards are of."""
        return self.position["batches"] if self.position else 0

    def go_back_to(self, batches: int) -> None:
        """Gives up the shards of later batches: those that another host had not completed when all were killed."""
        while self.batches > batches:
            shard = self.folder / self.whole[-1].shard.name
            for file in (shard, shard.with_suffix(".json")):
                file.unlink()
            self.take(self.whole[:-1])

    def write(self, records: list[bytes], tokens: list[int], position: dict[str, Any]) -> None:
        """Writes the rows of a batch.

        Args:
          records: the encoded rows.
          tokens: how many positions of each count.
          position: where the input data stands after this batch, in JSON's types; "batches" is how many were read.

        Raises:
          RunError: the folder cannot be written.
        """
        with naming(self.folder):
            if self.unfinished is None:
                self.unfinished = Unfinished(self.shard(len(self.whole)))
            self.unfinished.write(records, tokens)
        self.unfinished.position = position
        self.rows += len(records)
        self.tokens += sum(tokens)
        if position["batches"] % self.batches_per_shard == 0:
            self.close()

    def close(self) -> None:
        """Completes the shard that is being written, if one is."""
        if self.unfinished is None:
            return
        with naming(self.folder):
            written = self.unfinished.complete()
        self.take([*self.whole, written])

    def shard(self, index: int) -> Path:
        """The path of a shard. By name the first shards of all hosts come before their second ones."""
        return self.folder / f"rows-{index:05d}-{self.host}-{self.hosts}{SUFFIX}"

    def whole_shards(self) -> list[Written]:
        """What stands beside this host's shards; what is not whole is removed."""
        others = sorted(file for file in self.folder.glob("rows-*") if self.hosts not in file.name)
        if others:
            begun = int(others[0].name.split(".")[0].split("-")[-1])
            raise ConfigError(
                f"{self.folder}: {begun} processes began to write it, {int(self.hosts[3:])} would go on; take as many, "
                "or another folder"
            )
        found: list[Written] = []
        while (shard := self.shard(len(found))).exists():
            found.append(written_beside(shard))
        names = {written.shard.name for written in found}
        for file in sorted(self.folder.glob(f"rows-*-{self.host}-*")):
            if file.suffix == SUFFIX and file.name not in names:
                raise ConfigError(f"{shard}: is missing, {file.name} was written after it; take another folder")
            if file.with_suffix(SUFFIX).name not in names:
                file.unlink()
        return found


class Unfinished:
    """A shard that is being written, under another name."""

    def __init__(self, shard: Path):
        self.shard, self.partial = shard, shard.with_name(shard.name + ".partial")
        self.partial.touch()  # ArrayRecord's writer reports a folder that cannot be written when it is closed
        self.writer = array_record_module.ArrayRecordWriter(str(self.partial), OPTIONS)
        self.rows = self.tokens = 0
        self.position: dict[str, Any] | None = None  # after its last batch

    def write(self, records: list[bytes], tokens: list[int]) -> None:
        for record in records:
            self.writer.write(record)
        self.rows += len(records)
        self.tokens += sum(tokens)

    def complete(self) -> Written:
        self.writer.close()
        found = array_record_module.ArrayRecordReader(str(self.partial)).num_records()
        if found != self.rows:
            raise OSError(None, f"{found} of {self.rows} rows were written")
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())
        size, checksum = self.partial.stat().st_size, sha256(self.partial)
        shard = Shard(name=self.shard.name, rows=self.rows, tokens=self.tokens, bytes=size, sha256=checksum)
        written = Written(shard=shard, position=self.position)
        write_whole(self.shard.with_suffix(".json"), written.model_dump(mode="json"))
        self.partial.replace(self.shard)
        return written


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Errors of ArrayRecord and of the file system as one that names the folder."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise RunError(f"{folder}: cannot be written ({why}); the same command goes on after the last shard") from error


def written_beside(shard: Path) -> Written:
    file = shard.with_suffix(".json")
    try:
        written = Written.model_validate_json(file.read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        raise ConfigError(f"{file}: is missing or damaged; take another folder") from error
    if shard.stat().st_size != written.shard.bytes:
        raise ConfigError(f"{shard}: has {shard.stat().st_size:,} bytes, {file.name} says {written.shard.bytes:,}")
    return written


def all_shards(folder: Path, split: str) -> list[Shard]:
    """What all hosts wrote of a split, in the order of the names: for the manifest, when each has closed its writer."""
    return [written_beside(shard).shard for shard in sorted((folder / split).glob(f"rows-*{SUFFIX}"))]
