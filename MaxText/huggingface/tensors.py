"""The tensors of a Hugging Face model as they lie on disk: which there are, and what each of them is."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors
from etils import epy

from MaxText.checkpoints.stacked_arrays import Shape
from MaxText.config.keys import ConfigError
from MaxText.console import first_line
from MaxText.huggingface.weights import PREFIXES, spellings

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
TABLE = "model.embed_tokens.weight"
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
SLAB = 1 << 24  # numbers of a tensor that are compared at once


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as it lies on disk."""

    file: pathlib.Path
    name: str
    shape: Shape

    def read(self) -> np.ndarray:
        with safetensors.safe_open(self.file, framework="np") as file:
            return file.get_tensor(self.name).astype(np.float32, copy=False)

    def same(self, other: Tensor) -> bool:
        """Whether the other has the same numbers; of both, a slab at a time is in memory."""
        if self.shape != other.shape:
            return False
        with (
            safetensors.safe_open(self.file, framework="np") as file,
            safetensors.safe_open(other.file, framework="np") as beside,
        ):
            if not self.shape:
                return bool(file.get_tensor(self.name) == beside.get_tensor(other.name))
            a, b = file.get_slice(self.name), beside.get_slice(other.name)
            rows = max(1, SLAB // max(1, math.prod(self.shape[1:])))
            slabs = [slice(i, min(i + rows, self.shape[0])) for i in range(0, self.shape[0], rows)]
            return all(np.array_equal(a[slab], b[slab]) for slab in slabs)


def stored_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """Name -> tensor, for every one in the folder, from the heads of its files alone.

    Raises:
      ConfigError: there are none, or one that the index names is not there, or there are two models.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WHOLE).is_file():
            raise ConfigError(f"--hf {str(folder)!r}: no {WHOLE} and no index of several files")
        return tensors_of(folder / WHOLE)
    try:
        where = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: cannot be read ({first_line(error)})") from error
    missing = sorted({file for file in where.values() if not (folder / file).is_file()})
    if missing:
        raise ConfigError(f"{index}: names files that are not there: {', '.join(missing)}")
    files = {file: tensors_of(folder / file) for file in sorted(set(where.values()))}
    lost = sorted(name for name, file in where.items() if name not in files[file])
    if lost:
        raise ConfigError(f"{index}: names tensors that are not there: {', '.join(lost[:5])}")
    found = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    found |= {name: files[file][name] for name, file in where.items()}
    if (folder / WHOLE).is_file() and WHOLE not in files:
        beside = tensors_of(folder / WHOLE)
        other = [name for name in sorted(found.keys() | beside.keys()) if not same(found.get(name), beside.get(name))]
        if other:
            raise ConfigError(
                f"{folder / WHOLE} and {index}: two models, which are not the same ({other[0]} for one); "
                "leave one of them here"
            )
    return found


def tensors_of(file: pathlib.Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            names = opened.keys()
            return {name: Tensor(file, name, tuple(opened.get_slice(name).get_shape())) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: cannot be read ({first_line(error)})") from error


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.same(b)


def with_its_head(
    config: transformers.PreTrainedConfig, stored: dict[str, Tensor]
) -> tuple[transformers.PreTrainedConfig, dict[str, Tensor]]:
    """The configuration and the tensors as transformers takes them, which does not tie whatever config.json ties.

    Of a table of embeddings and a head that are to be one the one that is stored is both. Where both are stored and
    differ, config.json is wrong: they are not tied.
    """
    table = next((name for name in spellings(PREFIXES[0] + TABLE.removeprefix("model.")) if name in stored), None)
    head = next((name for name in HEADS if name in stored), None)
    if not config.tie_word_embeddings or head is None:
        return config, stored
    rest = {name: tensor for name, tensor in stored.items() if name != head}
    if table is None:
        return config, rest | {TABLE: stored[head]}
    if stored[table].same(stored[head]):
        return config, rest
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config, stored


def locate(names: set[str], expected: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name in MaxText's tables -> tensor.

    Args:
      names: those that the model needs.
      expected: name -> shape, as config.json has it.
      stored: name on disk -> tensor.

    Raises:
      ConfigError: a tensor is missing, or has another shape.
    """
    found: dict[str, Tensor] = {}
    problems = []
    for name in sorted(names):
        spelling = next((other for other in spellings(name) if other in stored), None)
        if spelling is None:
            problems.append(f"  {name}: not there")
        elif stored[spelling].shape != tuple(expected[name]):
            shape = stored[spelling].shape
            problems.append(f"  {spelling}: {shape} stored, config.json makes it {tuple(expected[name])}")
        else:
            found[name] = stored[spelling]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError("the weights are not those of config.json:\n" + "\n".join(problems[:5]) + more)
    return found


def unused(stored: dict[str, Tensor], used: Iterable[Tensor]) -> list[str]:
    """The tensors of the language model that nothing was made of; transformers, too, only names them.

    Left out: what else a model that sees is made of, and tables of angles, which early models stored.
    """
    taken = set(used)
    prefix = next((start for start in PREFIXES if any(tensor.name.startswith(start) for tensor in taken)), "")
    sees = prefix != PREFIXES[-1]
    left = (tensor.name for tensor in stored.values() if tensor not in taken)
    own = (name for name in left if not sees or name.startswith(prefix) or name in HEADS)
    return sorted(name for name in own if not name.endswith("rotary_emb.inv_freq"))
