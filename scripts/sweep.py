"""Runs every point of a small grid, with several seeds each, one after another, and prints a table of means.

    python scripts/sweep.py configs/sweeps/alpha_temperature.yml [key=value ...]
    python scripts/sweep.py configs/sweeps/alpha_temperature.yml --xpk --cluster NAME --tpu-type v5litepod-16 ...

A run is one `python MaxText/train.py ...` in a folder <out>/<point>-seed<n>, with its output in train.log. Started
again, the sweep keeps the runs that are finished and goes on with the others where they stand. A run that fails is
reported at the end, with exit status 1, and stops no other. The table is also written to <out>/results.md, with every
seed drawn in <out>/results.png. The file's format: docs/sweeps.md.
"""

import argparse
import dataclasses
import fcntl
import fnmatch
import functools
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import omegaconf
import pydantic
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from MaxText.config.checks import check_kd, check_keys
from MaxText.config.files import load_layers, load_yml, resolved_keys
from MaxText.config.keys import ConfigError, config_class, describe
from MaxText.reports import plots

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable.removeprefix(f"{ROOT}/")
SEED_KEYS = ("init_weights_seed", "data_shuffle_seed")
COLUMNS = {"CE": "evaluation/ce_loss", "KL (T = 1)": "evaluation/kl_t1", "top-1 agreement": "evaluation/top1_agreement"}


load_layers = functools.cache(load_layers)  # a second each


class Sweep(pydantic.BaseModel, extra="forbid"):
    """A sweep file; docs/sweeps.md says what its keys mean."""

    config: str
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]]
    keys: dict[str, Any] = {}
    exclude: list[dict[str, Any]] = []
    seeds: list[int] = [0]


@dataclasses.dataclass(frozen=True)
class Run:
    """One point of the grid with one seed; `keys` is what the point sets."""

    point: str
    seed: int
    config: str
    keys: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.point}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={text(value)}" for key, value in (self.keys | dict.fromkeys(SEED_KEYS, self.seed)).items()]

    @property
    def settings(self) -> dict[str, Any]:
        return settings(self.config, tuple(f"{key}={text(value)}" for key, value in self.keys.items()))

    def command(self, out: Path) -> list[str]:
        metrics = f"metrics_file={out / self.name}/metrics.jsonl"
        places = [f"run_name={self.name}", f"base_output_directory={out}", metrics]
        return [PYTHON, "MaxText/train.py", self.config, *self.overrides, *places]

    def submission(self, options: Sequence[str]) -> list[str]:
        name = self.name.lower().replace(".", "-").replace("_", "-")  # as Kubernetes wants it
        named = [f"--config={self.config}", f"--workload={name}"]
        return [PYTHON, "scripts/submit_xpk.py", *options, *named, *self.overrides]


@functools.cache
def settings(config: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What yml files and overrides set, with the engine's defaults of what is read here."""
    defaults, files = load_layers(str(ROOT / config))
    user = omegaconf.OmegaConf.merge(files, omegaconf.OmegaConf.from_dotlist(list(overrides)))
    return {key: defaults[key] for key in ("steps", "eval_interval")} | resolved_keys(defaults, user)


def text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def load(path: Path, overrides: Sequence[str]) -> list[Run]:
    """The runs of a sweep file, in its order, with `overrides` in each.

    Raises:
      ConfigError: the file is not one, or the trainer would refuse a run.
    """
    keys = omegaconf.OmegaConf.to_container(load_yml(str(path)))
    if missing := {"config", "grid"} - keys.keys():
        raise ConfigError(f"{path}: is no sweep: no {' and no '.join(sorted(missing))} in it (docs/sweeps.md)")
    try:
        sweep = Sweep.model_validate(keys)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None
    common = sweep.keys | omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.from_dotlist(list(overrides)))
    runs = []
    for corner in itertools.product(*(axis(key, values) for key, values in sweep.grid.items())):
        keys = {key: value for _, part in corner for key, value in part.items()}
        if not any(excluded.items() <= keys.items() for excluded in sweep.exclude):
            point = "-".join(label for label, _ in corner)
            runs += [Run(point, seed, sweep.config, common | keys) for seed in sweep.seeds]
    check(path, runs)
    return runs


def axis(key: str, values: list[Any] | dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """An axis of the grid as (label, keys) of each of its values."""
    if isinstance(values, dict):
        return list(values.items())
    return [(f"{key.removeprefix('kd_')}{text(value)}", {key: value}) for value in values]


def check(path: Path, runs: list[Run]) -> None:
    schema, names = config_class(), [run.name for run in runs]
    for run in {run.point: run for run in runs}.values():
        try:
            check_keys(run.settings, schema)
            check_kd(run.settings)
            for key, why in (("steps", "whole numbers from 1 on"), ("eval_interval", "evaluations are compared")):
                if not isinstance(run.settings[key], int) or run.settings[key] <= 0:
                    raise ConfigError(f"{key}={run.settings[key]}: {why}")
            if names.count(run.name) > 1:
                raise ConfigError("two points or seeds have one name")
        except ConfigError as error:
            raise ConfigError(f"{path}: {run.point}: {error}") from None


def select(runs: list[Run], patterns: Sequence[str]) -> list[Run]:
    """Those whose name, or whose point's, matches a pattern; all where there is none."""
    if not patterns:
        return runs
    chosen = [run for run in runs if any(fnmatch.fnmatch(name, p) for name in (run.name, run.point) for p in patterns)]
    if not chosen:
        raise ConfigError(f"--only {' '.join(patterns)}: none of {', '.join(dict.fromkeys(r.point for r in runs))}")
    return chosen


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


def table(points: dict[str, list[dict[str, Any]]]) -> Table:
    """Mean and standard deviation over the seeds of each point."""
    view = Table(box=box.MARKDOWN)
    for heading in ("", "seeds", *COLUMNS):
        view.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for point, rows in points.items():
        view.add_row(point, str(len(rows)), *(spread([r[c] for r in rows if c in r]) for c in COLUMNS.values()))
    return view


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("sweep", type=Path, help="the sweep's yml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    parser.add_argument("--out", type=Path, help="default: runs/sweeps/<name of the file>")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a run or a point; * as in a shell")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--xpk", nargs=argparse.REMAINDER, help="print submissions; what follows are options of theirs")
    args = parser.parse_intermixed_args(argv)
    args.out = args.out.resolve() if args.out else Path("runs/sweeps") / args.sweep.stem
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    every = load(args.sweep, args.overrides)
    runs = select(every, args.only)
    if args.xpk is not None or args.dry_run:
        for run in runs:
            print(shlex.join(run.command(args.out) if args.xpk is None else run.submission(args.xpk)))
        return 0
    for run in runs:
        claim(run, args.out)
    console = Console(highlight=False, soft_wrap=True)
    left = [run for run in runs if not last_evaluation(run, args.out)]
    console.print(f"{len(runs)} runs, {len(runs) - len(left)} finished earlier")
    failures: list[str] = []
    for run in track(left, console=console, transient=True, disable=not console.is_terminal):
        console.print(f"{run.name}  $ {shlex.join(run.command(args.out))}", markup=False)
        failures += filter(None, [train(run, args.out)])
    console.print(table(results(runs, args.out)))
    points = results(every, args.out)
    with (ROOT / args.out / "results.md").open("w") as file:
        Console(file=file, width=200).print(table(points))
    plots.plot_sweep(points, COLUMNS, ROOT / args.out / "results.png")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
