"""The voice: what a run and every command say, and how numbers are written in it."""

import contextlib
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class RunError(Exception):
    """What began well and cannot go on. Its text says where and why, and is the last thing said."""


def say(line: str) -> None:
    """Prints a line once per run rather than once per host."""
    if jax.process_index() == 0:
        print(line, flush=True)


@contextlib.contextmanager
def waiting(for_what: str) -> Iterator[None]:
    """Shows on a terminal what takes its time, and how much it has taken; nothing elsewhere."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn(for_what), TimeElapsedColumn()
    shown = console.is_terminal and jax.process_index() == 0
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task("", total=None)
        yield


def readable(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def first_line(error: BaseException) -> str:
    """The first line that says something, of an error or of what caused it; with the next, where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
