"""Runs of the trainer that tests share: `python MaxText/train.py configs/smoke.yml key=value ...`, as typed.

The engine takes some fifteen seconds to import. A server imports it once, before any device is touched, and each run
is a fork of it: a process of its own, with arguments, environment and exit status of its own. What one process
compiles the others need not: they share a cache. Unless XLA_FLAGS says otherwise, LLVM does not optimise: programs are
small, and few run often enough to win back what that takes. (`make test-fast` has it optimise, as users do.)
"""

import atexit
import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from voice import unknown_lines

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = str(ROOT / "configs/smoke.yml")

Rows = list[dict[str, Any]]
RUN = itertools.count()

# Before jax reads them. Test workers have their parent's.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# What a run imports.
ENGINE = [
    "maxtext.trainers.pre_train.train",
    "MaxText.train",
    "MaxText.loop.header",
    "MaxText.loop.metrics",
    "MaxText.loop.step",
    "MaxText.models.student",
    "MaxText.models.teacher",
]


class Result:
    """What a run left: its exit status, its output and the rows of its metrics file."""

    def __init__(self, status: int, output: str, folder: pathlib.Path):
        self.status = status
        self.output = output
        self.folder = folder

    def rows(self, prefix: str = "learning/") -> Rows:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if any(key.startswith(prefix) for key in row)]

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows(name.split("/")[0] + "/")]


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def run_here(program: list[str], arguments: list[str], output: str, variables: dict[str, str]) -> None:
    """Is `python <program> <arguments>` in a process that has just been forked."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    sys.argv = [program[-1], *arguments]
    try:
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    finally:  # multiprocessing leaves without them
        atexit._run_exitfuncs()


@contextlib.contextmanager
def started(program: list[str], arguments: list[str], output: pathlib.Path, devices: int = 1) -> Iterator[Any]:
    """A program under way, which is killed if it is still there at the end: a script, or `-m` and a module."""
    assert len(program) == 1 or (len(program) == 2 and program[0] == "-m"), program
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(ENGINE)
    process = server.Process(target=run_here, args=(program, arguments, str(output), environment(devices)))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def execute(program: list[str], arguments: list[str], folder: pathlib.Path, devices: int = 1) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"output{next(RUN)}.txt"
    with started(program, arguments, output, devices) as process:
        process.join(600)
        assert process.exitcode is not None, f"still running after 10 minutes:\n{output.read_text()[-4000:]}"
        return Result(process.exitcode, output.read_text(), folder)


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """train(name, key=value, ..., devices=1, program=ours): a run that must succeed, in a folder of its own."""
    base = tmp_path_factory.mktemp("runs")

    def run(name: str, devices: int = 1, program: tuple[str, ...] = ("MaxText/train.py",), **keys: Any) -> Result:
        keys = {"run_name": name, "base_output_directory": base} | keys
        arguments = [SMOKE, *(f"{key}={value}" for key, value in keys.items())]
        result = execute(list(program), arguments, base / name, devices)
        assert result.status == 0, result.output[-4000:]
        if program == ("MaxText/train.py",) and "log_config" not in keys:
            assert not unknown_lines(result.output), result.output
        return result

    return run


@pytest.fixture(scope="session")
def teacher(train: Callable[..., Result]) -> str:
    """The `checkpoints` folder of a trained tiny teacher."""
    return str(train("teacher", init_weights_seed=7).folder / "checkpoints")
