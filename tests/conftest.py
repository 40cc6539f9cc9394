"""Runs of the trainer that tests share: `python MaxText/train.py configs/smoke.yml key=value ...`, as typed.

A run on one device is a call of the trainer in the test's own process, whose imports and small compiled programs serve
the next run too: it costs half of what a process does. Where the process itself is the matter (exit status, everything
that is written, signals, several devices) a run is one of its own. The engine takes some ten seconds to import, so a
server imports it once, before any device is touched, and each such process is a fork of it, with arguments,
environment and exit status of its own. What one process compiles the others need not: they share a cache. Unless
XLA_FLAGS says otherwise, LLVM does not optimise: programs are small, and few run often enough to win back what that
takes. (`make test-slow` has it optimise the loss, as users do.)
"""

import atexit
import contextlib
import fcntl
import importlib.util
import io
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
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import absl.flags
import pytest
from voice import unknown_lines

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = str(ROOT / "configs/smoke.yml")
TRAIN = ("MaxText/train.py",)
WITHOUT_LIBTPU = not getattr(importlib.util.find_spec("libtpu"), "origin", None)

# By products of matrices: the kernels for experts are a TPU's.
EXPERTS: dict[str, Any] = {"model_name": "deepseek3-mini", "sparse_matmul": "false", "megablox": "false"}

Rows = list[dict[str, Any]]
RUN = itertools.count()

# Before jax reads them. Test workers have their parent's.
QUICK = {
    "backend_optimization_level": 0,
    "llvm_disable_expensive_passes": "true",
    "cpu_parallel_codegen_split_count": 1,
}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}={value}" for flag, value in QUICK.items()))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as MaxText.upstream does, which not every test imports first
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network, which, where there is none, is asked for a minute
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


def few(default: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases of a law, of which those that are not default ones are in the long matrix."""
    each = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [case if case in default else pytest.param(*values, marks=pytest.mark.slow) for case, values in each]


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


def begin(output: str, variables: dict[str, str]) -> None:
    """What a shell does for a process before it runs."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    os.chdir(ROOT)


def run_here(program: list[str], arguments: list[str], output: str, variables: dict[str, str]) -> None:
    """Is `python <program> <arguments>` in a process that has just been forked."""
    begin(output, variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    sys.modules.pop("pytest", None)  # where it is imported, MaxText joins no cluster
    sys.argv = [program[-1], *arguments]
    try:
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    finally:  # multiprocessing leaves without them
        atexit._run_exitfuncs()


@contextlib.contextmanager
def forked(target: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[Any]:
    """A process with the engine in it, which is killed if it is still there at the end."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(ENGINE)
    process = server.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def started(program: list[str], arguments: list[str], output: pathlib.Path, devices: int = 1) -> Iterator[Any]:
    """A program under way: a script, or `-m` and a module."""
    assert len(program) == 1 or (len(program) == 2 and program[0] == "-m"), program
    with forked(run_here, (program, arguments, str(output), environment(devices))) as process:
        yield process


def execute(program: list[str], arguments: list[str], folder: pathlib.Path, devices: int = 1) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"output{next(RUN)}.txt"
    with started(program, arguments, output, devices) as process:
        process.join(600)
        assert process.exitcode is not None, f"still running after 10 minutes:\n{output.read_text()[-4000:]}"
        return Result(process.exitcode, output.read_text(), folder)


def call_here(function: Callable[..., None], arguments: Any, output: str, variables: dict[str, str]) -> None:
    """Is a call of `function` in a process that has just been forked."""
    begin(output, variables)
    function(*arguments)


def call_apart(function: Callable[..., None], *arguments: Any, devices: int, folder: pathlib.Path) -> None:
    """Calls a function of a module, which must return, in a process that sees so many devices."""
    output = folder / f"output{next(RUN)}.txt"
    with forked(call_here, (function, arguments, str(output), environment(devices))) as process:
        process.join(600)
        assert process.exitcode == 0, output.read_text()[-4000:]


def run_in_this_process(arguments: list[str], folder: pathlib.Path) -> Result:
    """`train.main` with these arguments; what it raises is the test's to see."""
    for module in ENGINE:  # which greet, once
        importlib.import_module(module)
    if not absl.flags.FLAGS.is_parsed():  # as app.run does; grain looks
        absl.flags.FLAGS(["train.py"])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        sys.modules["MaxText.train"].main(["train.py", *arguments])
    return Result(0, output.getvalue(), folder)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """once(name, make): the folder that make(folder) has filled, for the first of a session's workers that wants it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[pathlib.Path], Any]) -> pathlib.Path:
        folder, whole = shared / name, shared / f"{name}.made"
        with locked(shared / f"{name}.lock"):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                whole.touch()
        return folder

    return made


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """While no other process is in it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """train(name, key=value, ..., devices=1, program=None): a run that must succeed, in a folder of its own.

    It is called in this process unless it asks for devices or names a program, which get one of their own.
    """
    base = tmp_path_factory.mktemp("runs")

    def run(name: str, devices: int = 1, program: tuple[str, ...] | None = None, **keys: Any) -> Result:
        keys = {"run_name": name, "base_output_directory": base} | keys
        arguments, folder = [SMOKE, *(f"{key}={value}" for key, value in keys.items())], base / name
        if devices == 1 and program is None:
            result = run_in_this_process(arguments, folder)
        else:
            result = execute(list(program or TRAIN), arguments, folder, devices)
        assert result.status == 0, result.output[-4000:]
        if program in (None, TRAIN) and "log_config" not in keys:
            assert not unknown_lines(result.output), result.output
        return result

    return run


@pytest.fixture(scope="session")
def teacher(train: Callable[..., Result], once: Callable[..., pathlib.Path]) -> str:
    """The `checkpoints` folder of a trained tiny teacher."""
    runs = once("dense", lambda folder: train("teacher", init_weights_seed=7, base_output_directory=folder))
    return str(runs / "teacher/checkpoints")


@pytest.fixture(scope="session")
def experts(train: Callable[..., Result], teacher: str, once: Callable[..., pathlib.Path]) -> Result:
    """A mixture of experts that was distilled from the dense teacher: its routers' biases move at each step."""
    keys = EXPERTS | {"gradient_accumulation_steps": 2, "per_device_batch_size": 2, "use_kd": "true"}
    keys |= {"kd_teacher_model_name": "tiny-llama", "kd_teacher_parameters_path": teacher}
    runs = once("mixture", lambda folder: train("experts", **keys, base_output_directory=folder))
    return Result(0, "", runs / "experts")
