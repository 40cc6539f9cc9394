"""Compares runs: one page of curves and tables, to be opened in any browser, and the curves as PNG files.

    python scripts/compare_runs.py runs/student_ce runs/student_kd_* --out report

A RUN is a run's folder or its metrics file. Runs whose settings are equal but for the seed are one curve: their mean,
with a band from the lowest to the highest. Loss is drawn against steps and against the FLOPs spent, the teacher's
included, so that distillation and plain training can be compared at equal compute. What is read, and how it is
computed: docs/reports.md. Left out on purpose: smoothing beyond means over neighbouring steps.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from MaxText import console
from MaxText.reports import page
from MaxText.reports.compare import compare
from MaxText.reports.run_records import RecordError


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="docs/reports.md says what is read and how it is computed.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its metrics file")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder for index.html and *.png (default: report)"
    )
    given = parser.parse_args(arguments)
    if len(set(given.runs)) < len(given.runs):
        parser.error(f"{max(given.runs, key=given.runs.count)}: is named twice")
    with console.errors_as_lines(failed=RecordError):
        report = compare(given.runs)
        file = page.write(given.out, report)
    output = Console(highlight=False, markup=False, soft_wrap=True)
    for note in report.notes:
        output.print(f"note: {note}")
    output.print(f"{file}: {len(given.runs)} runs, {len(report.charts)} charts, each a PNG file beside it too")


if __name__ == "__main__":
    main(sys.argv[1:])
