"""Makes a student of its teacher: a checkpoint of MaxText's that holds a part of the teacher's parameters.

    python scripts/init_student.py --teacher gs://bucket/qwen3-4b --target qwen3-1.7b --output gs://bucket/student \\
      --by importance my_student.yml grain_train_files='gs://bucket/data/train*.arrayrecord'
    python scripts/init_student.py --teacher gs://bucket/qwen3-4b --layers 18 --output gs://bucket/student --by uniform

writes <output>/0/items (what load_parameters_path takes), <output>/cut.json (which layers, channels, heads and neurons
were kept, and why), <output>/tokenizer if the teacher has one beside it, and prints how to train. By importance the
teacher reads rows of the settings' data, on the devices that the settings say; the other ways read nothing. Arrays are
cut and written one after the other (docs/init_student.md). <output>/0 appears when all is written; after an
interruption the same command goes on.
"""

import argparse
import json
import shlex
import sys
from typing import Any

import yaml
from etils import epath
from rich.console import Console

from MaxText.config.files import absolute
from MaxText.config.keys import ConfigError
from MaxText.console import readable
from MaxText.huggingface.failures import errors_as_messages
from MaxText.pruning.choice import WAYS
from MaxText.pruning.cutting import Request, Student, cut
from MaxText.pruning.target import SIZES

WHAT = {
    "layers": "of gemma2 pairs of them",
    "emb": "embedding channels",
    "heads": "of queries, in a layer",
    "kv_heads": "of keys and values, in a layer",
    "mlp": "neurons of a layer",
    "experts": "of a layer",
}


def command(student: Student, settings: list[str]) -> str:
    """How to train the student on the teacher's distribution."""
    yml = [word for word in settings if word.endswith((".yml", ".yaml"))] or ["my_student.yml"]
    given = {"load_parameters_path": student.items, "model_name": student.model.preset}
    overrides = student.model.overrides
    if overrides:
        given |= {"override_model_config": "true"}
        given |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in overrides.items()}
    given |= {"scan_layers": str(student.scan_layers).lower(), "use_kd": "true"}
    given |= {"kd_teacher_parameters_path": student.teacher_items, "kd_teacher_model_name": student.teacher.preset}
    if student.teacher.overrides:
        given |= {"kd_teacher_overrides": student.teacher.argument}
    words = [f"{key}={value}" for key, value in given.items()]
    own = [word for word in settings if word not in yml and word.partition("=")[0] not in given]
    line = shlex.join(["python", "MaxText/train.py", *yml, *own, *words])
    return f"to train it:\n  {line}" + (
        f"\ntokens, in {yml[0]}:\n  tokenizer_type: huggingface\n  tokenizer_path: {student.tokenizer}"
        if student.tokenizer
        else ""
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Makes a student of its teacher, by leaving parts of it out.")
    parser.add_argument("--teacher", required=True, help="a checkpoint of MaxText's; a conversion's output folder, too")
    parser.add_argument("--output", required=True, help="a new folder, local or gs://")
    parser.add_argument(
        "--model-name", default="", help="the teacher's preset; by default the one that its conversion wrote"
    )
    parser.add_argument("--overrides", help="what the teacher has otherwise, as in '{base_emb_dim: 1024}'; likewise")
    parser.add_argument("--target", default="", help="a preset of the student's sizes")
    for name, what in WHAT.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{what}; wins over the target's")
    parser.add_argument("--by", default="importance", choices=WAYS, help="what is kept: what matters most by the "
                        "teacher's activations; loss: so, but layers by the cross-entropy without each of them; the "
                        "first; or evenly spaced ones")  # fmt: skip
    parser.add_argument("--rows", type=int, default=256, help="that the teacher reads for importance and loss")
    parser.add_argument(
        "--scan-layers", choices=["true", "false"], help="how layers are stored; by default as the teacher's"
    )
    parser.add_argument("settings", nargs="*", help="[config.yml] key=value ... of the training: whose data is read")
    return parser.parse_intermixed_args(argv)


def overrides_of(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = text
    if not isinstance(found, dict):
        raise ConfigError(f"--overrides={text!r}: a mapping is needed, such as '{{base_emb_dim: 1024}}'")
    return found


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.rows < 1:
        raise ConfigError(f"--rows={arguments.rows}: allowed is 1 up")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    sizes = {name: value for name in SIZES if (value := getattr(arguments, name)) is not None}
    request = Request(
        teacher=arguments.teacher,
        model_name=arguments.model_name,
        overrides=overrides_of(arguments.overrides),
        target=arguments.target,
        sizes=sizes,
        by=arguments.by,
        scan_layers=None if arguments.scan_layers is None else arguments.scan_layers == "true",
        rows=arguments.rows,
        settings=arguments.settings,
    )
    student = cut(request, epath.Path(absolute(arguments.output)), console)
    if student.measured:
        console.print(f"measured on {student.measured}")
    kept, whole = map(readable, student.parameters)
    shown = {name: value for name, value in student.model.sizes.items() if name != "experts" or value > 1}
    layers = " ".join(map(str, student.layers))
    console.print(f"{kept} of {whole} parameters, layers {layers}: {student.items}")
    console.print(f"now {', '.join(f'{name} {value}' for name, value in shown.items())}")
    console.print(command(student, arguments.settings))


if __name__ == "__main__":
    with errors_as_messages():
        main(sys.argv[1:])
