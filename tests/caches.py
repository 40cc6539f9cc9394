"""Caches of a tiny teacher's targets, made and read in the test's own process."""

import contextlib
import importlib
import io
import pathlib
from typing import Any

import absl.flags
import numpy as np
from conftest import ENGINE, SMOKE

from MaxText import cache_teacher, upstream
from MaxText.cache import reading, row
from MaxText.config import resolve
from MaxText.data import cached, pipelines

PROGRAM = ["MaxText/cache_teacher.py"]
VOCABULARY = 256  # of tiny-llama
WHOLE: dict[str, Any] = {"kd_cache_mode": "top_k", "kd_top_k": VOCABULARY}


def arguments(keys: dict[str, Any], folder: pathlib.Path) -> list[str]:
    keys = {"base_output_directory": folder, "run_name": "run"} | keys
    return [SMOKE, *(f"{key}={value}" for key, value in keys.items())]


def write(folder: pathlib.Path, keys: dict[str, Any], **more: Any) -> tuple[int, str]:
    """Status and output of the program that writes, or compares, the cache in `folder`; what it raises goes on."""
    for module in ENGINE:  # which greet, once
        importlib.import_module(module)
    if not absl.flags.FLAGS.is_parsed():  # as app.run does; grain looks
        absl.flags.FLAGS(["cache_teacher.py"])
    line = arguments(keys | {"kd_cache_path": folder} | more, folder.parent)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = cache_teacher.main(["cache_teacher.py", *line])
    return status, output.getvalue()


def students(keys: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """The keys of a run that learns from the cache in `folder`: neither teacher nor files are named."""
    own = {key: value for key, value in keys.items() if key != "kd_teacher_parameters_path" and "_files" not in key}
    return own | {"use_kd": "true", "kd_cache_path": folder}


def rows(folder: pathlib.Path, split: str = "train") -> list[row.Row]:
    return list(reading.rows(folder, split))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def opened(folder: pathlib.Path, keys: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """The iterators of a run on the cache, for training and evaluation."""
    line = ["train.py", *arguments(students(keys, folder) | more, folder.parent)]
    run = resolve.initialize(line)
    found = cached.find(run.student, run.kd)
    mesh = upstream.maxtext_utils.get_mesh_from_config(run.student)
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS(["train.py"])
    with pipelines.mended(run.student), cached.read_instead(run.student, found):
        return upstream.input_pipeline_interface.create_data_iterator(run.student, mesh)


def read(folder: pathlib.Path, keys: dict[str, Any], **more: Any) -> list[dict[str, np.ndarray]]:
    """The batches that a run on the cache trains on, to the end of its data."""
    return [{name: np.asarray(array) for name, array in batch.items()} for batch in opened(folder, keys, **more)[0]]
