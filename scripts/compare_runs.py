"""Compares runs: one page of curves and tables, to be opened in any browser, and the curves as PNG files.

    python scripts/compare_runs.py runs/student_ce runs/student_kd_* --out report

A RUN is a run's folder or its metrics file. Runs whose settings are equal but for the seed are one curve: their mean,
with a band from the lowest to the highest. Loss is drawn against steps and against the FLOPs spent, the teacher's
included, so that distillation and plain training can be compared at equal compute. What is read, and how it is
computed: docs/reports.md. Left out on purpose: smoothing beyond means over neighbouring steps.
"""

import argparse
import dataclasses
import itertools
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import report_page
import run_records
from matplotlib.ticker import EngFormatter
from report_page import Chart, Line, Report, Table
from rich.console import Console
from run_records import RecordError, Run

POINTS = 300  # a curve has no more: each is the mean over neighbouring steps
SEEDS = ("init_weights_seed", "data_shuffle_seed")
# Settings that name places or say what is logged: runs that differ in nothing else are runs of one setting. The access
# token is no part of a report.
PLACES = {
    *("run_name", "base_output_directory", "metrics_file", "checkpoint_dir", "metrics_dir", "tensorboard_dir"),
    *("managed_mldiagnostics_dir", "dump_hlo_gcs_dir", "dump_jaxpr_gcs_dir", "jax_cache_dir", "base_config"),
    *("wandb_run_name", "goodput_job_name", "log_config", "enable_tensorboard", "hf_access_token"),
}
# Settings that say what is evaluated, and in which tokens.
EVALUATED = (
    *("dataset_type", "grain_file_type", "grain_eval_files", "hf_path", "hf_name", "hf_eval_files", "hf_eval_split"),
    *("dataset_path", "eval_dataset_name", "eval_split", "eval_data_columns", "eval_steps"),
    *("tokenizer_path", "max_target_length"),
)
NOT_RECORDED = "not recorded"


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one setting, which differ in the seed alone.

    Attributes:
      style: how its curves are drawn.
      devices: by how many devices what was recorded per device is multiplied.
    """

    label: str
    runs: tuple[Run, ...]
    style: tuple[str, str]
    devices: int

    def common(self, metric: str) -> tuple[list[int], np.ndarray]:
        """The steps at which all runs recorded the metric, and what they recorded: an array [runs, steps]."""
        series = [run.series(metric) for run in self.runs]
        steps = sorted(set(series[0]).intersection(*series[1:]))
        return steps, np.array([[values[step] for step in steps] for values in series])

    @property
    def flops(self) -> dict[int, float]:
        """Step -> FLOPs of training up to it, on the devices together; equal settings cost the same."""
        return {step: tflops * 1e12 * self.devices for step, tflops in self.runs[0].tflops_per_device.items()}

    def last(self, metric: str) -> list[float]:
        """The last value of each run that recorded the metric."""
        series = [run.series(metric) for run in self.runs]
        return [values[max(values)] for values in series if values]

    @property
    def tokens_per_second(self) -> list[float]:
        """Of each run: all tokens by all seconds, but for the first step, which waits for what was not compiled."""
        speeds = [list(run.series("perf/per_device_tokens_per_sec").values())[1:] for run in self.runs]
        return [statistics.harmonic_mean(values) * self.devices for values in speeds if values]


# Which runs belong together -----------------------------------------------------------------------------------------


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs with all settings recorded, and equal but for places and seeds, are one group; in the order given."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        key = frozenset(comparable(run).items()) if run.complete else id(run)
        found.setdefault(key, []).append(run)
    devices = 1 if any(run.devices is None for run in runs) else None
    styles = (report_page.STYLES[index % len(report_page.STYLES)] for index in range(len(found)))
    return [
        Group(label_of(members), tuple(members), style, devices or members[0].devices or 1)
        for members, style in zip(found.values(), styles, strict=True)
    ]


def comparable(run: Run) -> dict[str, str]:
    """The settings that make a run what it is; the teacher's place is none of them where its fingerprint is known."""
    left_out = {*PLACES, *SEEDS, *(("kd_teacher_parameters_path",) if "teacher" in run.settings else ())}
    return {key: value for key, value in run.settings.items() if key not in left_out}


def label_of(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    columns = itertools.takewhile(
        lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs), strict=False)
    )
    shared = re.sub(r"[-_. ]*(seed[-_. ]*)?$", "", "".join(letters[0] for letters in columns)) or runs[0].name
    return f"{shared} ({len(runs)} runs)"


def check_evaluations(runs: Sequence[Run]) -> list[str]:
    """Whether the evaluations are of the same data -> notes.

    Raises:
      RecordError: they are of different numbers of tokens, so of different data.
    """
    tokens = {run: set(run.series("evaluation/total_weights").values()) for run in runs}
    counts = {run: sorted(found) for run, found in tokens.items() if found}
    if len(set().union(*counts.values())) > 1:
        lines = (
            f"  {run.name}: {' and '.join(f'{count:,.0f}' for count in found)} tokens"
            + "".join(f", {key}={run.settings[key]}" for key in differing(runs, EVALUATED) if key in run.settings)
            for run, found in counts.items()
        )
        raise RecordError(
            "the runs were evaluated on different data, so their curves say nothing about each other:\n"
            + "\n".join(lines)
            + "\nCompare runs of one evaluation set."
        )
    return [
        f"{key} differs ({', '.join(sorted({run.settings.get(key, NOT_RECORDED) for run in counts}))}), though the "
        "evaluations are of equally many tokens: make sure that they are of the same ones"
        for key in differing(list(counts), EVALUATED)
    ]


def differing(runs: Sequence[Run], keys: Iterable[str]) -> list[str]:
    """The keys whose recorded values are not all the same."""
    return [key for key in keys if len({run.settings[key] for run in runs if key in run.settings}) > 1]


# Curves -------------------------------------------------------------------------------------------------------------


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


# Tables -------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------


def compare(paths: Sequence[Path]) -> Report:
    """What there is to say of the runs.

    Raises:
      RecordError: a run cannot be read, or the runs cannot be compared.
    """
    runs = [run_records.read_run(path) for path in paths]
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="docs/reports.md says what is read and how it is computed.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its metrics file")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder for index.html and *.png (default: report)"
    )
    given = parser.parse_args(arguments)
    if len(set(given.runs)) < len(given.runs):
        parser.error(f"{max(given.runs, key=given.runs.count)}: is named twice")
    try:
        report = compare(given.runs)
        page = report_page.write(given.out, report)
    except RecordError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"{page}: {len(given.runs)} runs, {len(report.charts)} charts, each a PNG file beside it too")


if __name__ == "__main__":
    main(sys.argv[1:])
