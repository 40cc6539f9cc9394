"""The tables over groups of runs: where they ended, at equal compute too, and the settings that differ."""

import itertools
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.ticker import EngFormatter

from MaxText.reports.groups import NOT_RECORDED, SEEDS, Group, comparable
from MaxText.reports.page import Table


def shown(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean, and the lowest and highest of several runs that differ."""
    if not values:
        return "–"
    text, low, high = (form(of(values)) for of in (statistics.fmean, min, max))
    return text if low == high else f"{text} ({low} to {high})"


def equal_compute(groups: Sequence[Group]) -> float | None:
    """The largest compute, in FLOPs, up to which every group was evaluated."""
    ends = [max((group.flops[step] for step in evaluated(group)), default=None) for group in groups]
    return min(end for end in ends if end is not None) if ends and None not in ends else None


def evaluated(group: Group) -> list[int]:
    """The evaluated steps whose compute is known."""
    return [step for step in group.common("evaluation/ce_loss")[0] if step in group.flops]


def at_compute(group: Group, flops: float) -> list[float]:
    """Each run's held-out cross-entropy at this compute, on the line between the evaluations around it."""
    steps = evaluated(group)
    spent = [group.flops[step] for step in steps]
    if not steps or flops < spent[0]:
        return []
    return [
        float(np.interp(flops, spent, [run.series("evaluation/ce_loss")[step] for step in steps])) for run in group.runs
    ]


def results(groups: Sequence[Group], per_device: bool) -> Table:
    """A row per group: where it ended, how fast it was and what it cost."""
    nats, percent, count = "{:.4f}".format, "{:.1%}".format, "{:,.0f}".format
    suffix = " a device" if per_device else ""
    columns: dict[str, Callable[[Group], str]] = {
        "runs": lambda each: str(len(each.runs)),
        "steps": lambda each: shown([max(run.series("learning/loss"), default=-1) + 1 for run in each.runs], count),
        "CE": lambda each: shown(each.last("evaluation/ce_loss"), nats),
        "perplexity": lambda each: shown(each.last("evaluation/perplexity"), "{:.2f}".format),
        "KL (T = 1)": lambda each: shown(each.last("evaluation/kl_t1"), nats),
        "agreement": lambda each: shown(each.last("evaluation/top1_agreement"), percent),
        "kept mass": lambda each: shown(each.last("evaluation/kd_kept_mass"), percent),
        f"tokens/s{suffix}": lambda each: shown(each.tokens_per_second, count),
        f"student, a step{suffix}": lambda each: flops_text(flops_per_step(each)[0]),
        f"teacher, a step{suffix}": lambda each: flops_text(flops_per_step(each)[1]),
        f"both, a step{suffix}": lambda each: flops_text(flops_per_step(each)[2]),
        f"compute{suffix}": lambda each: flops_text(max(each.flops.values(), default=None)),
    }
    watched: dict[str, tuple[str, Callable[[Group], str]]] = {
        "MFU": ("perf/mfu_percent", lambda each: shown(each.speed("perf/mfu_percent"), "{:.1f} %".format)),
        "peak memory a device": (
            "perf/peak_memory_gb",
            lambda each: shown(each.last("perf/peak_memory_gb"), "{:.2f} GB".format),
        ),
    }
    for title, (metric, cell) in watched.items():
        if any(each.last(metric) for each in groups):  # CPUs tell neither
            columns[title] = cell
    budget = equal_compute(groups)
    if budget is not None and len(groups) > 1:
        columns[f"CE at {flops_text(budget)}"] = lambda each: shown(at_compute(each, budget), nats)
    note = (
        "The last evaluation of each run; of several runs the mean, and the lowest to the highest. CE and KL in nats "
        "per token. Compute is that of all training steps, without evaluations."
    )
    rows = [[each.label, *(cell(each) for cell in columns.values())] for each in groups]
    return Table("Results", note, ["", *columns], rows)


def flops_text(flops: float | None) -> str:
    return NOT_RECORDED if flops is None else EngFormatter(unit="FLOP", places=2)(flops) if flops else "0"


def flops_per_step(group: Group) -> tuple[float | None, float | None, float | None]:
    """FLOPs of one training step of the student, of the teacher and of both; None where it is not known."""
    run, scale = group.runs[0], 1e12 * group.devices
    both, teacher = list(run.series("perf/per_device_tflops").values()), run.teacher_tflops_per_device
    if not both or teacher is None:
        return None, None, both[-1] * scale if both else None
    return (both[-1] - teacher) * scale, teacher * scale, both[-1] * scale


def differences(groups: Sequence[Group]) -> Table:
    """A row per setting that differs, those of the distillation first."""
    keys = sorted({key for each in groups for run in each.runs for key in comparable(run)})
    keys.sort(key=lambda key: not key.startswith(("use_kd", "kd_", "teacher")))
    rows = []
    for key in [*keys, *SEEDS]:
        values = [list(dict.fromkeys(run.settings.get(key, NOT_RECORDED) for run in each.runs)) for each in groups]
        if len(set(itertools.chain(*values)) - {NOT_RECORDED}) > 1:
            rows.append([key, *(", ".join(found) for found in values)])
    note = "As the runs recorded them. Names and places of runs are left out."
    return Table("Settings that differ", note, ["", *(each.label for each in groups)], rows)
