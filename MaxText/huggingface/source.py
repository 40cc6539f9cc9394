"""A Hugging Face model's folder: fetched, its configuration read, its tensors and its tokenizer's files found."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import huggingface_hub
import safetensors
from etils import epath, epy

from MaxText.config.keys import ConfigError
from MaxText.console import first_line
from MaxText.huggingface.stacked_arrays import Shape
from MaxText.huggingface.weights import spellings

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

WEIGHTS = "*.safetensors"
TOKENIZER = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
             "vocab.*", "merges.txt", "*.model", "chat_template*")  # fmt: skip


def fetch(hf: str) -> pathlib.Path:
    """The model's folder: `hf` itself, or the hub's model of that name in Hugging Face's cache, fetched as needed."""
    folder = pathlib.Path(hf).expanduser()
    if folder.is_dir():
        return folder
    if hf.count("/") > 1 or hf.startswith((".", "~", "/")) or folder.exists():
        raise ConfigError(f"--hf {hf!r}: no such folder")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hf, allow_patterns=[WEIGHTS, "*.json", *TOKENIZER]))
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


def stored_tensors(folder: pathlib.Path) -> dict[str, Shape]:
    """Name -> shape of every tensor in the folder, from the heads of its files alone.

    Raises:
      ConfigError: there are none, or one that the index names is not there.
    """
    index = folder / "model.safetensors.index.json"
    try:
        where = json.loads(index.read_text())["weight_map"] if index.is_file() else None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{index}: cannot be read ({error})") from error
    files = sorted(set(where.values())) if where else ["model.safetensors"]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing and not where:
        raise ConfigError(f"--hf {str(folder)!r}: no model.safetensors and no index of several files")
    if missing:
        raise ConfigError(f"{index}: names files that are not there: {', '.join(missing)}")
    found: dict[str, Shape] = {}
    for file in files:
        try:
            with safetensors.safe_open(folder / file, framework="np") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"{folder / file}: cannot be read ({first_line(error)})") from error
    lost = sorted(set(where or ()) - set(found))
    if lost:
        raise ConfigError(f"{index}: names tensors that are not there: {', '.join(lost[:5])}")
    return found


def locate(names: set[str], expected: dict[str, Any], stored: dict[str, Shape]) -> dict[str, str]:
    """Name in MaxText's tables -> name on disk.

    Args:
      names: those that the model needs.
      expected: name -> shape, as config.json has it.
      stored: name on disk -> shape.

    Raises:
      ConfigError: a tensor is missing, or has another shape.
    """
    found: dict[str, str] = {}
    problems = []
    for name in sorted(names):
        spelling = next((other for other in spellings(name) if other in stored), None)
        if spelling is None:
            problems.append(f"  {name}: not there")
        elif stored[spelling] != tuple(expected[name]):
            problems.append(f"  {spelling}: {stored[spelling]} stored, config.json makes it {tuple(expected[name])}")
        else:
            found[name] = spelling
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError("the weights are not those of config.json:\n" + "\n".join(problems[:5]) + more)
    return found


def source_files(folder: pathlib.Path) -> dict[str, list[int]]:
    """Name -> size and time of change of the model's files: an interrupted conversion goes on with the same alone."""
    stats = {path.name: path.stat() for pattern in (WEIGHTS, "*.json") for path in sorted(folder.glob(pattern))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def copy_tokenizer(folder: pathlib.Path, target: epath.Path) -> None:
    target.mkdir(exist_ok=True)
    for pattern in TOKENIZER:
        for file in folder.glob(pattern):
            if file.is_file():
                (target / file.name).write_bytes(file.read_bytes())
