"""Makes a teacher of a Hugging Face model: a checkpoint of MaxText's that holds its parameters alone.

    python scripts/convert_teacher.py --hf meta-llama/Llama-3.1-8B --output gs://bucket/teachers/llama3.1-8b

writes <output>/0/items (what kd_teacher_parameters_path and load_parameters_path take), <output>/tokenizer and
<output>/conversion.json, and prints how to train with it. No accelerator and no torch are needed. Arrays are read,
transformed and written one after the other: memory is a few times the largest tensor of the source, not the model
(docs/convert.md). <output>/0 appears when all is written; after an interruption the same command goes on.
"""

import argparse
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays pass through the host's memory alone

from etils import epath
from rich.console import Console

from MaxText.config.files import absolute
from MaxText.huggingface.convert import Teacher, convert
from MaxText.huggingface.failures import errors_as_messages
from MaxText.huggingface.families import FAMILIES


def next_commands(teacher: Teacher) -> str:
    """How to train with the teacher, and how a student begins as it."""
    changed = teacher.overrides
    given = ", ".join(f"{key}: {json.dumps(value)}" for key, value in changed.items())
    overriding = f" kd_teacher_overrides='{{{given}}}'" if changed else ""
    own = " ".join(f"{key}={json.dumps(value)}" for key, value in changed.items())
    own = f" override_model_config=true {own}" if changed else ""
    return (
        f"as a teacher:\n  python MaxText/train.py my_student.yml use_kd=true "
        f"kd_teacher_parameters_path={teacher.items} kd_teacher_model_name={teacher.preset}{overriding}\n"
        f"as a student's beginning:\n  python MaxText/train.py my_student.yml load_parameters_path={teacher.items} "
        f"model_name={teacher.preset}{own}\n"
        f"tokens, in my_student.yml:\n  tokenizer_type: huggingface\n  tokenizer_path: {teacher.tokenizer}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Makes a teacher of a Hugging Face model: a checkpoint of MaxText's that holds its parameters.",
        epilog=f"Architectures: {', '.join(FAMILIES)}. docs/convert.md has more.",
    )
    parser.add_argument(
        "--hf", required=True, help="the model's folder (config.json, safetensors) or its name on the hub"
    )
    parser.add_argument("--output", required=True, help="a new folder, local or gs://")
    parser.add_argument(
        "--model-name",
        default="",
        help="MaxText's preset; by default the one that fits, and what differs is overridden",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="what the parameters are stored in; float32 (the default) loses nothing, bfloat16 takes half the disk",
    )
    parser.add_argument(
        "--unscanned",
        action="store_true",
        help="store layer by layer, for a student with scan_layers=false; as a teacher it compiles slowly",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    teacher = convert(
        arguments.hf,
        epath.Path(absolute(arguments.output)),
        model_name=arguments.model_name,
        dtype=arguments.dtype,
        scan_layers=not arguments.unscanned,
        console=console,
    )
    size = f"{teacher.nbytes / 1e9:.3g} GB in {arguments.dtype}"
    console.print(f"{teacher.model_type} -> {teacher.preset}, {size}, {teacher.items}")
    console.print(next_commands(teacher))


if __name__ == "__main__":
    with errors_as_messages():
        main(sys.argv[1:])
