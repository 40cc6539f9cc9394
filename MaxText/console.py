"""The voice: what a run and every command say, and how numbers are written in it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from etils import epy
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

with epy.lazy_imports():  # seconds, which a command that touches no array need not wait
    import jax

Errors = type[Exception] | tuple[type[Exception], ...]


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


@contextlib.contextmanager
def errors_as_lines(*, refused: Errors = (), failed: Errors = (), hint: str = "") -> Iterator[None]:
    """Ends a command that cannot go on with one line, and no traceback.

    Args:
      refused: errors that say what of the input is not allowed; status 2.
      failed: errors that say what went wrong; status 1, as for a file that cannot be read or written.
      hint: what follows "interrupted", or the reason that a file gave.
    """
    try:
        yield
    except refused as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except failed as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {f'{error.filename}: {error.strerror}' if error.filename else first_line(error)}{hint}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted{hint}")


def end_with(error: Exception, status: int) -> NoReturn:
    """Ends the program with an error as its last words: at once, for the threads of a reader or a writer that has
    failed may never end, and may go on complaining."""
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(status)


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
