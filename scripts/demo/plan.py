"""The demo's runs: their commands and settings, what they left, and what decides their outcome."""

import functools
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from results import Rows, summary

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs/demo"
PYTHON = sys.executable.removeprefix(f"{ROOT}/")  # .venv/bin/python, where it is the project's own


@dataclass(frozen=True)
class Run:
    """One training run: its folder under runs/demo, its line in the table, its config and command-line overrides."""

    name: str
    title: str
    config: str
    overrides: tuple[str, ...] = ()
    program: str = "MaxText/train.py"

    @property
    def folder(self) -> Path:
        return OUT / self.name

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
        files = [OmegaConf.load(ROOT / path) for path in ("configs/demo/common.yml", self.config)]
        merged = OmegaConf.merge(*files, OmegaConf.from_dotlist(list(self.overrides)))
        return cast(dict[str, Any], OmegaConf.to_container(merged))


class Caching(Run):
    """The teacher's targets, computed once: the run's folder is the cache."""

    @property
    def is_there(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def outcome(self) -> str:
        found = json.loads((self.folder / "manifest.json").read_text())["splits"]["train"]
        return f"{found['tokens']:,} tokens of {found['rows']:,} rows, {found['bytes_per_token']:.0f} bytes each"


def student(name: str, title: str, alpha: int, *overrides: str) -> Run:
    return Run(name, title, "configs/demo/student.yml", (f"run_name={name}", f"kd_alpha={alpha}", *overrides))


SMALL = "grain_train_files=runs/demo/corpus/train_small.arrayrecord"
TEACHER = Run("teacher", "teacher", "configs/demo/teacher.yml")
STUDENT_CE = student("student_ce", "CE student", 0)
STUDENT_KD = student("student_kd", "KD student", 1)
SMALL_CE = student("small_ce", "CE student", 0, SMALL)
SMALL_KD = student("small_kd", "KD student", 1, SMALL)
# The rows that the students read, and those of the evaluations.
ROWS = "kd_cache_rows=2400"
CACHE = Caching(
    "cache", "cache", STUDENT_KD.config, ("kd_cache_path=runs/demo/cache", ROWS), "MaxText/cache_teacher.py"
)
STUDENT_CACHED = student("student_cached", "KD from cache", 1, "kd_cache_path=runs/demo/cache")
RUNS = (TEACHER, STUDENT_CE, STUDENT_KD, SMALL_CE, SMALL_KD, CACHE, STUDENT_CACHED)


def trainer_identity() -> str:
    """Changes with the trainer's source: runs of two versions must never stand in one table."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "MaxText").rglob("*")):
        if path.suffix in (".py", ".yml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(run: Run, sources: list[str]) -> str:
    """Changes with whatever decides the outcome of `run`: its settings, `sources`, and those of what it learns from.

    `sources` are the identities of the corpus and of the trainer.
    """
    before = {TEACHER.name: [], STUDENT_CACHED.name: [TEACHER, CACHE]}.get(run.name, [TEACHER])
    settings = [each.settings for each in (run, *before)]
    return hashlib.sha256(json.dumps([settings, sources], sort_keys=True).encode()).hexdigest()


def read_metrics(run: Run) -> Rows:
    """The rows of the run's metrics file so far."""
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what follows the last newline is half a row
    return [json.loads(line) for line in lines]
