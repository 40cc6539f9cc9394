"""What is to be cut: the teacher by its preset and overrides, the student by another preset or by numbers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from MaxText.config.files import CONFIGS
from MaxText.config.keys import ConfigError
from MaxText.config.presets import preset_folder
from MaxText.huggingface.families import gemma3_scalar
from MaxText.huggingface.presets import overrides, presets

RECORD = "cut.json"  # beside a student; beside a converted teacher it is the other
RECORDS = ("conversion.json", RECORD)

# What a target may say -> MaxText's key.
SIZES = {
    "layers": "base_num_decoder_layers",
    "emb": "base_emb_dim",
    "heads": "base_num_query_heads",
    "kv_heads": "base_num_kv_heads",
    "mlp": "base_mlp_dim",
    "experts": "num_experts",
}
# Of experts the neurons stay. (In qwen3_moe's presets base_mlp_dim says the same of a dense layer that is not there.)
OF_EXPERTS = ("base_moe_mlp_dim", "num_experts_per_tok")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model by what MaxText's command line says of it.

    Attributes:
      preset: its name.
      overrides: what it has otherwise.
    """

    preset: str
    overrides: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        return presets()[self.preset] | self.overrides

    @property
    def sizes(self) -> dict[str, int]:
        return {name: self.settings[key] for name, key in SIZES.items()}

    @property
    def argument(self) -> str:
        """As kd_teacher_overrides and --overrides take it."""
        return "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in self.overrides.items()) + "}"


def teacher_of(folder: epath.Path, name: str, changed: dict[str, Any] | None) -> Model:
    """The teacher.

    Args:
      folder: its checkpoint's.
      name: the preset; "": that of the record beside the checkpoint.
      changed: overrides of the preset; None: the record's, or none where the preset is given.

    Raises:
      ConfigError: nothing tells which model it is, or there is no such preset.
    """
    if not name:
        record = record_beside(folder)
        if record is None:
            where = folder.parent if folder.name.isdigit() else folder
            raise ConfigError(f"--model-name: which model is it? There is no {' or '.join(RECORDS)} in {where}")
        name, found = record["model_name"], record["overrides"]
        changed = found if changed is None else changed
    check_preset("--model-name", name)
    return Model(name, dict(changed or {}))


def record_beside(folder: epath.Path) -> dict[str, Any] | None:
    """What a conversion, or a cut, has written of the checkpoint in `folder`."""
    for place in (folder, folder.parent):
        for name in RECORDS:
            file = place / name
            if file.exists():
                try:
                    return json.loads(file.read_text())
                except ValueError as error:
                    raise ConfigError(f"--teacher: {file} cannot be read ({error})") from error
    return None


def check_preset(flag: str, name: str) -> None:
    preset_folder(flag, name, CONFIGS)
    if name not in presets():
        raise ConfigError(f"{flag}={name!r}: a preset is needed, such as qwen3-1.7b")


def student_of(teacher: Model, target: str, numbers: dict[str, int]) -> Model:
    """The student: all of the teacher but its sizes.

    Args:
      teacher: what it is cut from.
      target: a preset of the sizes; "": the teacher's.
      numbers: sizes (of SIZES) that win over the preset's.

    Raises:
      ConfigError: it is no part of the teacher.
    """
    if not target and not numbers:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in SIZES)
        raise ConfigError(f"nothing to cut: give --target PRESET or some of {named}")
    sizes = {SIZES[name]: value for name, value in numbers.items()}
    if target:
        check_preset("--target", target)
        sizes = {key: presets()[target][key] for key in SIZES.values()} | sizes
        check_same_kind(teacher, target)
    preset = target or teacher.preset
    changed = overrides(preset, teacher.settings | sizes)
    student = Model(preset, {key: value for key, value in changed.items() if key != "base_config"})
    check_sizes(teacher, student)
    return student


def check_same_kind(teacher: Model, target: str) -> None:
    """Raises ConfigError where no choice of the teacher's parts is a model of the preset `target`."""
    own, wanted = teacher.settings, presets()[target]
    for key in ("decoder_block", "head_dim", *(OF_EXPERTS if own["num_experts"] > 1 else ())):
        if own[key] != wanted[key]:
            raise ConfigError(f"--target={target!r}: has {key}={wanted[key]}, the teacher {own[key]}: it is kept whole")


def check_sizes(teacher: Model, student: Model) -> None:
    own, wanted = teacher.sizes, student.sizes
    for name, value in wanted.items():
        flag = f"--{name.replace('_', '-')}={value}"
        if not 1 <= value <= own[name]:
            raise ConfigError(f"{flag}: the teacher has {own[name]}; allowed is 1 to {own[name]}")
    has_experts = own["experts"] > 1
    if has_experts and wanted["mlp"] != own["mlp"]:
        raise ConfigError(f"--mlp={wanted['mlp']}: experts are kept whole; allowed is {own['mlp']}")
    if has_experts and wanted["experts"] < max(2, per_token := student.settings["num_experts_per_tok"]):
        raise ConfigError(
            f"--experts={wanted['experts']}: each token has {per_token}; allowed is {max(2, per_token)} up"
        )
    group, rest = divmod(wanted["heads"], wanted["kv_heads"])
    if rest:
        raise ConfigError(f"--heads={wanted['heads']}: no multiple of {wanted['kv_heads']} key-value heads")
    most = own["heads"] // own["kv_heads"]
    if group > most:
        raise ConfigError(
            f"--heads={wanted['heads']} --kv-heads={wanted['kv_heads']}: a key-value head would have {group} query "
            f"heads, the teacher's have {most}; give at most {most * wanted['kv_heads']} heads"
        )
    if student.settings["decoder_block"] == "gemma3":
        scalars = [scalar_of(model) for model in (teacher, student)]
        if scalars[0] != scalars[1]:
            raise ConfigError(
                f"--emb={wanted['emb']} --heads={wanted['heads']}: MaxText's {student.preset} divides queries by "
                f"the root of {scalars[1]}, the teacher's are made for {scalars[0]}"
            )


def scalar_of(model: Model) -> int:
    sizes = model.sizes
    named = {"hidden_size": sizes["emb"], "num_attention_heads": sizes["heads"]}
    return gemma3_scalar(model.preset, named | {"head_dim": model.settings["head_dim"]})


def tokenizer_beside(folder: epath.Path) -> epath.Path | None:
    """The tokenizer's folder that a conversion, or a cut, has put beside the checkpoint in `folder`."""
    return next((place / "tokenizer" for place in (folder, folder.parent) if (place / "tokenizer").is_dir()), None)
