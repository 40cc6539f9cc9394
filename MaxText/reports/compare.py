"""What there is to say of runs beside each other."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from MaxText.reports import run_records
from MaxText.reports.curves import charts_of
from MaxText.reports.groups import Group, check_evaluations, group
from MaxText.reports.page import Report
from MaxText.reports.run_records import RecordError, Run
from MaxText.reports.tables import differences, flops_per_step, results


def check_each_is_named_once(runs: Sequence[Run], paths: Sequence[Path]) -> None:
    """A run under a second spelling of its path would be a second seed, and the spread of seeds too small."""
    known: dict[tuple[str, str], Path] = {}
    for run, path in zip(runs, paths, strict=True):
        first = known.setdefault((os.path.realpath(run.source), run.name), path)
        if first is not path:
            raise RecordError(f"{first} and {path}: are one run")


def compare(paths: Sequence[Path]) -> Report:
    """What there is to say of the runs.

    Raises:
      RecordError: a run cannot be read, or the runs cannot be compared.
    """
    runs = [run_records.read_run(path) for path in paths]
    check_each_is_named_once(runs, paths)
    names = [run.name for run in runs]
    runs = [
        dataclasses.replace(run, name=str(path)) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]
    warnings = check_evaluations(runs)
    groups = group(runs)
    per_device = any(run.devices is None for run in runs)
    return Report(
        title=" · ".join(each.label for each in groups)
        if len(groups) < 5
        else f"{len(runs)} runs of {len(groups)} settings",
        notes=[*notes_on(runs, groups), *warnings],
        tables=[table for table in (results(groups, per_device), differences(groups)) if table.rows],
        charts=charts_of(groups, per_device),
    )


def notes_on(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """What a reader has to know about how complete the records are."""
    notes = [note for run in runs for note in run.notes]
    bare = [run.name for run in runs if not run.complete]
    if bare:
        notes.append(
            f"Not all settings were recorded (enable_tensorboard=false) for {', '.join(bare)}: they are no group with "
            "other seeds, and the number of devices is not known: compute and speed of all runs are per device."
        )
    if names := [run.name for run in runs if not run.tflops_per_device]:
        notes.append(f"FLOPs were not recorded for every step of {', '.join(names)}: no curves by compute.")
    if names := [each.label for each in groups if each.flops and flops_per_step(each)[1] is None]:
        notes.append(f"The teacher's share of the FLOPs was not recorded for {', '.join(names)}: known is the sum.")
    return notes
