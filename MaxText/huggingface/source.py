"""A Hugging Face model's folder: fetched, its configuration read."""

from __future__ import annotations

import pathlib

import huggingface_hub
from etils import epy

from MaxText.config.keys import ConfigError
from MaxText.console import first_line
from MaxText.huggingface import tokenizer

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

WEIGHTS = "*.safetensors"


def fetch(hf: str) -> pathlib.Path:
    """The model's folder: `hf` itself, or the hub's model of that name in Hugging Face's cache, fetched as needed."""
    folder = pathlib.Path(hf).expanduser()
    if folder.is_dir():
        return folder
    if hf.count("/") > 1 or hf.startswith((".", "~", "/")) or folder.exists():
        raise ConfigError(f"--hf {hf!r}: no such folder")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hf, allow_patterns=[WEIGHTS, "*.json", *tokenizer.FILES]))
    except Exception as error:  # of the hub's own kinds, of its connection's, of the disk's
        reason = first_line(error)
        raise ConfigError(
            f"--hf {hf!r}: no such folder, and as a model on the hub it cannot be fetched ({reason})"
        ) from error


def read_config(folder: pathlib.Path) -> transformers.PreTrainedConfig:
    """The model's configuration; of a model that sees, the one of its language model."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--hf {str(folder)!r}: no config.json in it")
    try:
        return transformers.AutoConfig.from_pretrained(folder).get_text_config()
    except Exception as error:  # a model_type that transformers does not know, or values that it refuses
        raise ConfigError(f"{folder / 'config.json'}: {first_line(error)}") from error


def source_files(folder: pathlib.Path) -> dict[str, list[int]]:
    """Name -> size and time of change of the model's files: an interrupted conversion goes on with the same alone."""
    stats = {path.name: path.stat() for pattern in (WEIGHTS, "*.json") for path in sorted(folder.glob(pattern))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
