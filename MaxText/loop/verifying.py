"""Comparing a cache with its teacher: rows taken at random are computed again."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from MaxText.cache import manifest, quantiser, reading, row
from MaxText.config.keys import ConfigError, Distillation
from MaxText.console import RunError, say
from MaxText.data import evaluation
from MaxText.loop import caching

ROWS = 64  # of each split, where kd_cache_rows says nothing
# What the same numbers may differ by that were computed in another batch, in nats.
SLACK = 1e-4


@dataclasses.dataclass
class Differences:
    """Of all positions that were compared.

    Attributes:
      positions: how many.
      others: at how many of them other ids are stored, or other counts, than the teacher gives now.
      largest: what -> the largest difference, and the largest allowed by how it is stored, in nats.
    """

    positions: int = 0
    others: int = 0
    largest: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def add(self, stored: row.Row, now: row.Row) -> None:
        """`now` is what would be stored now, but not rounded."""
        self.positions += int(stored.counts_at.sum())
        differ = others(stored, now)
        self.others += int(differ.sum())
        pairs = {name: (getattr(stored, name), getattr(now, name)) for name in ("target_log_prob", "entropy")}
        for name, (before, after) in pairs.items():
            self.note(name, before, after, float(np.spacing(np.abs(before)).max()))
        if isinstance(stored.teacher, row.TopK) and isinstance(now.teacher, row.TopK) and not differ.any():
            self.note("log_probs", stored.teacher.log_probs, now.teacher.log_probs, 2 * quantiser.BOUND)
            self.note("log_tail", stored.teacher.log_tail, now.teacher.log_tail, 2 * quantiser.BOUND)

    def note(self, name: str, before: NDArray[Any], after: NDArray[Any], allowed: float) -> None:
        largest, bound = self.largest.get(name, (0.0, 0.0))
        before, after = before.astype(np.float32), after.astype(np.float32)
        differs = before != after  # where both are -inf a difference would be NaN
        found = float(np.abs(before[differs] - after[differs]).max(initial=0.0))
        self.largest[name] = max(largest, found), max(bound, allowed + SLACK)

    @property
    def none(self) -> bool:
        return self.others == 0 and all(found <= bound for found, bound in self.largest.values())


def others(stored: row.Row, now: row.Row) -> NDArray[np.bool_]:
    """At which positions the ids, or the counts of draws, are others."""
    differ = np.diff(stored.offsets) != np.diff(now.offsets)
    for position in np.flatnonzero(~differ & stored.counts_at):
        here = slice(stored.offsets[position], stored.offsets[position + 1])
        there = slice(now.offsets[position], now.offsets[position + 1])
        same = np.array_equal(stored.ids[here], now.ids[there])
        if isinstance(stored.teacher, row.Draws) and isinstance(now.teacher, row.Draws):
            same &= np.array_equal(stored.teacher.counts[here], now.teacher.counts[there])
        differ[position] = not same
    return differ


def verify(config: Any, kd: Distillation, folder: Path, step: caching.Step, contents: manifest.Contents) -> int:
    """Compares rows of each split, and says how far they are off. Returns 1 where more than rounding allows, else 0.

    Raises:
      ConfigError: there is no such cache, or it is of another teacher, data or settings.
      RunError: a file is damaged.
    """
    found = sound(folder)
    if difference := manifest.first_difference(found.contents, contents):
        raise ConfigError(f"kd_cache_path={folder}: is another cache ({difference})")
    table = Table("split", "rows", "positions", "other targets", "largest differences (allowed), nats", box=None)
    is_right = True
    for split in found.splits:
        rows = reading.Rows(folder, split)
        number = min(kd.kd_cache_rows or ROWS, len(rows))
        differences = compared(config, rows, number, step)
        is_right &= differences.none
        told = ", ".join(f"{name} {x:.2g} ({bound:.2g})" for name, (x, bound) in differences.largest.items())
        table.add_row(split, f"{number:,}", f"{differences.positions:,}", f"{differences.others:,}", told)
    is_right = not evaluation.any_host(not is_right)
    if jax.process_index() == 0:
        Console(soft_wrap=True).print(table)
    say("the cache is what its teacher says" if is_right else "THE CACHE IS NOT WHAT ITS TEACHER SAYS")
    return 0 if is_right else 1


def sound(folder: Path) -> manifest.Manifest:
    """The manifest of a cache of which each host has read its share of the bytes; none goes on without the others."""
    error, found = None, manifest.read(folder)
    try:
        manifest.verify_checksums(folder, jax.process_index(), jax.process_count())
    except RunError as damaged:
        error = damaged
    if evaluation.any_host(error is not None):
        raise error or RunError(f"{folder}: is damaged; another process names the file")
    return found


def compared(config: Any, rows: reading.Rows, number: int, step: caching.Step) -> Differences:
    """This host's share of `number` rows, taken at random, with what the teacher says of them now."""
    hosts, host = jax.process_count(), jax.process_index()
    size = config.global_batch_size_to_load // hosts
    order = np.random.default_rng(number).permutation(len(rows))[:number]
    own = order[host::hosts]
    differences = Differences()
    for start in range(0, -(-number // hosts), size):
        taken = [rows[int(index)] for index in own[start : start + size]]
        batch = {name: np.zeros((size, config.max_target_length), np.int32) for name in row.TOKENS}
        for place, stored in enumerate(taken):
            for name in row.TOKENS:
                batch[name][place] = getattr(stored, name)
        said = caching.own_rows(step(batch))
        for place, stored in enumerate(taken):
            differences.add(stored, caching.row_of(batch, said, place))
    return differences
