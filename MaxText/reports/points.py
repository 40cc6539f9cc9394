"""The points of a sweep beside each other: a table of means, and a plot of every seed."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

COLUMNS = {"CE": "evaluation/ce_loss", "KL (T = 1)": "evaluation/kl_t1", "top-1 agreement": "evaluation/top1_agreement"}
MEAN, SEED = "#d1495b", "#8c8c8c"

Points = dict[str, list[dict[str, Any]]]  # label -> the last evaluation of each of its seeds


def table(points: Points) -> Table:
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


def plot(points: Points, path: Path) -> None:
    """Writes a PNG: for each column a panel, in it a line per point with every seed, their mean and its deviation.

    A point without any seed is left out.
    """
    shown = {label: rows for label, rows in points.items() if rows}
    figure = Figure(figsize=(4 * len(COLUMNS) + 2, 1.2 + 0.28 * len(shown)), layout="constrained")
    panels = figure.subplots(1, len(COLUMNS), sharey=True, squeeze=False)[0]
    for axes, (heading, metric) in zip(panels, COLUMNS.items(), strict=True):
        for place, rows in enumerate(shown.values()):
            values = [row[metric] for row in rows if metric in row]
            axes.plot(values, [place] * len(values), "o", color=SEED, markersize=4, alpha=0.7)
            if len(values) > 1:
                axes.errorbar(np.mean(values), place, xerr=np.std(values, ddof=1), fmt="|", color=MEAN, capsize=3)
        axes.set_title(heading)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(shown)), list(shown))
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
