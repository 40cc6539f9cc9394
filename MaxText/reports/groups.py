"""Which runs belong together, and whether they can be compared at all.

Runs whose settings are equal but for the seed are one group.
"""

import dataclasses
import itertools
import re
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from MaxText.reports import page
from MaxText.reports.run_records import RecordError, Run

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
        """Of each run: all tokens by all seconds."""
        return [speed * self.devices for speed in self.speed("perf/per_device_tokens_per_sec")]

    def speed(self, metric: str) -> list[float]:
        """Of each run the mean over its time, but for the first step, which waits for what was not compiled."""
        speeds = [list(run.series(metric).values())[1:] for run in self.runs]
        return [statistics.harmonic_mean(values) for values in speeds if values]


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs with all settings recorded, and equal but for places and seeds, are one group; in the order given."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        key = frozenset(comparable(run).items()) if run.complete else id(run)
        found.setdefault(key, []).append(run)
    devices = 1 if any(run.devices is None for run in runs) else None
    styles = (page.STYLES[index % len(page.STYLES)] for index in range(len(found)))
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
