"""What a run left behind: its metrics, its settings, and what they say of its compute.

Metrics are the rows of the run's metrics file; where there is none, of its TensorBoard events, under the same names.
Settings are the texts at the head of the events (enable_tensorboard=true writes every key), else the kd_* keys of
distillation.json, which also tells the teacher apart. Left out on purpose: gs:// paths; copy the run here first.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
from google.protobuf.message import DecodeError
from tensorboardX.proto import event_pb2

TEXT = "/text_summary"  # what tensorboardX appends to the tag of a text

Rows = list[dict[str, Any]]


class RecordError(Exception):
    """A run that cannot be read: the path, what is wrong and what is expected."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run as it was recorded.

    Attributes:
      name: its run_name.
      source: the file, or the folder of events, that holds its metrics; several runs may share one.
      rows: metrics by name, and `step`; in the order of the steps.
      settings: key -> value, as text; every key of the run if `complete`, else what distillation.json holds.
      notes: what was tolerated while reading.
    """

    name: str
    source: Path
    rows: Rows
    settings: dict[str, str]
    complete: bool
    notes: tuple[str, ...]

    def series(self, metric: str) -> dict[int, float]:
        """Step -> value, where the metric was recorded."""
        return {row["step"]: row[metric] for row in self.rows if metric in row}

    @property
    def devices(self) -> int | None:
        """How many devices the run ran on; None if it did not record that."""
        count = self.settings.get("num_target_devices")
        return int(count) if count else None

    @functools.cached_property
    def tflops_per_device(self) -> dict[int, float]:
        """Step -> TFLOPs per device of all training steps up to it, student and teacher; {} if they are not known.

        A row stands for the steps since the row before it: what a step costs changes only while the batch ramps up,
        and then it is not recorded.
        """
        steps = [row for row in self.rows if "learning/loss" in row]
        if any("perf/per_device_tflops" not in row for row in steps):
            return {}
        total, last, sums = 0.0, -1, {}
        for row in steps:
            total += row["perf/per_device_tflops"] * (row["step"] - last)
            last = row["step"]
            sums[last] = total
        return sums

    @property
    def teacher_tflops_per_device(self) -> float | None:
        """Of one training step; 0 without a teacher in it; None if it is not known apart from the student's."""
        recorded = list(self.series("perf/per_device_teacher_tflops").values())
        if recorded:
            return recorded[-1]
        of_no_teacher = self.settings.get("use_kd") == "False" or (
            self.settings.get("kd_alpha") in ("0", "0.0") and self.settings.get("kd_alpha_schedule") == "constant"
        )
        return 0.0 if of_no_teacher else None


def read_run(path: Path) -> Run:
    """The run in a folder, or of a metrics file.

    Raises:
      RecordError: there is no such run, or nothing in it that can be drawn.
    """
    if not path.exists():
        hint = "; copy it here first (gcloud storage cp -r)" if str(path).startswith("gs:") else ""
        raise RecordError(f"{path}: no such run{hint}")
    folder = path if path.is_dir() else path.parent
    events = sorted((folder / "tensorboard").rglob("events.out.tfevents.*"), key=lambda file: file.name)
    texts = read_texts(events[-1]) if events else {}
    settings = read_manifest(folder / "distillation.json") | texts
    notes: list[str] = []
    file = path if path.is_file() else find_metrics_file(folder, texts.get("metrics_file", ""))
    if file is not None:
        rows, source = read_metrics_file(file, notes), file
        name, rows = rows_of_one_run(file, rows, texts.get("run_name", folder.name))
    elif events:
        rows, source = read_scalars(events, notes), folder / "tensorboard"
        name = texts.get("run_name", folder.name)
    else:
        raise RecordError(
            f"{folder}: holds neither a metrics file (*.jsonl, the run's metrics_file) nor TensorBoard events "
            "(tensorboard/)"
        )
    if not any(key.startswith(("learning/", "evaluation/")) for row in rows for key in row):
        raise RecordError(f"{source}: holds no metrics: no step was logged yet, or this is another kind of file")
    return Run(name, source, rows, settings, bool(texts), tuple(f"{source}: {note}" for note in notes))


# The metrics file ---------------------------------------------------------------------------------------------------


def find_metrics_file(folder: Path, configured: str) -> Path | None:
    """The run's own metrics file: the one in its folder, or where its settings say."""
    found = sorted(folder.glob("*.jsonl"))
    if len(found) > 1 and folder / "metrics.jsonl" not in found:
        raise RecordError(f"{folder}: holds {len(found)} files *.jsonl; name the metrics file itself")
    if found:
        return folder / "metrics.jsonl" if len(found) > 1 else found[0]
    return Path(configured) if configured and Path(configured).is_file() else None


def read_metrics_file(file: Path, notes: list[str]) -> Rows:
    """The rows that count: where a run went back to a checkpoint, what it had logged beyond is dropped."""
    rows: Rows = []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # nothing but a killed process leaves a line without its end
                notes.append(f"line {number} is cut off (the run was killed while it wrote) and left out")
                continue
            raise RecordError(f"{file}:{number}: is no row of a metrics file: {line[:60]!r}") from None
        while rows and rows[-1].get("run_name") == row.get("run_name") and rows[-1]["step"] > step:
            rows.pop()
        rows.append(row)
    if not rows:
        raise RecordError(f"{file}: is empty: no step was logged yet")
    return rows


def rows_of_one_run(file: Path, rows: Rows, name: str) -> tuple[str, Rows]:
    """The rows of the run `name` in a file that several runs may share."""
    names = {row.get("run_name", name) for row in rows}
    if len(names) == 1:
        return names.pop(), rows
    if name not in names:
        raise RecordError(f"{file}: holds several runs ({', '.join(sorted(names))}); name the folder of one of them")
    return name, [row for row in rows if row.get("run_name") == name]


# TensorBoard's events -----------------------------------------------------------------------------------------------


def read_events(file: Path, notes: list[str]) -> Iterator[Any]:
    """The events of a file, up to one that a killed process left unfinished."""
    try:
        for record in grain.experimental.TFRecordIterDataset(str(file)):
            yield event_pb2.Event.FromString(record)
    except (ValueError, DecodeError):
        notes.append(f"the last event of {file.name} is cut off (the run was killed while it wrote) and left out")


def read_texts(file: Path) -> dict[str, str]:
    """The settings, which the trainer writes before its first scalar."""
    texts: dict[str, str] = {}
    for event in read_events(file, []):
        for value in event.summary.value:
            if not value.tag.endswith(TEXT):
                return texts
            texts[value.tag.removesuffix(TEXT)] = value.tensor.string_val[0].decode()
    return texts


def read_scalars(files: list[Path], notes: list[str]) -> Rows:
    """A row per step. A later file is a later process, which begins where the state it restored stands."""
    rows: dict[int, dict[str, Any]] = {}
    for file in files:
        found: dict[int, dict[str, Any]] = {}
        for event in read_events(file, notes):
            for value in event.summary.value:
                if not value.tag.endswith(TEXT):
                    found.setdefault(event.step, {"step": event.step})[value.tag] = value.simple_value
        if found:
            rows = {step: row for step, row in rows.items() if step < min(found)} | found
    return [rows[step] for step in sorted(rows)]


def read_manifest(file: Path) -> dict[str, str]:
    """The kd_* settings and the teacher's fingerprint, as text."""
    if not file.exists():
        return {}
    try:
        manifest = json.loads(file.read_text())
        settings = {key: str(value) for key, value in manifest["settings"].items()}
        return settings | ({"teacher": manifest["teacher"]["fingerprint"]} if "teacher" in manifest else {})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RecordError(f"{file}: is no manifest of a distillation run") from None
