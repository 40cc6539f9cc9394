"""Writes a trained student as a Hugging Face folder that `transformers` loads.

    python scripts/export_student.py --run runs/demo/student_kd --model-name qwen3-0.6b --output exported
    python scripts/export_student.py --run gs://bucket/runs/student --output exported my_student.yml key=value ...

The second form takes what the training command took, for a student whose shape is in its yml or on its command line.
The folder has config.json, safetensors, and the tokenizer where its files are at hand. No accelerator and no torch are
needed; arrays are read one by one, and all tensors are in memory until written. The folder appears when it is whole.
Left out on purpose: the optimizer's state, layers for multi-token prediction, and uploads to the hub.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays pass through the host's memory alone

import convert_teacher
import hugging_face
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
from MaxText.console import first_line
from MaxText.loop import failures
from MaxText.models import teacher

with epy.lazy_imports():
    from maxtext.checkpoint_conversion.utils import utils as hf_utils
    from orbax.checkpoint.experimental import v1 as ocp

MTP = "mtp_block"  # layers for multi-token prediction serve training alone; no config.json has a word for them


def student_config(settings: list[str], model_name: str, checkpoint: teacher.Checkpoint) -> Any:
    """MaxText's configuration of the student, with its layers as the checkpoint has them, for this machine."""
    groups = (upstream.types.IciParallelism, upstream.types.DcnParallelism)
    fixed = {key: field.default for group in groups for key, field in group.model_fields.items()}
    fixed |= convert_teacher.NEUTRAL | {
        "use_kd": False,
        "weight_dtype": "float32",
        "scan_layers": checkpoint.scan_layers,
    }
    if model_name:
        fixed["model_name"] = model_name
    keys = [argument for argument in settings if argument.split("=")[0] not in fixed]
    argv = ["export_student.py", *keys, *(f"{key}={value}" for key, value in fixed.items())]
    config = resolve.initialize(argv).student
    if config.model_name == "default":
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
    wanted, _ = convert_teacher.model_info(config)
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
    tables = hugging_face.tables(hf_config, config, saving=True)
    for key in hf_utils.validate_and_filter_param_map_keys(tables.names, places.keys()):
        array, kind = read(checkpoint, places[key]), jax.numpy.dtype(dtype)
        if key.startswith(hugging_face.BIASES):
            kind = np.dtype(np.float32)  # as transformers has them
            if config.scan_layers:  # stacked in front, which theirs does not know
                array = jax.numpy.moveaxis(array, 0, config.param_scan_axis)
        with upstream.silence():
            made = hf_utils.process_maxtext_param(key, array, tables.names, tables.hooks, tables.shapes, config)
        yield {hugging_face.spellings(name)[-1]: value.astype(kind) for name, value in made}


def copy_tokenizer(path: str, folder: pathlib.Path) -> bool:
    """Copies a tokenizer's folder, or its SentencePiece model, beside the student; False where there is none."""
    source = epath.Path(path)
    if source.is_dir():
        for pattern in convert_teacher.TOKENIZER:
            for file in source.glob(pattern):
                if file.name != "config.json":  # the student's own
                    (folder / file.name).write_bytes(file.read_bytes())
    elif source.is_file():
        (folder / ("tokenizer.model" if source.suffix == ".model" else source.name)).write_bytes(source.read_bytes())
    return source.exists()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Writes a trained student as a Hugging Face folder.")
    parser.add_argument("--run", required=True, help="the run's folder (its newest checkpoint) or a checkpoint of it")
    parser.add_argument("--output", required=True, help="a new local folder")
    parser.add_argument("--model-name", default="", help="the student's preset")
    parser.add_argument("--tokenizer", default="", help="its folder or file; by default tokenizer_path of the settings")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the tensors")
    parser.add_argument("settings", nargs="*", help="[config.yml] key=value ... as the training command had them")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    output = pathlib.Path(arguments.output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r}: exists and is not empty; take another folder")
    if arguments.tokenizer and not epath.Path(arguments.tokenizer).exists():
        raise ConfigError(f"--tokenizer {arguments.tokenizer!r}: no such file or folder")
    checkpoint = find_student(arguments.run)
    config = student_config(arguments.settings, arguments.model_name, checkpoint)
    hf_config = hugging_face.configuration(config)
    places = stored_arrays(arguments.run, config, checkpoint)
    hf_config.dtype = arguments.dtype
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        weights: dict[str, np.ndarray] = {}
        made = tensors(config, hf_config, checkpoint, places, arguments.dtype)
        quiet = not console.is_terminal
        for part in track(made, "exporting", len(places), console=console, disable=quiet, transient=True):
            weights |= part
        count = sum(value.size for value in weights.values())
        with upstream.silence():
            hf_utils.save_model_files(weights, hf_config, None, None, str(unfinished))
        tokenizer = arguments.tokenizer or config.tokenizer_path
        copied = bool(tokenizer) and copy_tokenizer(tokenizer, unfinished)
        output.mkdir(exist_ok=True)
        unfinished.replace(output)
    except (OSError, safetensors.SafetensorError) as error:
        raise failures.RunError(f"{output}: cannot be written ({first_line(error)})") from error
    step = "" if checkpoint.step is None else f" of step {checkpoint.step}"
    length = hf_config.max_position_embeddings
    print(
        f"{hf_config.architectures[0]}, {count:,} parameters in {arguments.dtype}{step}, {length} positions: {output}"
    )
    if not copied:
        print(f"without a tokenizer: {tokenizer or 'tokenizer_path'} is not here; --tokenizer names one")


if __name__ == "__main__":
    with convert_teacher.errors_as_messages():
        main(sys.argv[1:])
