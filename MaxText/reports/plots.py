"""Draws the points of a sweep beside each other (scripts/sweep.py)."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

MEAN, SEED = "#d1495b", "#8c8c8c"


def plot_sweep(points: dict[str, list[dict[str, Any]]], columns: dict[str, str], path: Path) -> None:
    """Writes a PNG: for each column a panel, in it a line per point with every seed, their mean and its deviation.

    Args:
      points: label -> the last evaluation of each of its seeds; a point without any is left out.
      columns: heading -> name of a metric.
      path: of the PNG.
    """
    shown = {label: rows for label, rows in points.items() if rows}
    figure = Figure(figsize=(4 * len(columns) + 2, 1.2 + 0.28 * len(shown)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (heading, metric) in zip(panels, columns.items(), strict=True):
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
