"""A teacher of a Hugging Face model: a checkpoint of MaxText's that holds its parameters alone.

Arrays are read, transformed and written one after the other: memory is a few times the largest tensor of the source,
not the model (docs/convert.md).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath, epy
from rich.console import Console

from MaxText import upstream
from MaxText.checkpoints import writing
from MaxText.checkpoints.stacked_arrays import Shape, Stacked
from MaxText.console import RunError, first_line
from MaxText.huggingface import presets, shapes, source, tensors, tokenizer, weights

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

SHOWN = 5  # tensors that are not used are named up to so many


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
        written = writing.begin(output, "conversion.json", record)
        tokenizer.copy_files(epath.Path(folder), output / "tokenizer")
        writing.save(output, arrays, written, config, console, "converting")
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
