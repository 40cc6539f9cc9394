"""Draws the demo's curves from the metrics of its runs (scripts/demo/run.py)."""

from pathlib import Path
from typing import Any

from corpus import SMALL_ROWS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

History = list[dict[str, Any]]
STYLES = {"ce": ("CE only", "#8c8c8c", "o"), "kd": ("KD", "#d1495b", "s")}


def _draw(axes: Axes, histories: dict[str, History], prefix: str, metric: str) -> None:
    for kind, (label, color, marker) in STYLES.items():
        rows = [row for row in histories[f"{prefix}_{kind}"] if metric in row]
        axes.plot([row["step"] for row in rows], [row[metric] for row in rows], color=color, marker=marker, label=label)
    axes.set_xlabel("training steps of the student")
    axes.label_outer()
    axes.grid(alpha=0.3)


def plot(histories: dict[str, History], path: Path) -> None:
    """Writes a PNG: held-out cross-entropy and KL to the teacher over the students' steps, full and small data."""
    teacher = [row["evaluation/ce_loss"] for row in histories["teacher"] if "evaluation/ce_loss" in row][-1]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", sharex=True)
    for column, (prefix, title) in enumerate(
        {
            "student": "full data, the same rows for both",
            "small": f"small data ({SMALL_ROWS} rows), the same for both",
        }.items()
    ):
        cross_entropy, divergence = grid[0][column], grid[1][column]
        cross_entropy.set_title(title)
        _draw(cross_entropy, histories, prefix, "evaluation/ce_loss")
        cross_entropy.axhline(teacher, color="#30638e", linestyle="--", label="teacher")
        cross_entropy.legend()
        _draw(divergence, histories, prefix, "evaluation/kl_t1")
    grid[0][0].set_ylabel("held-out cross-entropy (nats)")
    grid[1][0].set_ylabel("KL to the teacher (nats)")
    figure.savefig(path, dpi=120)
