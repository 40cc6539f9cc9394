"""Presets of models: where they lie, and which keys they set."""

import difflib
import pathlib
from typing import Any

from MaxText import upstream
from MaxText.config.files import CONFIGS, load_yml
from MaxText.config.keys import ConfigError


def preset_places(config_folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders of presets in the order in which they are searched: beside the config, ours, upstream's."""
    ours = [folder / "models" for folder in (config_folder, config_folder.parent, CONFIGS)]
    return [*ours, *map(pathlib.Path, upstream.preset_folders())]


def preset_file(name: str, config_folder: pathlib.Path) -> pathlib.Path | None:
    name = name.replace("-Instruct", "")  # upstream: an instruct model has the architecture of its base
    files = (folder / f"{name}.yml" for folder in preset_places(config_folder))
    return next((file for file in files if file.is_file()), None)


def preset_folder(key: str, name: str, config_folder: pathlib.Path) -> str:
    """The folder whose `models/` holds the preset `name`.

    Raises:
      ConfigError: no preset has that name; the message lists near ones.
    """
    if name == "default":
        return str(CONFIGS)
    file = preset_file(name, config_folder)
    if file is None:
        known = {other.stem for folder in preset_places(config_folder) for other in folder.glob("*.yml")}
        raise ConfigError(f"{key}={name!r}: no such model preset{suggestion(name, known)}")
    return str(file.parent.parent)


def preset_keys(name: str, config_folder: pathlib.Path) -> set[str]:
    """The keys that the preset `name` sets."""
    file = preset_file(name, config_folder)
    return {str(key) for key in load_yml(str(file))} if file else set()


def suggestion(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
