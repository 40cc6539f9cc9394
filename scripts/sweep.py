"""Runs every point of a small grid, with several seeds each, one after another, and prints a table of means.

    python scripts/sweep.py configs/sweeps/alpha_temperature.yml [key=value ...]
    python scripts/sweep.py configs/sweeps/alpha_temperature.yml --xpk --cluster NAME --tpu-type v5litepod-16 ...

A run is one `python MaxText/train.py ...` in a folder <out>/<point>-seed<n>, with its output in train.log. Started
again, the sweep keeps the runs that are finished and goes on with the others where they stand. A run that fails is
reported at the end, with exit status 1, and stops no other. The table is also written to <out>/results.md, with every
seed drawn in <out>/results.png. The file's format: docs/sweeps.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from MaxText import console
from MaxText.config.files import ROOT
from MaxText.config.keys import ConfigError
from MaxText.reports import points
from MaxText.sweeps.folders import claim, last_evaluation, results, train
from MaxText.sweeps.grid import load, select


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
    output = Console(highlight=False, soft_wrap=True)
    left = [run for run in runs if not last_evaluation(run, args.out)]
    output.print(f"{len(runs)} runs, {len(runs) - len(left)} finished earlier")
    failures: list[str] = []
    for run in track(left, console=output, transient=True, disable=not output.is_terminal):
        output.print(f"{run.name}  $ {shlex.join(run.command(args.out))}", markup=False)
        failures += filter(None, [train(run, args.out)])
    output.print(points.table(results(runs, args.out)))
    reached = results(every, args.out)
    with (ROOT / args.out / "results.md").open("w") as file:
        Console(file=file, width=200).print(points.table(reached))
    points.plot(reached, ROOT / args.out / "results.png")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    with console.errors_as_lines(refused=ConfigError, hint="; the same command goes on from here"):
        sys.exit(main())
