"""A teacher of a Hugging Face model: a checkpoint of MaxText's that holds its parameters alone.

Arrays are read, transformed and written one after the other: memory is a few times the largest tensor of the source,
not the model (docs/convert.md).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath, epy
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.console import RunError, first_line
from MaxText.huggingface import presets, shapes, source, tensors, tokenizer, weights
from MaxText.huggingface.stacked_arrays import Pending, Shape, Stacked, stored_by_piece, written_by_piece

with epy.lazy_imports():
    import transformers  # after upstream has quietened it
    from orbax.checkpoint.experimental import v1 as ocp

SHOWN = 5  # tensors that are not used are named up to so many
BATCH = 1 << 28  # bytes of small arrays that are written at once
PARTIAL = "unfinished.partial_save"  # how Orbax calls the unfinished checkpoint, and each write in it begins
CHUNK = 1 << 27  # bytes of an array that are stored as one: who restores a shard reads the chunks that it touches


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What a conversion made.

    Attributes:
      model_type: of config.json.
      preset: MaxText's, with `overrides` for what the model has otherwise.
      items: the checkpoint.
      tokenizer: its folder.
      nbytes: what its arrays take.
    """

    model_type: str
    preset: str
    overrides: dict[str, Any]
    items: epath.Path
    tokenizer: epath.Path
    nbytes: int


def convert(
    hf: str, output: epath.Path, *, model_name: str, dtype: str, scan_layers: bool, console: Console
) -> Teacher:
    """Writes <output>/0/items, <output>/tokenizer and <output>/conversion.json.

    Args:
      hf: the model's folder, or its name on the hub.
      output: a new folder, or one that an interrupted conversion of the same model left.
      model_name: the preset; "": the one that fits.
      dtype: what the arrays are stored in.
      scan_layers: layers stacked, or one by one.
      console: shows how far it is, where it is a terminal.

    Raises:
      ConfigError: there is no such model, or MaxText has none like it; nothing was written.
      RunError: it could not be written, or its tensors not be read; the same conversion goes on from there.
    """
    folder = source.fetch(hf)
    as_written = source.read_config(folder)
    hf_config, stored = tensors.with_its_head(as_written, tensors.stored_tensors(folder))
    preset, changed = presets.choose(hf_config, model_name)
    config = shapes.maxtext_config(preset, changed, scan_layers)
    arrays, left = lazy_arrays(stored, hf_config, config, dtype)
    if hf_config.tie_word_embeddings != as_written.tie_word_embeddings:
        console.print("warning: tie_word_embeddings=true, but lm_head.weight is not the embeddings' table: kept apart")
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        console.print(f"warning: tensors that the model does not use ({len(left)}): {', '.join(left[:SHOWN])}{more}")
    record = {"hf": hf, "model_name": preset, "overrides": changed, "dtype": dtype}
    record |= {"scan_layers": config.scan_layers, "files": source.source_files(folder)}
    try:
        written = begin(output, record)
        tokenizer.copy_files(epath.Path(folder), output / "tokenizer")
        save(output, arrays, written, config, console)
    except (OSError, ValueError, safetensors.SafetensorError) as error:  # tensorstore's are of the second kind
        reason = first_line(error)
        raise RunError(f"{output}: not converted ({reason}); the same command goes on from here") from error
    size = sum(array.nbytes for _, array in arrays)
    return Teacher(hf_config.model_type, preset, changed, output / "0" / "items", output / "tokenizer", size)


# The arrays -----------------------------------------------------------------------------------------------------------


def lazy_arrays(
    stored: dict[str, tensors.Tensor], hf_config: transformers.PreTrainedConfig, config: Any, dtype: str
) -> tuple[list[tuple[Any, Stacked]], list[str]]:
    """Path -> array of MaxText's checkpoint, read and transformed when asked for; and the tensors of no array."""
    tables = weights.tables(hf_config, config, saving=False)
    wanted, treedef = shapes.model_info(config)
    keys = tables.parameters(wanted.keys())
    needed = {name for key in keys for name in jax.tree.leaves(tables.names[key])}
    on_disk = tensors.locate(needed, tables.shapes, stored)

    def load(hook: Any, name: str, shape: Shape) -> np.ndarray:
        """In float32: transformations multiply and add. Rounded once, when written."""
        return upstream.hf_utils.apply_hook_fns(on_disk[name].read(), shape, hook)

    leaves: list[Any] = [None] * len(wanted)
    for key in keys:
        place, shape = wanted[key]
        names, hook = tables.names[key], tables.hooks.get(key)
        axes = stacked_axes(key, names, shape, config)
        kind = jnp.dtype("float32" if key.startswith(weights.BIASES) else dtype)  # biases move by small steps
        leaves[place] = Stacked(shape, kind, names, axes, functools.partial(load, hook))
    arrays = jax.tree_util.tree_leaves_with_path({"params": jax.tree.unflatten(treedef, leaves)})
    return arrays, tensors.unused(stored, on_disk.values())


def stacked_axes(key: str, names: Any, shape: Shape, config: Any) -> tuple[int, ...]:
    """Where MaxText stacks: experts and layers in front, layers alone along `param_scan_axis`, but those of biases."""
    depth = upstream.hf_utils.nesting_depth(names)
    scanned = config.scan_layers and len(shape) > config.param_scan_axis and not key.startswith(weights.BIASES)
    return (config.param_scan_axis,) if depth == 1 and scanned else tuple(range(depth))


# The checkpoint -------------------------------------------------------------------------------------------------------


def begin(output: epath.Path, record: dict[str, Any]) -> set[tuple[str, ...]]:
    """Makes the output's folder -> paths of the arrays that an interrupted conversion by the same record left there.

    Raises:
      ConfigError: the folder holds anything else.
    """
    file = output / "conversion.json"
    if (output / "0").exists():
        raise ConfigError(f"--output {str(output)!r}: holds a checkpoint already; take another folder")
    if output.exists() and not file.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r}: exists and is not empty; take another folder")
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
    output: epath.Path, arrays: list[tuple[Any, Stacked]], written: set[tuple[str, ...]], config: Any, console: Console
) -> None:
    """Writes the arrays as <output>/0/items, which appears when it is whole; those in `written` lie there already."""
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
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
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
