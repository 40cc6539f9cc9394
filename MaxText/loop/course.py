"""How far a caching is: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from MaxText.console import duration, readable, say

SECONDS = 10  # between two lines

Advance = Callable[[int, list[int], list[bytes]], None]


@contextlib.contextmanager
def shown(split: str, rows: int, done: int) -> Iterator[Advance]:
    """What is to be told of each batch: the number of hosts, and of this host's rows the tokens and the bytes.

    Args:
      split: its name.
      rows: of all hosts, that will be written; 0 where nobody knows.
      done: of these, those that were written before.
    """
    console = Console(stderr=True)
    is_bar = console.is_terminal and jax.process_index() == 0
    columns = TextColumn(split), BarColumn(), TextColumn("{task.fields[told]}")
    begun = last = time.monotonic()
    told_rows = told_tokens = told_bytes = 0
    with Progress(*columns, console=console, transient=True, disable=not is_bar) as bar:
        task = bar.add_task("", total=rows or None, completed=done, told="")

        def advance(hosts: int, tokens: list[int], records: list[bytes]) -> None:
            nonlocal last, told_rows, told_tokens, told_bytes
            told_rows += hosts * len(records)
            told_tokens += hosts * sum(tokens)
            told_bytes += hosts * sum(map(len, records))
            now = time.monotonic()
            passed = max(now - begun, 1e-9)
            parts = [f"{readable(told_tokens)} tokens", f"{readable(told_tokens / passed)} tok/s"]
            parts.append(f"{told_bytes / max(told_tokens, 1):.1f} bytes a token")
            if rows and told_rows:
                parts.append(f"{duration(passed * max(rows - done - told_rows, 0) / told_rows)} left")
            bar.update(task, completed=done + told_rows, told=" | ".join(parts))
            if not is_bar and now - last >= SECONDS:
                last = now
                say(f"   {split:>5}  {' | '.join(parts)}")

        yield advance
