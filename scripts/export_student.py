"""Writes a trained student as a Hugging Face folder that `transformers` loads.

    python scripts/export_student.py --run runs/demo/student_kd --model-name qwen3-0.6b --output exported
    python scripts/export_student.py --run gs://bucket/runs/student --output exported my_student.yml key=value ...

The second form takes what the training command took, for a student whose shape is in its yml or on its command line.
The folder has config.json for transformers 4 and 5, safetensors, and where the tokenizer's files are at hand these and
generation_config.json. No accelerator and no torch are needed; arrays are read one by one, and all tensors are in
memory until written. The folder appears when it is whole.
Left out on purpose: the optimizer's state, layers for multi-token prediction, and uploads to the hub.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays pass through the host's memory alone

from rich.console import Console

from MaxText.huggingface.export import export
from MaxText.huggingface.failures import errors_as_messages


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
    student = export(
        arguments.run,
        output,
        arguments.settings,
        model_name=arguments.model_name,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        console=Console(highlight=False, soft_wrap=True),
    )
    step = "" if student.step is None else f" of step {student.step}"
    size = f"{student.parameters:,} parameters in {arguments.dtype}{step}"
    print(f"{student.architecture}, {size}, {student.positions} positions: {output}")
    if not student.has_tokenizer:
        print(
            f"without a tokenizer: {student.tokenizer or 'tokenizer_path'} is not here; --tokenizer names one, and "
            "config.json then the tokens that begin and end a text"
        )


if __name__ == "__main__":
    with errors_as_messages():
        main(sys.argv[1:])
