"""A parameters-only checkpoint, written array by array: it appears when it is whole, and an interrupted write goes on.

What is being written is told by a record beside it; by the same record the arrays that lie there are kept.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from etils import epath, epy
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from MaxText import upstream
from MaxText.checkpoints.stacked_arrays import Pending, Stacked, stored_by_piece, written_by_piece
from MaxText.config.keys import ConfigError

with epy.lazy_imports():
    from orbax.checkpoint.experimental import v1 as ocp

BATCH = 1 << 28  # bytes of small arrays that are written at once
PARTIAL = "unfinished.partial_save"  # how Orbax calls the unfinished checkpoint, and each write in it begins
CHUNK = 1 << 27  # bytes of an array that are stored as one: who restores a shard reads the chunks that it touches


def check_free(output: epath.Path, name: str) -> None:
    """Raises ConfigError where the folder holds anything but an unfinished checkpoint with its record `name`."""
    if (output / "0").exists():
        raise ConfigError(f"--output {str(output)!r}: holds a checkpoint already; take another folder")
    if output.exists() and not (output / name).exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r}: exists and is not empty; take another folder")


def begin(output: epath.Path, name: str, record: dict[str, Any]) -> set[tuple[str, ...]]:
    """Makes the output's folder -> paths of the arrays that an interrupted write by the same record left there.

    Args:
      output: the folder.
      name: of the file that holds the record.
      record: what is written, and of what.

    Raises:
      ConfigError: the folder holds anything else.
    """
    check_free(output, name)
    file = output / name
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    written = resume(output / PARTIAL) if file.exists() and file.read_text() == text else set()
    if not written:
        for left in output.glob("unfinished*"):
            left.rmtree()
    file.write_text(text)
    return written


def resume(partial: epath.Path) -> set[tuple[str, ...]]:
    """Paths of the arrays in an unfinished checkpoint, from which the write that was cut off is removed.

    Empty where there is no such checkpoint, or one that was cut off while its writes were being made into one.
    """
    writes = list(partial.iterdir()) if partial.exists() else []
    if not all(write.name.startswith(PARTIAL) for write in writes):
        return set()
    written = set()
    for write in writes:
        if (write / "commit_success.txt").exists():
            arrays = json.loads((write / "state" / "_METADATA").read_text())["tree_metadata"].values()
            written |= {tuple(part["key"] for part in array["key_metadata"]) for array in arrays}
        else:
            write.rmtree()
    return written


def batches(arrays: list[tuple[Any, Stacked]]) -> Iterator[list[tuple[Any, Stacked]]]:
    """Runs of arrays of at most BATCH bytes; a larger array is alone."""
    batch: list[tuple[Any, Stacked]] = []
    size = 0
    for path, array in arrays:
        if batch and size + array.nbytes > BATCH:
            yield batch
            batch, size = [], 0
        batch.append((path, array))
        size += array.nbytes
    if batch:
        yield batch


def save(
    output: epath.Path,
    arrays: list[tuple[Any, Stacked]],
    written: set[tuple[str, ...]],
    config: Any,
    console: Console,
    doing: str,
) -> None:
    """Writes <output>/0/items, which appears when it is whole.

    Args:
      output: the folder, begun.
      arrays: path in the checkpoint, as jax has it -> array.
      written: paths of those that lie there already.
      config: MaxText's configuration of the model: how its checkpoints are stored.
      console: shows how far it is, where it is a terminal.
      doing: what that is called there.
    """
    left = [(path, array) for path, array in arrays if tuple(part.key for part in path) not in written]
    if written:
        console.print(f"going on: {len(arrays) - len(left)} of {len(arrays)} arrays were written before")
    unfinished = output / "unfinished"
    context = upstream.checkpoint_context.build_context(
        use_ocdbt=config.checkpoint_storage_use_ocdbt,
        use_zarr3=config.checkpoint_storage_use_zarr3,
        ocdbt_target_data_file_size_bytes=CHUNK,
    )
    context.memory.deepcopy_host_arrays = False
    context.array.saving.scoped_storage_options_creator = stored_by_piece
    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with context, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(array.nbytes for _, array in left))
        with written_by_piece(functools.partial(bar.advance, task)):
            for batch in batches(left):
                tree: dict[str, Any] = {}
                for path, array in batch:
                    *parents, last = (part.key for part in path)
                    node = tree
                    for parent in parents:
                        node = node.setdefault(parent, {})
                    node[last] = Pending.of(array) if array.nbytes > BATCH else array.whole()
                ocp.partial.save(unfinished, tree, custom_metadata={"scan_layers": config.scan_layers})
        ocp.partial.finalize(unfinished)
    (unfinished / "state").rename(unfinished / "items")  # orbax's name for a single tree; MaxText looks for its own
    unfinished.rename(output / "0")
