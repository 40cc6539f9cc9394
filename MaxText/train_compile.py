"""Compiles the train step for a TPU topology on a machine without one: does it fit, and what does it cost?

    python MaxText/train_compile.py <config>.yml compile_topology=v5e-16 compile_topology_num_slices=1 key=value ...

It is the step of train.py, with the same settings, shardings and donation, on states that are shapes without values:
no parameter is made, no checkpoint read, no data opened. The teacher's checkpoint need not exist. It needs libtpu
(`bash setup.sh tpu`). Without compile_topology the step is compiled for the devices of this machine.
Left out on purpose: the evaluation step, which holds neither gradients nor an optimizer and is smaller.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import omegaconf
from absl import app
from etils import epy
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import upstream
from MaxText.chips import Chip, chip_of
from MaxText.config import resolve
from MaxText.config.files import CONFIGS, load_layers
from MaxText.config.keys import ConfigError, Distillation
from MaxText.config.presets import suggestion
from MaxText.config.resolve import Run
from MaxText.config.teacher import resolve_teacher
from MaxText.console import say, waiting

with epy.lazy_imports():
    from MaxText import train as train_lib
    from MaxText.data import cached
    from MaxText.loop import header
    from MaxText.models import student as student_lib
    from MaxText.models import teacher as teacher_lib


def main(argv: Sequence[str]) -> int:
    """Returns 1 where XLA finds that the step does not fit its devices, else 0."""
    # 1. Configuration.
    run = initialize(list(argv))
    config, kd = run.student, run.kd
    for warning in kd.warnings():
        say(f"warning: {warning}")
    teacher_config = resolve_teacher(run, config.scan_layers) if kd.has_teacher else None
    upstream.start_engine(config)
    if config.enable_diloco:
        raise ConfigError("enable_diloco=True: its step is not train.py's; allowed is False")

    # 2. Student and teacher as shapes on the mesh of the topology.
    with student_lib.refusals_as_config_errors(config):
        mesh = upstream.maxtext_utils.get_mesh_from_config(config, devices_of(config))
        assumed = cached.assumed(config, kd)
        kd = cached.learned_from(kd, assumed)
        student = dataclasses.replace(abstract_student(config, mesh), cached=assumed)
        teacher = teacher_lib.abstract(teacher_config, mesh, kd.kd_teacher_dtype) if kd.has_teacher else None
    say("\n".join(f"{title:>10}  {text}" for title, text in description(run, student, teacher)))

    # 3. The step.
    cost = Cost(chip_of(mesh), mesh.size, model_flops(config, teacher_config if kd.teacher_in_step else None))
    try:
        with waiting("compiling"):
            cost.read(train_lib.compiled(config, trace(config, kd, student, teacher).lower()))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cost.refusal = refusal(str(error))
    say("\n".join(f"{title:>10}  {text}" for title, text in cost.lines()))
    if config.metrics_file:
        append_row(config.metrics_file, cost.row() | {"run_name": config.run_name})
    return 1 if cost.refusal else 0


# Configuration --------------------------------------------------------------------------------------------------------


def initialize(argv: list[str]) -> Run:
    """As train.py's, with what a compilation elsewhere settles: the platform, no distributed system, no cache.

    Raises:
      ConfigError: as train.py's, for a topology that nobody knows, and where libtpu is missing.
    """
    arguments = [argument for argument in argv[1:] if "=" in argument]
    path = argv[1] if len(argv) > 1 and "=" not in argv[1] else str(CONFIGS / "base.yml")
    defaults, user = load_layers(path)
    given = omegaconf.OmegaConf.merge(defaults, user, omegaconf.OmegaConf.from_cli(arguments))
    settled = ["skip_jax_distributed_system=true", "enable_goodput_recording=false", "use_vertex_tensorboard=false"]
    if not given.kd_teacher_parameters_path and not given.kd_cache_path:
        settled.append("kd_teacher_parameters_path=unread")
    if topology := given.compile_topology:
        check_topology(str(topology))
        upstream.set_verbose(str(given.log_config).lower() == "true")
        upstream.load_libtpu()
        settled.append(f"hardware={upstream.topologies()[topology].platform}")
        if given.compile_topology_num_slices == -1:
            settled.append("compile_topology_num_slices=1")
    return resolve.initialize([*argv, *settled])


def check_topology(name: str) -> None:
    known = upstream.topologies()
    if name not in known:
        raise ConfigError(
            f"compile_topology={name!r}: no such topology{suggestion(name, known)}; "
            f"sizes of {', '.join(sorted({known_name.rpartition('-')[0] or known_name for known_name in known}))}"
        )
    if known[name].platform == "tpu" and libtpu_version() is None:
        raise ConfigError(
            f"compile_topology={name!r}: compiling for a TPU needs the package libtpu, which is not installed: "
            "bash setup.sh tpu"
        )


def libtpu_version() -> str | None:
    """The version of the TPU compiler that jax would load; None where there is none."""
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        return os.environ.get("TPU_LIBRARY_PATH")
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # a nightly build
        return spec.origin


# Shapes ---------------------------------------------------------------------------------------------------------------


def devices_of(config: Any) -> list[Any]:
    if config.compile_topology and upstream.topologies()[config.compile_topology].platform == "tpu":
        return upstream.topology_devices(config.compile_topology, config.compile_topology_num_slices)
    return jax.devices()


def abstract_student(config: Any, mesh: jax.sharding.Mesh) -> "student_lib.Student":
    """train.py's student before its first step, without values, data and checkpoints."""
    graphdef, state, shardings = upstream.abstract_train_state(config, mesh)
    params_shardings, shardings = upstream.sharding.maybe_update_params_sharding_with_opt(config, shardings)

    def placed(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return student_lib.Student(
        graphdef=graphdef,
        state=jax.tree.map(placed, state, shardings),
        state_shardings=shardings,
        params_shardings=params_shardings,
        mesh=mesh,
        learning_rate_schedule=lambda _: 0.0,
        start_step=0,
        origin="",
        data_loader=None,
        data_iterator=None,
        rampup_manager=None,
        eval_data_iterator=None,
        checkpoint_manager=None,
    )


# Compilation ----------------------------------------------------------------------------------------------------------


def trace(config: Any, kd: Distillation, student: "student_lib.Student", teacher: Any) -> Any:
    """The train step of train.py, traced: `.lower()` makes it a program for the mesh's platform.

    For another platform than the mesh's, as a check that it can be lowered: `.lower(lowering_platforms=("cuda",))`.
    """
    data = upstream.sharding.get_input_data_sharding(config, student.mesh, rules=config.logical_axis_rules)
    (train_step, arguments), _ = train_lib.jit_steps(config, kd, student, teacher, data, None)
    with jax.set_mesh(student.mesh), logical_axis_rules(config.logical_axis_rules):
        batch = cached.shaped_batch(config, student.cached, batch_sharding=data)
        return train_step.trace(student.state, *arguments, batch)


def refusal(message: str) -> str:
    """The sentence of XLA's that says by how much a program is too large."""
    found = re.search(r"Ran out of memory.*?(?=\. |\n|$)", message)
    return found.group() if found else message.splitlines()[0]


# What it costs --------------------------------------------------------------------------------------------------------


def model_flops(config: Any, teacher_config: Any | None) -> float:
    """FLOPs per device of one step that the models need: recomputation and padding are not among them."""
    return upstream.tflops_per_step(config, teacher_config) * 1e12


class Cost:
    """What a compiled step takes of each device, as lines to read and as a row of the metrics file.

    Attributes:
      chip: the chip it is compiled for; None where the table does not hold it.
      devices: how many devices the step runs on.
      model_flops: per device and step.
      refusal: why XLA did not compile it; "" where it did.
      memory: bytes per device by kind: argument, output, alias, temp, code, peak; empty after a refusal.
      flops, bytes_accessed: XLA's estimate per device, which counts the body of each loop once.
    """

    def __init__(self, chip: Chip | None, devices: int, model_flops: float):
        self.chip, self.devices, self.model_flops = chip, devices, model_flops
        self.refusal = ""
        self.memory: dict[str, int] = {}
        self.flops = self.bytes_accessed = math.nan

    def read(self, compiled: Any) -> None:
        found = compiled.memory_analysis()
        self.memory = {
            "argument": found.argument_size_in_bytes,
            "output": found.output_size_in_bytes,
            "alias": found.alias_size_in_bytes,
            "temp": found.temp_size_in_bytes,
            "code": found.generated_code_size_in_bytes,
            "peak": found.peak_memory_in_bytes,
        }
        estimate = compiled.cost_analysis()
        self.flops = estimate.get("flops", math.nan)
        self.bytes_accessed = estimate.get("bytes accessed", math.nan)

    @property
    def total(self) -> int:
        """Bytes per device that the step holds at most; an output that is written over an argument counts once.

        An upper bound: what libtpu 0.0.50 calls temporary may hold arguments again that the step overwrites.
        """
        memory = self.memory
        return memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] + memory["code"]

    @property
    def available(self) -> float | None:
        return self.chip.memory / self.chip.devices if self.chip else None

    @property
    def fits(self) -> bool | None:
        """Whether XLA, which knows what the chip keeps for itself, compiled the step; None for chips unknown here."""
        return None if self.chip is None and not self.refusal else not self.refusal

    def roofline(self) -> dict[str, float]:
        """Seconds that one step takes at least, by what bounds it."""
        if self.chip is None:
            return {}
        share = 1 / self.chip.devices
        bounds = {"compute": self.model_flops / (self.chip.flops * share)}
        if not math.isnan(self.bytes_accessed):
            bounds["memory"] = self.bytes_accessed / (self.chip.bandwidth * share)
        return bounds

    def lines(self) -> list[tuple[str, str]]:
        return [*self.memory_lines(), *self.work_lines()]

    def memory_lines(self) -> list[tuple[str, str]]:
        if self.refusal:
            return [("memory", f"does not fit: {self.refusal}")]
        memory = self.memory
        of = f" of {gigabytes(self.available)} on a {self.device_name}: fits" if self.available else ""
        return [
            ("memory", f"{gigabytes(self.total)} per device{of}"),
            ("arguments", f"{gigabytes(memory['argument'])} (parameters, optimizer, teacher, batch)"),
            ("outputs", f"{gigabytes(memory['output'])}, {gigabytes(memory['alias'])} of it in place of arguments"),
            ("temporary", gigabytes(memory["temp"])),
            ("program", gigabytes(memory["code"])),
            (
                "peak",
                f"{gigabytes(memory['peak'])} of arguments, outputs and temporaries at one time, by XLA's account",
            ),
        ]

    def work_lines(self) -> list[tuple[str, str]]:
        lines = [("FLOPs", f"{self.model_flops:.4g} per device and step, counted from the models' shapes")]
        if not self.refusal:
            lines.append(("", f"{self.flops:.4g} by XLA's estimate, which counts the body of each loop once"))
            lines.append(("bytes", f"{self.bytes_accessed:.4g} accessed by the same estimate"))
        bounds = self.roofline()
        if bounds:
            slowest = max(bounds, key=lambda name: bounds[name])
            parts = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in bounds.items())
            lines.append(("roofline", f"a step takes at least {1000 * bounds[slowest]:.1f} ms ({parts})"))
        return lines

    @property
    def device_name(self) -> str:
        assert self.chip is not None
        return self.chip.name if self.chip.devices == 1 else f"core of {self.chip.name}"

    def row(self) -> dict[str, float]:
        row: dict[str, float] = {"devices": self.devices, "model_flops": self.model_flops}
        if self.memory:
            row |= {f"{kind}_bytes": value for kind, value in self.memory.items()} | {"total_bytes": self.total}
            row |= {"flops": self.flops, "bytes_accessed": self.bytes_accessed}
        if self.available:
            row["available_bytes"] = self.available
        if self.fits is not None:
            row["fits"] = float(self.fits)
        row |= {f"roofline_{name}_seconds": seconds for name, seconds in self.roofline().items()}
        return {f"compile/{name}": value for name, value in row.items()}


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB"


def append_row(path: str, row: dict[str, Any]) -> None:
    """Appended, since the file may hold the rows of a training run."""
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise ConfigError(f"metrics_file={path!r}: cannot be written ({error.strerror})") from None


def description(run: Run, student: Any, teacher: Any) -> list[tuple[str, str]]:
    """What is compiled, for what, by what."""
    config, kd = run.student, run.kd
    lines = [("student", header.model_text(config, nnx.filter_state(student.state.model, nnx.Param)))]
    if teacher is not None:
        lines.append(("teacher", header.model_text(teacher.config, nnx.filter_state(teacher.state, nnx.Param))))
        if not kd.kd_teacher_dtype:
            held = f"held in {teacher.config.weight_dtype}: set kd_teacher_dtype if its checkpoint stores another type"
            lines.append(("", held))
    lines.append(("loss", header.loss_text(kd)))
    rows = f"{config.per_device_batch_size:g} rows of {config.max_target_length} positions per device"
    lines.append(("batch", rows))
    lines.append(("devices", header.layout_text(student.mesh)))
    compiler = f", libtpu {libtpu_version()}" if student.mesh.devices.flat[0].platform == "tpu" else ""
    lines.append(("compiler", f"jax {jax.__version__}{compiler}"))
    return lines


def command_line(argv: Sequence[str]) -> None:
    """`main`, with bad input as one message at the end of the output and status 2."""
    # A program from the cache of compilations would come without its analysis.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        status = main(argv)
    except ConfigError as error:
        if upstream.is_verbose() and error.__cause__ is not None:
            raise
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        sys.exit("interrupted")
    sys.exit(status)


if __name__ == "__main__":
    app.run(command_line)
