"""The folder of a run of a sweep: claimed for its settings, trained in, read when the run is finished."""

import fcntl
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from MaxText.config.files import ROOT
from MaxText.config.keys import ConfigError
from MaxText.sweeps.grid import Run


def last_evaluation(run: Run, out: Path) -> dict[str, Any] | None:
    """The row of the evaluation after the last step; None while there is none."""
    path, last = ROOT / out / run.name / "metrics.jsonl", run.settings["steps"] - 1
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what follows the last newline is half a row
    return next((r for r in map(json.loads, lines) if r["step"] == last and "evaluation/ce_loss" in r), None)


def claim(run: Run, out: Path) -> None:
    """Notes in the run's folder what is run there, and refuses a folder where something else was."""
    path, wanted = ROOT / out / run.name / "sweep.json", json.dumps(run.settings, indent=2, sort_keys=True) + "\n"
    if path.exists() and path.read_text() != wanted:
        raise ConfigError(f"{path.parent}: holds a run with other settings: remove it, or set --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(wanted)
    unfinished.replace(path)


def train(run: Run, out: Path) -> str:
    """Runs it to its end -> what went wrong; "" for nothing."""
    log = out / run.name / "train.log"
    with (ROOT / log).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the trainer has it as well, should this process die
        except BlockingIOError:
            return f"{run.name}: another process trains in its folder"
        status = subprocess.run(run.command(out), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if status == 0 and last_evaluation(run, out):
        return ""
    return f"{run.name}: {f'status {status}' if status else 'ended before its last step'}, see {log}"


def results(runs: Sequence[Run], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Point -> the last evaluations of the seeds that are finished."""
    return {
        point: [row for run in runs if run.point == point and (row := last_evaluation(run, out))]
        for point in dict.fromkeys(run.point for run in runs)
    }
