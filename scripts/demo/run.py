"""Pretrains a teacher, then the same student with and without it, on real text, and compares them on held-out files.

    make demo        2 CPU cores, 10 to 16 minutes, no network

One more student learns from the teacher's targets, computed once and kept. Everything lies under runs/demo: the
corpus, the cache, for each run its log, checkpoints and metrics.jsonl, and results.json and demo.png at the end.
Each run is one `python MaxText/...` command, printed before it starts. A second call keeps the runs whose settings,
corpus and trainer are unchanged and goes on with the one that was interrupted.
"""

import argparse
import json
import sys
import time

from carry import carry_out, read_metrics, trainer_identity
from corpus import build
from plan import CACHE, OUT, RUNS, SMALL_CE, SMALL_KD, STUDENT_CACHED, STUDENT_CE, STUDENT_KD, TEACHER
from plot import plot
from results import summary, table, verdict
from rich.console import Console

from MaxText.console import errors_as_lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console, start = Console(highlight=False, soft_wrap=True), time.monotonic()
    console.print("corpus: the standard library of this Python, split by file")
    corpus = build(OUT / "corpus")
    train_rows, small_rows = corpus["train"]["rows"], corpus["train_small"]["rows"]
    console.print(
        f"{train_rows:,} rows from {corpus['train']['files']} files to train on, {small_rows} of them as small data; "
        f"{corpus['eval']['rows']} rows from {corpus['eval']['files']} other files to evaluate"
    )
    sources = [corpus["identity"], trainer_identity()]
    seconds = {run.name: carry_out(run, sources, console) for run in RUNS}
    if trainer_identity() != sources[1]:
        sys.exit("MaxText/ was edited while the demo ran: its runs are not comparable; run it again")

    histories = {run.name: read_metrics(run) for run in RUNS if run is not CACHE}
    results = {name: summary(rows) for name, rows in histories.items()}
    read = {run.name: run.settings["steps"] * run.settings["per_device_batch_size"] for run in RUNS}
    cached = results[STUDENT_CACHED.name]
    same = verdict(*(results[run.name]["ce"] for run in (STUDENT_CE, STUDENT_KD, TEACHER)))
    small = verdict(*(results[run.name]["ce"] for run in (SMALL_CE, SMALL_KD, TEACHER)))
    seen = min(read["teacher"], train_rows)
    same_title = f"Same {min(read['student_kd'], train_rows):,} rows for all students (the teacher has read {seen:,})"
    small_title = f"Small data: {small_rows} rows, read {read['small_kd'] / small_rows:.1f} times"

    console.print()
    students = (TEACHER, STUDENT_CE, STUDENT_KD, STUDENT_CACHED)
    console.print(table(same_title, {run.title: results[run.name] for run in students}))
    console.print(same)
    console.print(
        f"From the cache, which took {seconds['cache']:.0f} s to make: {cached['ce']:.3f}, at "
        f"{cached['tokens_per_second'] / results['student_kd']['tokens_per_second']:.1f} times the speed."
    )
    console.print()
    console.print(table(small_title, {run.title: results[run.name] for run in (TEACHER, SMALL_CE, SMALL_KD)}))
    console.print(f"{small} This student learns from a teacher that saw {seen / small_rows:.0f} times more text.")

    plot(histories, OUT / "demo.png")
    report = {"corpus": corpus, "runs": results, "seconds": seconds, "same_rows": same, "small_data": small}
    (OUT / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(
        "\ncurves       runs/demo/demo.png\nnumbers      runs/demo/results.json\n"
        "checkpoints  runs/demo/<run>/checkpoints\nmetrics      runs/demo/<run>/metrics.jsonl\n"
        "cache        runs/demo/cache\nlogs         runs/demo/<run>.log\n"
        f"{time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    with errors_as_lines(hint="; the same command goes on from the last checkpoint"):
        main()
