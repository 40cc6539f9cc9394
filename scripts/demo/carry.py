"""A demo's runs: their commands and settings, what they left, and how they are made, gone on with or kept."""

import functools
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from results import Rows, summary
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable.removeprefix(f"{ROOT}/")  # .venv/bin/python, where it is the project's own


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      name: of its folder under `out`.
      title: its line in the table.
      config: its yml file.
      overrides: its command line.
      out: the demo's folder.
      after: the runs whose outcome decides this one's.
    """

    name: str
    title: str
    config: str
    overrides: tuple[str, ...] = ()
    program: str = "MaxText/train.py"
    out: Path = ROOT / "runs/demo"
    after: tuple["Run", ...] = ()

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def log(self) -> Path:
        """Beside the folders: that of a cache holds nothing else."""
        return self.out / f"{self.name}.log"

    @property
    def command(self) -> list[str]:
        """The command, as typed in the repository's root."""
        return [PYTHON, self.program, self.config, *self.overrides]

    @property
    def is_there(self) -> bool:
        """Whether what it left is."""
        return any((self.folder / "checkpoints").glob("*/items")) and bool(read_metrics(self))

    def outcome(self) -> str:
        return f"held-out cross-entropy {summary(read_metrics(self))['ce']:.3f}"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The keys that this run sets on top of MaxText/configs/base.yml."""
        merged = OmegaConf.merge(*layers(ROOT / self.config), OmegaConf.from_dotlist(list(self.overrides)))
        return cast(dict[str, Any], OmegaConf.to_container(merged))


class Caching(Run):
    """The teacher's targets, computed once: the run's folder is the cache."""

    @property
    def is_there(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def outcome(self) -> str:
        found = json.loads((self.folder / "manifest.json").read_text())["splits"]["train"]
        return f"{found['tokens']:,} tokens of {found['rows']:,} rows, {found['bytes_per_token']:.0f} bytes each"


def layers(path: Path) -> list[DictConfig]:
    """The yml file and those beside it that its base_config leads to, the lowest first."""
    loaded = cast(DictConfig, OmegaConf.load(path))
    beneath = path.with_name(loaded.base_config)
    return [*(layers(beneath) if beneath.exists() else []), loaded]


def trainer_identity() -> str:
    """Changes with the trainer's source: runs of two versions must never stand in one table."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "MaxText").rglob("*")):
        if path.suffix in (".py", ".yml"):
            found.update(path.read_bytes())
    return found.hexdigest()


def fingerprint(run: Run, sources: list[str]) -> str:
    """Changes with whatever decides the outcome of `run`: its settings, `sources`, and those of what it learns from.

    `sources` are the identities of the corpus and of the trainer.
    """
    before = [fingerprint(other, []) for other in run.after]
    return hashlib.sha256(json.dumps([run.settings, before, sources], sort_keys=True).encode()).hexdigest()


def read_metrics(run: Run) -> Rows:
    """The rows of the run's metrics file so far."""
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what follows the last newline is half a row
    return [json.loads(line) for line in lines]


def launch(run: Run, console: Console) -> int:
    """Runs the command of `run`, its output in its log and a bar on a terminal. Returns the exit status."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    with (
        run.log.open("a") as log,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        process = subprocess.Popen(run.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        task = bar.add_task("", total=run.settings.get("steps"), loss="starting")
        try:
            while process.poll() is None:
                time.sleep(0.5)
                rows = [row for row in read_metrics(run) if "learning/loss" in row]
                if rows:
                    bar.update(task, completed=rows[-1]["step"] + 1, loss=f"loss {rows[-1]['learning/loss']:.3f}")
        finally:
            process.terminate()
            process.wait()
    return process.returncode


def carry_out(run: Run, sources: list[str], console: Console) -> float:
    """Makes `run`, or goes on with it, or keeps it where it is finished. Returns its seconds, all calls together."""
    console.print(f"\n[bold]{run.name}[/]  $ {shlex.join(run.command)}")
    state_path, identity = run.out / f"{run.name}.json", fingerprint(run, sources)
    state = json.loads(state_path.read_text()) if state_path.exists() else {}
    if state.get("fingerprint") != identity:
        shutil.rmtree(run.folder, ignore_errors=True)
        state = {"fingerprint": identity, "seconds": 0.0, "finished": False}
    if state["finished"] and run.is_there:
        console.print("finished earlier and kept")
        return state["seconds"]

    state_path.write_text(json.dumps(state))
    start, status = time.monotonic(), 1
    try:
        status = launch(run, console)
    finally:
        state |= {"seconds": state["seconds"] + time.monotonic() - start, "finished": status == 0}
        state_path.write_text(json.dumps(state))
    if status:
        console.print("\n".join(run.log.read_text().splitlines()[-20:]), markup=False)
        sys.exit(f"{run.name} failed with status {status}; the whole log is {run.log.relative_to(ROOT)}")
    console.print(f"{state['seconds']:.0f} s, {run.outcome()}")
    return state["seconds"]
