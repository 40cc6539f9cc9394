"""What is shown and written: the table, and the file with everything that was measured."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from MaxText.benchmarks.programs import Row
from MaxText.benchmarks.timing import compare

COLUMNS = ("", "N", "V", "block", "median s", "spread s", "x tiled CE", "temp MiB", "GFLOP", "TFLOP/s")


def cells(entry: dict[str, Any]) -> list[str]:
    """One entry of `compare` as the table's texts."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        entry["name"],
        str(entry["tokens"]),
        str(entry["vocabulary"]),
        number(entry["block"], "d"),
        number(entry["median_seconds"], ".4f"),
        number(entry["spread_seconds"], ".4f"),
        number(entry["to_tiled_ce"], ".2f"),
        f"{entry['temp_bytes'] / 2**20:.1f}",
        f"{entry['flops'] / 1e9:.4g}",
        number(entry["median_seconds"] and entry["flops"] / entry["median_seconds"] / 1e12, ".3g"),
    ]


def show(report: dict[str, Any], console: Console) -> None:
    titles = {"loss": "the loss alone: value and gradients", "step": "the whole step"}
    for group, title in titles.items():
        entries = [entry for entry in report["rows"] if entry["group"] == group]
        if not entries:
            continue
        table = Table(title=f"{title}, D {entries[0]['width']}, E {entries[0]['teacher_width']}", title_justify="left")
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for before, entry in zip([entries[0], *entries], entries, strict=False):
            if (before["tokens"], before["vocabulary"]) != (entry["tokens"], entry["vocabulary"]):
                table.add_section()
            table.add_row(*cells(entry))
        console.print(table)
    for entry in report["rows"]:
        if entry.get("to_ce_and_logits") is not None:
            console.print(
                f"{entry['name']}: {entry['to_ce_and_logits']:.3f} x (CE step + teacher forward to logits), "
                f"{entry['to_ce_and_hidden']:.3f} x (CE step + teacher forward to hidden states)"
            )
        if entry.get("to_logits") is not None:
            console.print(f"{entry['name']}: {entry['to_logits']:.3f} x teacher forward to logits")
    if any(entry["median_seconds"] is None for entry in report["rows"]):
        why = "it needs more memory than is available" if report["rounds"] else "--rounds is 0"
        console.print(f"-: not run, since {why}")
    rounds = report["rounds"]
    timing = f" Median and spread (slowest less fastest) of {rounds} rounds." if rounds else ""
    console.print(
        f"{report['machine']['cpu_cores']} CPU cores, {report['machine']['device']}, {report['dtype']}.{timing} GFLOP "
        "is counted from shapes, for the loss of a distillation 2 N V (3 D + E)."
    )


def machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "jaxlib", "flax")}
    return {
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "load_at_start": os.getloadavg()[0],
    }


def write(path: Path, report: dict[str, Any], rows: Sequence[Row]) -> None:
    """Puts what is measured so far into the report and its file: a run that is cut short leaves the shapes before."""
    report["rows"] = compare(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
