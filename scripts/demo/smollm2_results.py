"""What the students of SmolLM2-135M came to, and what they cost: a table over seeds, and curves.

FLOPs are MaxText's count from the models' shapes, as the runs record it, of all positions of a batch. The teacher's are
counted for whoever learns from it, as if its targets had been made for that student alone: a forward pass over each
row, live or stored, and over the rows that a cut was chosen by. Evaluations are not counted.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from carry import read_metrics
from matplotlib.figure import Figure
from results import Rows
from rich.table import Table
from smollm2_plan import BATCH, LENGTH, Student

POSITIONS = BATCH * LENGTH  # of a step


@dataclass(frozen=True)
class Outcome:
    """What a run measured.

    Attributes:
      student: the run.
      steps: where it was evaluated, counted from 1.
      flops: what had been spent by then, the teacher's included.
      ce: held-out cross-entropy, nats.
      kl: to the teacher at the end; None where it is not known.
      tokens: that it has learned from.
      of_student, of_teacher: FLOPs at the end.
      seconds: of its steps.
    """

    student: Student
    steps: list[int]
    flops: list[float]
    ce: list[float]
    kl: float | None
    tokens: int
    of_student: float
    of_teacher: float
    seconds: float


def teachers_flops(rows: Rows) -> float:
    """Of a forward pass over one position, by a run that had the teacher in its step."""
    return next(row["perf/per_device_teacher_tflops"] for row in rows if row.get("perf/per_device_teacher_tflops")) * (
        1e12 / POSITIONS
    )


def outcome(student: Student, rows: Rows, of_teacher: float) -> Outcome:
    """A run by its metrics, and by what a position costs the teacher."""
    trained = [row for row in rows if "learning/loss" in row]
    own = (trained[-1]["perf/per_device_tflops"] - trained[-1]["perf/per_device_teacher_tflops"]) * 1e12
    read, before = student.read_for * POSITIONS * of_teacher, student.read_before * LENGTH * of_teacher
    evaluated = [row for row in rows if "evaluation/ce_loss" in row]
    steps, count = [row["step"] + 1 for row in evaluated], len(trained)
    return Outcome(
        student,
        steps,
        [before + step * (own + read) for step in steps],
        [row["evaluation/ce_loss"] for row in evaluated],
        evaluated[-1].get("evaluation/kl_t1"),
        round(sum(row["learning/total_weights"] for row in trained)),
        count * own,
        before + count * read,
        sum(row["perf/step_time_seconds"] for row in trained),
    )


def outcomes(students: Sequence[Student]) -> dict[str, list[Outcome]]:
    """Title -> the outcomes of its seeds, by the metrics on disk."""
    rows = {student.name: read_metrics(student) for student in students}
    live = next(student.name for student in students if student.kind == "kd_full")
    of_teacher = teachers_flops(rows[live])
    found: dict[str, list[Outcome]] = {}
    for student in students:
        found.setdefault(student.title, []).append(outcome(student, rows[student.name], of_teacher))
    return found


def spread(values: Sequence[float | None], form: str) -> str:
    """The mean of the seeds, and the lowest and highest where they differ."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, low, high = (form.format(of(known)) for of in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def at_flops(found: Outcome, flops: float) -> float | None:
    """The cross-entropy at this compute, on the line between the evaluations around it; None where there are none."""
    inside = found.flops[0] <= flops <= found.flops[-1] * (1 + 1e-9)
    return float(np.interp(flops, found.flops, found.ce)) if inside else None


def tokens_to(found: Outcome, ce: float) -> float | None:
    """The tokens that it took to this cross-entropy, between evaluations; None where it never came there."""
    down = next((at for at, value in enumerate(found.ce) if value <= ce), None)
    if down is None:
        return None
    near = slice(max(down - 1, 0), down + 1)  # np.interp wants rising values
    return float(np.interp(-ce, np.negative(found.ce[near]), found.steps[near])) * found.tokens / found.steps[-1]


def cells(found: list[Outcome], budget: float, mark: float) -> dict[str, str]:
    """A line of the table."""
    last: Callable[[str], list[Any]] = lambda name: [getattr(each, name) for each in found]  # noqa: E731
    return {
        "CE": spread([each.ce[-1] for each in found], "{:.3f}"),
        f"CE at {budget / 1e12:.3g} TFLOP": spread([at_flops(each, budget) for each in found], "{:.3f}"),
        f"tokens to CE {mark:.2f}": spread([tokens_to(each, mark) for each in found], "{:,.0f}"),
        "KL to teacher": spread(last("kl"), "{:.3f}"),
        "tokens": spread(last("tokens"), "{:,.0f}"),
        "student, TFLOP": spread([each.of_student / 1e12 for each in found], "{:.1f}"),
        "teacher, TFLOP": spread([each.of_teacher / 1e12 for each in found], "{:.1f}"),
        "seconds": spread(last("seconds"), "{:.0f}"),
    }


def fresh_distilled(found: dict[str, list[Outcome]]) -> list[Outcome]:
    """The fresh students of stored draws, which the others are held to; without any, the first that there are."""
    by_kind = {seeds[0].student.kind: seeds for seeds in found.values()}
    return by_kind.get("kd_sampled", next(iter(found.values())))


def lines(found: dict[str, list[Outcome]]) -> dict[str, dict[str, str]]:
    held_to = fresh_distilled(found)
    budget, mark = held_to[0].flops[-1], statistics.fmean(each.ce[-1] for each in held_to)
    return {title: cells(seeds, budget, mark) for title, seeds in found.items()}


def table(found: dict[str, list[Outcome]], title: str) -> Table:
    view = Table(title=title, title_justify="left", title_style="bold")
    rows = lines(found)
    for heading in ("", *next(iter(rows.values()))):
        view.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for name, row in rows.items():
        view.add_row(name, *row.values())
    return view


def plot(found: dict[str, list[Outcome]], teacher: float, path: Path) -> None:
    """Writes a PNG: held-out cross-entropy against steps and against all FLOPs, a line a seed."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_steps, by_flops = figure.subplots(1, 2, sharey=True)
    for number, (title, seeds) in enumerate(found.items()):
        for seed, each in enumerate(seeds):
            style = {"color": f"C{number}", "marker": ".", "label": title if seed == 0 else None}
            by_steps.plot(each.steps, each.ce, **style)
            by_flops.plot(each.flops, each.ce, **style)
    for axes, heading in ((by_steps, "training steps"), (by_flops, "FLOPs, the teacher's counted")):
        axes.axhline(teacher, color="black", linestyle="--", label="teacher")
        axes.set_xscale("log")
        axes.set_xlabel(heading)
        axes.grid(alpha=0.3)
    by_steps.set_ylabel("held-out cross-entropy (nats)")
    by_steps.legend(fontsize="small")
    figure.savefig(path, dpi=120)
