"""The charts of groups of runs: a line per group, its mean, and a band from the lowest run to the highest.

Left out on purpose: smoothing beyond means over neighbouring steps.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from MaxText.reports.groups import Group
from MaxText.reports.page import Chart, Line

POINTS = 300  # a curve has no more: each is the mean over neighbouring steps


def thinned(values: np.ndarray, mean: Callable[[np.ndarray], float]) -> np.ndarray:
    """Along the last axis at most POINTS values, each the mean over as many neighbours; the last may be of fewer."""
    width = math.ceil(values.shape[-1] / POINTS)
    parts = [values[..., start : start + width] for start in range(0, values.shape[-1], width)]
    return np.stack([np.apply_along_axis(mean, -1, part) for part in parts], axis=-1)


def harmonic(values: np.ndarray) -> float:
    return len(values) / float(np.sum(1 / values))


def curve(
    group: Group, metric: str, against_flops: bool, mean: Callable[[np.ndarray], float] = np.mean, scale: float = 1.0
) -> Line | None:
    """The metric of a group over its steps or its FLOPs; None where either is not known."""
    steps, values = group.common(metric)
    flops = group.flops
    if against_flops:
        kept = [index for index, step in enumerate(steps) if step in flops]
        steps, values = [steps[index] for index in kept], values[:, kept]
    if not steps:
        return None
    values = thinned(values, mean) * scale
    width = math.ceil(len(steps) / POINTS)
    ends = [steps[min(start + width, len(steps)) - 1] for start in range(0, len(steps), width)]
    x = [flops[step] for step in ends] if against_flops else ends
    return Line(group.label, group.style, x, values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist())


EVALUATION = "On the evaluation data"
TRAINING = "On the training data, means over neighbouring steps"
NEVER_TRUNCATED = "Over the whole vocabulary at temperature 1, whatever the loss truncates: comparable across runs"
# slug, title, note, metric, label of the y axis, against FLOPs
CURVES = (
    ("ce", "Held-out cross-entropy", EVALUATION, "evaluation/ce_loss", "nats per token", False),
    ("ce_by_flops", "Held-out cross-entropy by compute", EVALUATION, "evaluation/ce_loss", "nats per token", True),
    ("kl", "KL to the teacher at T = 1", NEVER_TRUNCATED, "evaluation/kl_t1", "nats per token", False),
    ("kl_by_flops", "KL to the teacher by compute", NEVER_TRUNCATED, "evaluation/kl_t1", "nats per token", True),
    ("agreement", "Top-1 agreement with the teacher", EVALUATION, "evaluation/top1_agreement", "of the tokens", False),
    ("kept_mass", "Kept mass", TRAINING, "learning/kd_kept_mass", "of the teacher's probability", False),
    ("loss", "Training loss", f"{TRAINING}; of different kd_alpha these are different quantities", "learning/loss",
     "nats per token", False),
    ("loss_by_flops", "Training loss by compute", TRAINING, "learning/loss", "nats per token", True),
    ("train_ce", "Training cross-entropy", TRAINING, "learning/ce_loss", "nats per token", False),
    ("train_ce_by_flops", "Training cross-entropy by compute", TRAINING, "learning/ce_loss", "nats per token", True),
)  # fmt: skip


def charts_of(groups: Sequence[Group], per_device: bool) -> list[Chart]:
    """Every chart that at least one run has values for."""
    compute = "FLOPs of training, student and teacher" + (", per device" if per_device else "")
    charts = []
    for slug, title, note, metric, y_label, against_flops in CURVES:
        lines = [curve(group, metric, against_flops) for group in groups]
        reference = teachers_ce(groups) if metric == "evaluation/ce_loss" else {}
        charts.append(
            Chart(
                slug, title, note, compute if against_flops else "steps", y_label, [line for line in lines if line],
                unit="FLOP" if against_flops else "", percent=y_label.startswith("of "), reference=reference,
            )
        )  # fmt: skip
    speeds = [curve(group, "perf/per_device_tokens_per_sec", False, harmonic, group.devices) for group in groups]
    y_label = "tokens per second" + (" and device" if per_device else "")
    note = "All tokens by all seconds of neighbouring steps"
    charts.append(Chart("speed", "Speed", note, "steps", y_label, [line for line in speeds if line]))
    return [chart for chart in charts if chart.lines]


def teachers_ce(groups: Sequence[Group]) -> dict[str, float]:
    """The teacher's cross-entropy on the evaluation data, if all runs have one teacher."""
    values = [value for group in groups for value in group.last("evaluation/teacher_ce_loss")]
    one = bool(values) and math.isclose(min(values), max(values), rel_tol=1e-3)
    return {"teacher": statistics.fmean(values)} if one else {}
