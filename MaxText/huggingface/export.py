"""A trained student as a Hugging Face folder.

Arrays are read one by one, and all tensors are in memory until written. Left out on purpose: the optimizer's state,
layers for multi-token prediction, and uploads to the hub.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import safetensors
from etils import epath, epy
from flax import nnx
from rich.console import Console
from rich.progress import track

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.console import RunError, first_line
from MaxText.huggingface import shapes, weights
from MaxText.huggingface import tokenizer as tokenizer_lib
from MaxText.huggingface.architecture import configuration, spelled
from MaxText.models import teacher

with epy.lazy_imports():
    from orbax.checkpoint.experimental import v1 as ocp

MTP = "mtp_block"  # layers for multi-token prediction serve training alone; no config.json has a word for them


@dataclasses.dataclass(frozen=True)
class Student:
    """What an export made.

    Attributes:
      architecture: as transformers calls its class.
      parameters: how many.
      step: of the checkpoint; None where its path does not tell.
      positions: max_position_embeddings.
      tokenizer: where its tokenizer's files were looked for, and whether they are beside it.
    """

    architecture: str
    parameters: int
    step: int | None
    positions: int
    tokenizer: str
    has_tokenizer: bool


def export(
    run: str,
    output: pathlib.Path,
    settings: list[str],
    *,
    model_name: str,
    tokenizer: str,
    dtype: str,
    console: Console,
) -> Student:
    """Writes the folder `output`, which appears when it is whole.

    Args:
      run: the run's folder (its newest checkpoint) or a checkpoint of it.
      output: a new local folder.
      settings: [config.yml] key=value ..., as the training command had them.
      model_name: the student's preset; "": the settings'.
      tokenizer: its folder or file; "": tokenizer_path of the settings.
      dtype: of the tensors.
      console: shows how far it is, where it is a terminal.

    Raises:
      ConfigError: no student of these settings is in the run, or Hugging Face has none like it.
      RunError: the folder could not be written.
    """
    upstream.set_verbose(False)  # orbax would tell how it finds its way in the checkpoint
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r}: exists and is not empty; take another folder")
    if tokenizer and not epath.Path(tokenizer).exists():
        raise ConfigError(f"--tokenizer {tokenizer!r}: no such file or folder")
    checkpoint = find_student(run)
    config = student_config(settings, model_name, checkpoint)
    hf_config = configuration(config)
    places = stored_arrays(run, config, checkpoint)
    hf_config.dtype = dtype
    tokenizer = tokenizer or config.tokenizer_path
    copied = bool(tokenizer) and epath.Path(tokenizer).exists()
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        describe(hf_config, tokenizer if copied else "", unfinished)
        parts = tensors(config, hf_config, checkpoint, places, dtype)
        quiet = not console.is_terminal
        made: dict[str, np.ndarray] = {}
        for part in track(parts, "exporting", len(places), console=console, disable=quiet, transient=True):
            made |= part
        count = sum(value.size for value in made.values())
        with upstream.silence():
            files, index = upstream.hf_utils.shard_checkpoint(made)
            upstream.hf_utils.save_weight_files(files, index, str(unfinished), str(unfinished))
        output.mkdir(exist_ok=True)
        unfinished.replace(output)
    except ConfigError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"{output}: cannot be written ({first_line(error)})") from error
    architecture, positions = hf_config.architectures[0], hf_config.max_position_embeddings
    return Student(architecture, count, checkpoint.step, positions, tokenizer, copied)


def describe(hf_config: Any, tokenizer: str, folder: pathlib.Path) -> None:
    """Writes config.json, and with a tokenizer ("": none) its files and generation_config.json.

    Without one config.json names no token that begins or ends a text: the class's own would be another tokenizer's.
    """

    def write(name: str, values: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    tokens: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    write("config.json", spelled(hf_config) | tokens)
    if tokenizer:
        tokens = tokenizer_lib.copy_beside(tokenizer, epath.Path(folder))
        write("config.json", spelled(hf_config) | tokens)
        write(tokenizer_lib.GENERATION, tokenizer_lib.generation_config(epath.Path(folder), tokens))


def student_config(settings: list[str], model_name: str, checkpoint: teacher.Checkpoint) -> Any:
    """MaxText's configuration of the student, with its layers as the checkpoint has them, for this machine."""
    groups = (upstream.types.IciParallelism, upstream.types.DcnParallelism)
    fixed = {key: field.default for group in groups for key, field in group.model_fields.items()}
    fixed |= shapes.NEUTRAL | {
        "use_kd": False,
        "weight_dtype": "float32",
        "scan_layers": checkpoint.scan_layers,
    }
    if model_name:
        fixed["model_name"] = model_name
    keys = [argument for argument in settings if argument.split("=")[0] not in fixed]
    argv = ["export_student.py", *keys, *(f"{key}={value}" for key, value in fixed.items())]
    config = resolve.initialize(argv).student
    described = any(key.endswith((".yml", ".yaml")) or key.startswith("decoder_block=") for key in settings)
    if config.model_name == "default" and not described:
        raise ConfigError("--model-name: which preset is the student? (or the training command's settings)")
    return config


def find_student(run: str) -> teacher.Checkpoint:
    """The newest checkpoint of a run, or the one given."""
    try:
        found = teacher.find_checkpoint(run)
    except ConfigError as error:  # the search is the teacher's, and so is the key in its words
        raise ConfigError(str(error).replace("kd_teacher_parameters_path=", "--run ")) from error
    if not (found.root / "items").exists():
        raise ConfigError(f"--run {run!r}: a checkpoint that has `items` in it is expected")
    return found


Place = tuple[teacher.Path, tuple[int, ...]]  # where an array lies in the checkpoint, and its shape


def stored_arrays(run: str, config: Any, checkpoint: teacher.Checkpoint) -> dict[str, Place]:
    """Name of each of the model's arrays, as conversion calls it -> where it lies in the checkpoint.

    Raises:
      ConfigError: the checkpoint holds others, or of other shapes.
    """
    wanted, _ = shapes.model_info(config)
    places = {name.partition("-")[2]: (name, tuple(shape)) for name, (_, shape) in wanted.items()}
    stored = {"-".join(path): (where, shape) for path, (where, shape, _) in checkpoint.arrays.items()}
    problems = [
        f"  {place}: {stored[place][1] if place in stored else 'nothing'} stored, the model has {shape}"
        for place, (_, shape) in places.items()
        if place not in stored or stored[place][1] != shape
    ]
    problems += [
        f"  {place}: stored, the model has no such array"
        for place, (where, _) in sorted(stored.items())
        if where[0] == "params" and place not in places and not place.startswith(MTP) and "rngs" not in place
    ]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "\n".join(problems[:5]) + more
        raise ConfigError(
            f"--run {run!r}: does not hold a {config.model_name} of these settings:\n{listed}\n"
            "Give the settings that it was trained with, as the training command had them."
        )
    return {name: stored[place] for place, (name, _) in places.items()}


def read(checkpoint: teacher.Checkpoint, place: Place) -> jax.Array:
    """One array, in float32: transformations multiply and add; rounded once, when written."""
    where, shape = place
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = nnx.traversals.unflatten_mapping({where: jax.ShapeDtypeStruct(shape, np.float32, sharding=here)})
    with (
        upstream.checkpoint_context.build_context(partial_load=True),
        teacher.unreadable_as_config_error(f"--run: {checkpoint.root} cannot be read"),
        upstream.quietly(),
    ):
        tree = ocp.load(checkpoint.root, wanted, checkpointable_name="items")
    return nnx.traversals.flatten_mapping(tree)[where]


def tensors(
    config: Any, hf_config: Any, checkpoint: teacher.Checkpoint, places: dict[str, Place], dtype: str
) -> Iterator[dict[str, np.ndarray]]:
    """Name -> tensor of Hugging Face's model, by MaxText's conversion, those of one array after the other."""
    found = weights.tables(hf_config, config, saving=True)
    for key in found.parameters(places.keys()):
        array, kind = read(checkpoint, places[key]), jax.numpy.dtype(dtype)
        if key.startswith(weights.BIASES):
            kind = np.dtype(np.float32)  # as transformers has them
            if config.scan_layers:  # stacked in front, which theirs does not know
                array = jax.numpy.moveaxis(array, 0, config.param_scan_axis)
        with upstream.silence():
            made = upstream.hf_utils.process_maxtext_param(key, array, found.names, found.hooks, found.shapes, config)
        yield {weights.spellings(name)[-1]: value.astype(kind) for name, value in made}
