"""How it is measured: all programs of one shape take turns, round by round, in one process.

A drift of the machine hits all alike, and ratios are medians of the ratios within each round.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import psutil
from rich.progress import Progress

from MaxText.benchmarks.programs import (
    CACHING,
    CE_TILED,
    STEP_CE,
    STEP_KD,
    TEACHER_HIDDEN,
    TEACHER_LOGITS,
    Program,
    Row,
)


def measure(programs: Iterator[Program], rounds: int, title: str, bar: Progress) -> list[Row]:
    """Compiles every program, runs each once to warm up, then all in turn, `rounds` times; 0 runs none."""
    task = bar.add_task(f"{title}: compiling", total=None)
    compiled = []
    for program in programs:
        compiled.append(program)
        bar.update(task, description=f"{title}: compiled {program.row.name}")
    runnable = [program for program in compiled if rounds and fits(program.row)]
    bar.update(task, description=f"{title}: running", total=(rounds + 1) * len(runnable), completed=0)
    for number in range(rounds + 1):
        for program in runnable:
            start = time.perf_counter()
            jax.block_until_ready(program.call())
            if number > 0:
                program.row.seconds.append(time.perf_counter() - start)
            bar.advance(task)
    bar.remove_task(task)
    return [program.row for program in compiled]


def fits(row: Row) -> bool:
    """Whether the device has the memory to run it."""
    stats = jax.devices()[0].memory_stats()  # a CPU has none
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else psutil.virtual_memory().available
    return row.temp_bytes + row.output_bytes < 0.9 * free


def ratio(rows: Sequence[Row], bases: Sequence[Row]) -> float:
    """Median over rounds of the rows' time over the bases' time in the same round; NaN if one was not run."""
    if not all(row.seconds for row in (*rows, *bases)):
        return math.nan
    above = [sum(times) for times in zip(*(row.seconds for row in rows), strict=True)]
    below = [sum(times) for times in zip(*(row.seconds for row in bases), strict=True)]
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def compare(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row as it stands in the table and in the JSON file, with its time relative to that of others."""
    found = []
    for row in rows:
        shape = (row.group, row.tokens, row.vocabulary)
        beside = {other.name: other for other in rows if (other.group, other.tokens, other.vocabulary) == shape}
        entry = dataclasses.asdict(row) | {"median_seconds": row.median, "spread_seconds": row.spread}
        entry["to_tiled_ce"] = ratio([row], [beside[CE_TILED if row.group == "loss" else STEP_CE]])
        if row.name.startswith(STEP_KD):
            for key, name in (("to_ce_and_logits", TEACHER_LOGITS), ("to_ce_and_hidden", TEACHER_HIDDEN)):
                entry[key] = ratio([row], [beside[STEP_CE], beside[name]])
        if row.name.startswith(CACHING):
            entry["to_logits"] = ratio([row], [beside[TEACHER_LOGITS]])
        found.append({key: finite(value) for key, value in entry.items()})
    return found


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
