"""Writes a trained student as a Hugging Face folder that `transformers` loads.

    python scripts/export_student.py --run runs/demo/student_kd --model-name qwen3-0.6b --output exported
    python scripts/export_student.py --run gs://bucket/runs/student --output exported my_student.yml key=value ...

The second form takes what the training command took, for a student whose shape is in its yml or on its command line.
The folder has config.json, safetensors, and the tokenizer where its files are at hand. No accelerator and no torch are
needed; the parameters must fit into the host's memory twice. The folder appears when it is whole. Left out on purpose:
the optimizer's state, layers for multi-token prediction, and uploads to the hub.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays pass through the host's memory alone

import convert_teacher
import hugging_face
import jax
import numpy as np
from etils import epath, epy

from MaxText import failures, pyconfig, teacher, upstream

with epy.lazy_imports():
    from maxtext.checkpoint_conversion.utils import utils as hf_utils


MTP = "params-mtp_block"  # layers for multi-token prediction serve training alone; no config.json has a word for them


def student_config(settings: list[str], model_name: str, checkpoint: teacher.Checkpoint) -> Any:
    """MaxText's configuration of the student, with its layers as the checkpoint has them, for this machine."""
    groups = (upstream.types.IciParallelism, upstream.types.DcnParallelism)
    fixed = {key: field.default for group in groups for key, field in group.model_fields.items()}
    fixed |= convert_teacher.NEUTRAL | {
        "use_kd": False,
        "load_parameters_path": checkpoint.root / "items",
        "weight_dtype": "float32",  # transformations multiply and add; rounded once, when written
        "scan_layers": checkpoint.scan_layers,
    }
    if model_name:
        fixed["model_name"] = model_name
    keys = [argument for argument in settings if argument.split("=")[0] not in fixed]
    argv = ["export_student.py", *keys, *(f"{key}={value}" for key, value in fixed.items())]
    config = pyconfig.initialize(argv).student
    if config.model_name == "default":
        raise pyconfig.ConfigError("--model-name: which preset is the student? (or the training command's settings)")
    return config


def find_student(run: str) -> teacher.Checkpoint:
    """The newest checkpoint of a run, or the one given."""
    try:
        found = teacher.find_checkpoint(run)
    except pyconfig.ConfigError as error:  # the search is the teacher's, and so is the key in its words
        raise pyconfig.ConfigError(str(error).replace("kd_teacher_parameters_path=", "--run ")) from error
    if not (found.root / "items").exists():
        raise pyconfig.ConfigError(f"--run {run!r}: a checkpoint that has `items` in it is expected")
    return found


def check_shapes(run: str, config: Any, checkpoint: teacher.Checkpoint) -> None:
    wanted, _ = convert_teacher.model_info(config)
    stored = {"-".join(("params", *path)): shape for path, (_, shape, _) in checkpoint.arrays.items()}
    problems = [
        f"  {name}: {stored.get(name, 'nothing')} stored, the model has {tuple(shape)}"
        for name, (_, shape) in wanted.items()
        if stored.get(name) != tuple(shape)
    ]
    unknown = [
        name for name in sorted(stored) if name not in wanted and not name.startswith(MTP) and "rngs" not in name
    ]
    problems += [f"  {name}: stored, the model has no such array" for name in unknown]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "\n".join(problems[:5]) + more
        raise pyconfig.ConfigError(
            f"--run {run!r}: does not hold a {config.model_name} of these settings:\n{listed}\n"
            "Give the settings that it was trained with, as the training command had them."
        )


def tensors(config: Any, hf_config: Any, dtype: str) -> dict[str, np.ndarray]:
    """Name -> tensor of Hugging Face's model, by MaxText's conversion."""
    tables = hugging_face.tables(hf_config, config, saving=True)
    wanted, _ = convert_teacher.model_info(config)
    made: dict[str, np.ndarray] = {}
    with upstream.silence():
        state = hf_utils.detect_and_extract_checkpoint(hf_utils.load_orbax_checkpoint(config))
        for key in hf_utils.validate_and_filter_param_map_keys(tables.names, wanted.keys()):
            for name, value in hf_utils.process_maxtext_param(
                key, state.pop(key), tables.names, tables.hooks, tables.shapes, config
            ):
                made[hugging_face.spellings(name)[-1]] = value.astype(jax.numpy.dtype(dtype))
    return made


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
    output = pathlib.Path(arguments.output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise pyconfig.ConfigError(f"--output {str(output)!r}: exists and is not empty; take another folder")
    if arguments.tokenizer and not epath.Path(arguments.tokenizer).exists():
        raise pyconfig.ConfigError(f"--tokenizer {arguments.tokenizer!r}: no such file or folder")
    checkpoint = find_student(arguments.run)
    config = student_config(arguments.settings, arguments.model_name, checkpoint)
    hf_config = hugging_face.configuration(config)
    check_shapes(arguments.run, config, checkpoint)
    hf_config.dtype = arguments.dtype
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        weights = tensors(config, hf_config, arguments.dtype)
        count = sum(value.size for value in weights.values())
        with upstream.silence():
            hf_utils.save_model_files(weights, hf_config, None, None, str(unfinished))
        tokenizer = arguments.tokenizer or config.tokenizer_path
        copied = bool(tokenizer) and copy_tokenizer(tokenizer, unfinished)
        output.mkdir(exist_ok=True)
        unfinished.replace(output)
    except OSError as error:
        raise failures.RunError(f"{output}: cannot be written ({failures.first_line(error)})") from error
    step = "" if checkpoint.step is None else f" of step {checkpoint.step}"
    print(f"{hf_config.architectures[0]}, {count:,} parameters in {arguments.dtype}{step}: {output}")
    if not copied:
        print(f"without a tokenizer: {tokenizer or 'tokenizer_path'} is not here; --tokenizer names one")


if __name__ == "__main__":
    with convert_teacher.errors_as_messages():
        main(sys.argv[1:])
