"""Student, teacher and batches in this process, for tests that look inside a step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from conftest import SMOKE
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import train, upstream
from MaxText.config import resolve
from MaxText.config.resolve import Run
from MaxText.config.teacher import resolve_teacher
from MaxText.loop import step
from MaxText.models import heads
from MaxText.models import student as student_lib
from MaxText.models import teacher as teacher_lib


def whole_loss(loss: jax.Array, aux: dict[str, Any]) -> jax.Array:
    return loss


@dataclasses.dataclass(eq=False)
class Lab:
    """What `train.main` holds before its loop."""

    run: Run
    student: Any
    teacher: Any

    @property
    def models(self) -> step.Models:
        graphdef = heads.ends_in_hidden_states(self.student.graphdef, self.student.state)
        config, kd, mesh = self.run.student, self.run.kd, self.student.mesh
        return step.Models(config, graphdef, self.teacher.config, self.teacher.graphdef, kd, mesh)

    def under(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result, compiled as the train step is: on the run's mesh, by its rules."""
        with jax.set_mesh(self.student.mesh), logical_axis_rules(self.run.student.logical_axis_rules):
            return jax.jit(function)(*arguments)

    def lowered(self, function: Callable[..., Any], *arguments: Any) -> str:
        """The program of `under`, before XLA sees it."""
        with jax.set_mesh(self.student.mesh), logical_axis_rules(self.run.student.logical_axis_rules):
            return jax.jit(function).lower(*arguments).as_text()

    def sums_and_gradient(self, batch: dict[str, jax.Array], of: Callable[..., Any] = whole_loss) -> Any:
        """(of(loss, aux), the sums) of a training batch, and the gradient of `of` for the student's parameters."""
        model = nnx.merge(self.models.student, self.student.state).model
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return self.under(self.value_and_gradient(of), params, rest, self.teacher.state, batch)

    @functools.cache  # noqa: B019  one program for all batches
    def value_and_gradient(self, of: Callable[..., Any]) -> Callable[..., Any]:
        models = self.models
        graphdef = nnx.graphdef(nnx.merge(models.student, self.student.state).model)

        def value(params: nnx.State, rest: nnx.State, teacher: nnx.State, batch: dict[str, jax.Array]) -> Any:
            model = nnx.merge(graphdef, params, rest, copy=True)
            loss, aux = step.distillation_loss(models, model, teacher, batch, True, *models.schedules.at(0))
            return of(loss, aux), aux["sums"]

        return jax.value_and_grad(value, has_aux=True)

    def steps(self) -> train.Steps:
        return train.compile_steps(self.run.student, self.run.kd, self.student, self.teacher)


def make(folder: Any, teacher: str, **keys: Any) -> Lab:
    """The smoke run with `keys`, distilled from the checkpoint at `teacher`."""
    keys = {"use_kd": "true", "kd_teacher_parameters_path": teacher, "base_output_directory": folder} | keys
    keys = {"metrics_file": "", "enable_checkpointing": "false"} | keys
    run = resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in keys.items())])
    checkpoint = teacher_lib.find_checkpoint(run.kd.kd_teacher_parameters_path)
    config = resolve_teacher(run, checkpoint.scan_layers)
    recorder = upstream.start_engine(run.student)
    student = student_lib.set_up(run.student, recorder)
    return Lab(
        run, student, teacher_lib.load(config, checkpoint, student.mesh, run.kd.kd_teacher_dtype, run.kd.kd_vocab_size)
    )


def padded_batch(rows: int = 4, length: int = 32, vocabulary: int = 256, seed: int = 0) -> dict[str, jax.Array]:
    """Random tokens; each row ends in padding, of another length per row, one row is all padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocabulary, (rows, length + 1))
    valid = np.arange(length) < np.linspace(0, length, rows).astype(int)[:, None]
    position = np.broadcast_to(np.arange(length), (rows, length))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    for name in ("inputs", "targets"):
        batch |= {f"{name}_position": position, f"{name}_segmentation": valid}
    return {key: jax.numpy.asarray(value, dtype=np.int32) for key, value in batch.items()}
