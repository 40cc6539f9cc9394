"""What the parts of a teacher are worth, by rows of text that it reads: no gradient is taken.

Layers by how far they turn what goes through them (1 - cosine of input and output; Gromov et al. 2024,
arXiv:2403.17887), or by what the cross-entropy gains where one is left out; neurons, heads and embedding channels by
the root of the summed squares of their activations (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2); experts
by the tokens that are routed to them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import absl.flags
import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError, Distillation
from MaxText.config.teacher import resolve_teacher
from MaxText.data import iterators, once, templates, tokens
from MaxText.models import teacher as teacher_lib
from MaxText.pruning import observed
from MaxText.pruning.choice import Module, Scored
from MaxText.pruning.structure import Path, Structure
from MaxText.pruning.target import Model

Batch = dict[str, np.ndarray]
Norm = tuple[int | None, Path]  # a layer of the teacher, None for the last norm, and the path of its scale


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a calibration found.

    Attributes:
      scored: of each part, what it is worth.
      unscaled: of each norm and channel, the mean square of what it is before the scale, [D].
      ce: the teacher's cross-entropy, in nats a token.
      rows, tokens: it was measured on.
    """

    scored: Scored
    unscaled: dict[Norm, np.ndarray]
    ce: float
    rows: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """Of what rows.

    Attributes:
      settings: [config.yml] key=value ...: whose data is read, in whose batches.
      rows: how many at most.
      by_loss: layers by cross-entropy, and not by cosine.
    """

    settings: list[str]
    rows: int
    by_loss: bool


def measure(
    teacher: Model, checkpoint: teacher_lib.Checkpoint, structure: Structure, asked: Asked, console: Console
) -> Measured:
    """Reads the rows with the teacher.

    Raises:
      ConfigError: the settings name no data, or the teacher is broken.
      RunError: the data cannot be read.
    """
    if not asked.settings:
        raise ConfigError("--by importance, --by loss: on which rows? Give the training's [config.yml] key=value ...")
    run = resolve.initialize(["init_student.py", *asked.settings, *forced(teacher, checkpoint)])
    config, kd = run.student, run.kd
    once.check(config)
    teacher_config = resolve_teacher(run, checkpoint.scan_layers)
    if not absl.flags.FLAGS.is_parsed():  # grain looks
        absl.flags.FLAGS(["init_student.py"])
    upstream.start_engine(config)
    tokens.check_fits(config)
    templates.check(config)
    with iterators.closed_at_the_end():
        mesh = upstream.maxtext_utils.get_mesh_from_config(config)
        loaded = teacher_lib.load(teacher_config, checkpoint, mesh, kd.kd_teacher_dtype, kd.kd_vocab_size)
        batches = read(config, mesh, asked.rows)
        return over(batches, kd, loaded, mesh, structure, asked.by_loss, console)


def forced(teacher: Model, checkpoint: teacher_lib.Checkpoint) -> list[str]:
    """The settings are a student's, for a pod: what they say of models, and of its devices, is no matter here."""
    groups = (upstream.types.IciParallelism, upstream.types.DcnParallelism)
    keys: dict[str, Any] = {key: field.default for group in groups for key, field in group.model_fields.items()}
    keys |= {
        "use_kd": "true", "kd_teacher_parameters_path": checkpoint.root, "kd_teacher_model_name": teacher.preset,
        "kd_teacher_overrides": teacher.argument, "kd_cache_path": "''", "override_model_config": "true",
        "vocab_size": teacher.settings["vocab_size"], "load_parameters_path": "''", "enable_checkpointing": "false",
        "eval_interval": -1, "log_config": "false",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in keys.items()]


def read(config: Any, mesh: jax.sharding.Mesh, rows: int) -> list[Batch]:
    """The first batches of the data for training that hold so many rows; padding fills the last."""
    found, left = [], rows
    for batch, _ in once.batches(config, "train", once.opened(config, mesh)["train"], None):
        counts = batch["targets_segmentation"] != 0
        beyond = np.cumsum(counts.any(axis=1)) > left
        batch = batch | {"targets_segmentation": np.where(beyond[:, None], 0, batch["targets_segmentation"])}
        found.append(batch)
        left -= int((counts.any(axis=1) & ~beyond).sum())
        if left <= 0:
            break
    return found


def over(
    batches: list[Batch],
    kd: Distillation,
    teacher: teacher_lib.Teacher,
    mesh: jax.sharding.Mesh,
    structure: Structure,
    by_loss: bool,
    console: Console,
) -> Measured:
    """What the teacher does with the batches."""
    passes, quiet = len(batches) * (1 + structure.layers * by_loss), not console.is_terminal
    columns = TextColumn("reading rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar, jax.set_mesh(mesh):
        advance = functools.partial(bar.advance, bar.add_task("", total=passes))
        observe = observed.jitted(kd, teacher, mesh, observes=True)
        total: observed.Seen = {}
        ce_sum = n = 0.0
        for batch in batches:
            ce, count, reported = observe(teacher.state, batch)
            found = observed.by_layer(structure, reported)
            total = {key: total.get(key, 0) + value for key, value in found.items()}
            ce_sum, n = ce_sum + float(ce), n + float(count)
            advance()
        if not n or not math.isfinite(ce_sum) or not all(np.isfinite(value).all() for value in total.values()):
            ce = ce_sum / max(n, 1)
            raise ConfigError(f"--teacher: its cross-entropy on {n:.0f} tokens is {ce}: nothing can be measured")
        worth = np.array([float(total[layer, (), "turned"]) for layer in range(structure.layers)])
        if by_loss:
            worth = losses_without(batches, kd, teacher, mesh, structure, advance) - ce_sum
    rows = sum(int((batch["targets_segmentation"] != 0).any(axis=1).sum()) for batch in batches)
    return Measured(scored(total, worth / n), unscaled(total, n), ce_sum / n, rows, int(n))


def losses_without(
    batches: list[Batch],
    kd: Distillation,
    teacher: teacher_lib.Teacher,
    mesh: jax.sharding.Mesh,
    structure: Structure,
    advance: Callable[[], None],
) -> np.ndarray:
    """The summed cross-entropy of the teacher without each of its layers."""
    loss = observed.jitted(kd, teacher, mesh, observes=False)
    found = np.zeros(structure.layers)
    for layer in range(structure.layers):
        state = observed.without(teacher.state, structure, layer)
        for batch in batches:
            found[layer] += float(loss(state, batch)[0])
            advance()
    return found


def scored(total: observed.Seen, worth: np.ndarray) -> Scored:
    """Scores of all parts, of the sums of what was seen."""
    # Each norm has one vote: their scales differ by tens. (What a layer that adds nothing has normed has none.)
    channels = [np.sqrt(x / x.mean()) for (_, _, what), x in total.items() if what == "squares" and x.any()]

    def of(what: str, name: str) -> dict[Module, np.ndarray]:
        seen = {(layer, part): value for (layer, part, kind), value in total.items() if kind == what}
        return {
            (layer, part[-2]): value for (layer, part), value in seen.items() if part[-1] == name and layer is not None
        }

    heads, neurons = ({key: np.sqrt(value) for key, value in of("inputs", name).items()} for name in observed.LAST)
    return Scored(worth, np.sum(channels, axis=0), heads, neurons, of("load", "gate"))


def unscaled(total: observed.Seen, n: float) -> dict[Norm, np.ndarray]:
    return {(layer, (*part, "scale")): value / n for (layer, part, what), value in total.items() if what == "unscaled"}
