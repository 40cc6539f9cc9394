"""The yml files: base.yml, the user's file and those that its base_config leads to, as layers."""

import functools
import os
import pathlib
import re
from typing import Any

import omegaconf
import yaml

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.console import first_line

ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the repository: commands run there
CONFIGS = ROOT / "MaxText/configs"


def load_layers(path: str) -> tuple[omegaconf.DictConfig, omegaconf.DictConfig]:
    """Loads `path` and the files its `base_config` leads to -> (defaults, the user's files merged).

    A relative `base_config` is looked for beside the file that names it, then in MaxText/configs, then in upstream's
    configs. The defaults are upstream's base.yml under ours, whatever the user's files name; nobody may change them.
    """
    ours = CONFIGS / "base.yml"
    user = omegaconf.OmegaConf.create()
    seen: set[pathlib.Path] = set()
    current: pathlib.Path | None = pathlib.Path(path)
    while current is not None and current.resolve() not in (ours, pathlib.Path(upstream.base_yml()).resolve()):
        if current.resolve() in seen:
            raise ConfigError(f"base_config={str(current)!r}: the files name each other in a circle")
        seen.add(current.resolve())
        layer = load_yml(str(current))
        user = omegaconf.OmegaConf.merge(layer, user)
        name = layer.get("base_config")
        current = find_base(name, current) if name else None
    return defaults(), user


@functools.cache
def defaults() -> omegaconf.DictConfig:
    """Upstream's base.yml under ours: a thousand keys, which OmegaConf copies one by one wherever they are merged."""
    return omegaconf.OmegaConf.merge(load_yml(upstream.base_yml()), load_yml(str(CONFIGS / "base.yml")))


@functools.cache
def plain_defaults() -> dict[str, Any]:
    """They, which refer to nothing, as plain values: what student and teacher each begin with."""
    found: Any = omegaconf.OmegaConf.to_container(defaults(), resolve=True)
    return found


def keys_named_by(base: omegaconf.DictConfig, user: omegaconf.DictConfig) -> dict[str, Any]:
    """Those keys of `base` that an interpolation of the user's may name, and some besides."""
    text = omegaconf.OmegaConf.to_yaml(user)
    words = set(re.findall(r"\w+", text)) if "${" in text else ()
    return {str(key): base[key] for key in base if key in words}


def find_base(name: str, named_by: pathlib.Path) -> pathlib.Path:
    candidates = [folder / name for folder in (named_by.parent, CONFIGS, pathlib.Path(upstream.base_yml()).parent)]
    for candidate in candidates:
        if candidate.is_file() and candidate.resolve() != named_by.resolve():
            return candidate
    raise ConfigError(f"base_config={name!r} in {named_by}: no such file; looked at {', '.join(map(str, candidates))}")


def load_yml(path: str) -> omegaconf.DictConfig:
    try:
        loaded = omegaconf.OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path}: not a readable yml file ({error})") from None
    if not isinstance(loaded, omegaconf.DictConfig):
        raise ConfigError(f"{path}: a config file holds `key: value` lines")
    return loaded


def merged_flag(base: omegaconf.DictConfig, user: dict[str, Any], key: str) -> bool:
    return str(user.get(key, base[key])).lower() == "true"


def resolved_keys(base: omegaconf.DictConfig, user: omegaconf.DictConfig) -> dict[str, Any]:
    """The user's keys with their interpolations, which may name keys of `base`, filled in."""
    try:
        everything = omegaconf.OmegaConf.merge(keys_named_by(base, user), user)
        found: Any = omegaconf.OmegaConf.to_container(everything, resolve=True)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from None
    return {str(key): found[key] for key in user}


def absolute(path: str) -> str:
    """A local path from the root; a path with a scheme (gs://) as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
