"""Runs of the trainer that tests share: `python MaxText/train.py configs/smoke.yml key=value ...`, as typed."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = str(ROOT / "configs/smoke.yml")

Rows = list[dict[str, Any]]


class Result:
    """What a run left: its exit status, its output and the rows of its metrics file."""

    def __init__(self, process: subprocess.CompletedProcess, folder: pathlib.Path):
        self.status = process.returncode
        self.output = process.stdout
        self.folder = folder

    def rows(self, prefix: str = "learning/") -> Rows:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if any(key.startswith(prefix) for key in row)]

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows(name.split("/")[0] + "/")]


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def execute(program: list[str], arguments: list[str], folder: pathlib.Path, devices: int = 1) -> Result:
    process = subprocess.run(
        [sys.executable, *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(devices),
        timeout=600,
    )
    return Result(process, folder)


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """train(name, key=value, ..., devices=1, program=ours): a run that must succeed, in a folder of its own."""
    base = tmp_path_factory.mktemp("runs")

    def run(name: str, devices: int = 1, program: tuple[str, ...] = ("MaxText/train.py",), **keys: Any) -> Result:
        keys = {"run_name": name, "base_output_directory": base} | keys
        arguments = [SMOKE, *(f"{key}={value}" for key, value in keys.items())]
        result = execute(list(program), arguments, base / name, devices)
        assert result.status == 0, result.output[-4000:]
        return result

    return run


@pytest.fixture(scope="session")
def teacher(train: Callable[..., Result]) -> str:
    """The `checkpoints` folder of a trained tiny teacher."""
    return str(train("teacher", init_weights_seed=7).folder / "checkpoints")
