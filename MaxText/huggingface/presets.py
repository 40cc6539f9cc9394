"""Which of MaxText's presets, and of ours, a Hugging Face model is, and what of it must be overridden."""

from __future__ import annotations

import functools
from typing import Any

from etils import epy

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

from MaxText.config.files import CONFIGS, defaults, load_yml
from MaxText.config.keys import ConfigError
from MaxText.config.presets import preset_folder, preset_places
from MaxText.huggingface.architecture import architecture
from MaxText.huggingface.families import GROUPS, Family, family_of, gemma3_scalar, head_dim
from MaxText.huggingface.rotary import LLAMA3

# How a model is stored or padded rather than what it is: a preset that differs in these alone fits. MaxText's preset of
# DeepSeek V3 leaves its groups of experts out.
ADJUSTED = ("vocab_size", "rope_type", "rope_use_scale", *LLAMA3, *GROUPS)


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """Name -> settings of every preset of MaxText's and of ours, on the defaults."""
    found: dict[str, dict[str, Any]] = {}
    beneath = dict(defaults())
    for folder in preset_places(CONFIGS):
        for file in sorted(folder.glob("*.yml")):
            found.setdefault(file.stem, beneath | dict(load_yml(str(file))))
    for name, settings in found.items():
        if name.startswith("llama3.1"):  # the one architecture that MaxText tells by the preset's name
            settings["rope_type"] = "llama3.1"
    return found


def overrides(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What of `settings` the preset `name` has otherwise."""
    if name.startswith("llama3.1") and settings["rope_type"] == "default":
        settings = settings | {"rope_type": "llama3.1", "rope_use_scale": False}
    return {key: value for key, value in settings.items() if presets()[name][key] != value}


def candidates(config: transformers.PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The presets of a configuration's family -> what each would have to be overridden with, the nearest first."""
    family, settings = family_of(config), architecture(config)
    found = {
        name: overrides(name, settings)
        for name, preset in presets().items()
        if preset["decoder_block"] == family.decoder_block
        and name.startswith(family.names)
        and all(preset[key] == value for key, value in family.own.items())
        and not preset["use_batch_split_schedule"]  # another schedule of a model that has a preset
        and has_scalar(name, config, family)
    }
    return dict(sorted(found.items(), key=lambda item: (len(item[1].keys() - set(ADJUSTED)), len(item[1]), item[0])))


def has_scalar(name: str, config: transformers.PreTrainedConfig, family: Family) -> bool:
    """MaxText's Gemma 3 knows by which number queries are divided from the preset's name, and refuses other names."""
    if family.decoder_block != "gemma3":
        return True
    return gemma3_scalar(name, config.to_dict() | {"head_dim": head_dim(config)}) == config.query_pre_attn_scalar


def choose(config: transformers.PreTrainedConfig, name: str) -> tuple[str, dict[str, Any]]:
    """The preset for a configuration, and the keys that must be overridden.

    Args:
      config: the Hugging Face configuration, of text alone.
      name: the preset that the user wants; "": the one that fits.

    Raises:
      ConfigError: none fits, or the wanted one is of another family.
    """
    fitting = candidates(config)
    if name:
        if name not in fitting:
            folder = CONFIGS
            preset_folder("--model-name", name, folder)
            raise ConfigError(
                f"--model-name={name!r}: is no {config.model_type}; presets of this family are {', '.join(fitting)}"
            )
        return name, fitting[name]
    nearest = next(iter(fitting), None)
    if nearest is None:
        raise ConfigError(f"model_type={config.model_type!r}: MaxText has no preset of this kind")
    if fitting[nearest].keys() <= set(ADJUSTED):
        return nearest, fitting[nearest]
    listed = "\n".join(
        f"  {near}, which would need {', '.join(f'{key}={value}' for key, value in changed.items())}"
        for near, changed in list(fitting.items())[:3]
    )
    raise ConfigError(
        f"no preset is a {config.model_type} of this shape. The nearest are\n{listed}\n"
        f"Take one with --model-name, such as --model-name {nearest}: what differs is overridden."
    )
