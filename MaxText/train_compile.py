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
from MaxText.chips import chip_of
from MaxText.compiled.account import Reading
from MaxText.compiled.cost import Cost
from MaxText.config import resolve
from MaxText.config.files import CONFIGS, load_layers, plain_defaults, resolved_keys
from MaxText.config.keys import ConfigError, Distillation
from MaxText.config.presets import suggestion
from MaxText.config.resolve import Run
from MaxText.config.teacher import resolve_teacher
from MaxText.console import say, waiting

with epy.lazy_imports():
    from MaxText import train as train_lib
    from MaxText.data import cached
    from MaxText.distill import search
    from MaxText.loop import flags, header, parts
    from MaxText.models import heads
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
    guide = teacher_config if kd.teacher_in_step else None
    cost = Cost(chip_of(mesh), mesh.size, parts.flops(config, guide, kd))
    try:
        with waiting("compiling"):
            program = train_lib.compiled(config, trace(config, kd, student, teacher).lower())
        cost.read(program, *readings(mesh, config, guide, kd))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cost.refusal = refusal(str(error))
    say("\n".join(f"{title:>10}  {text}" for title, text in cost.lines()))
    if config.metrics_file:
        append_row(config.metrics_file, cost.row() | {"run_name": config.run_name, "compile/libtpu": libtpu_version()})
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
    user = omegaconf.OmegaConf.merge(user, omegaconf.OmegaConf.from_cli(arguments))
    given = plain_defaults() | resolved_keys(defaults, user)
    settled = ["skip_jax_distributed_system=true", "enable_goodput_recording=false", "use_vertex_tensorboard=false"]
    if not given["kd_teacher_parameters_path"] and not given["kd_cache_path"]:
        settled.append("kd_teacher_parameters_path=unread")
    if topology := given["compile_topology"]:
        check_topology(str(topology))
        upstream.set_verbose(str(given["log_config"]).lower() == "true")
        upstream.load_libtpu()
        settled.append(f"hardware={upstream.topologies()[topology].platform}")
        if given["compile_topology_num_slices"] == -1:
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


def readings(
    mesh: jax.sharding.Mesh, config: Any, teacher_config: Any | None, kd: Distillation
) -> tuple[Reading, Reading]:
    """How the step's loops are counted, typically and at the worst: the loss walks until its tokens are over, and a
    search in it until the bound of what is kept is found. No token is padding."""
    if not kd.distils:
        return (Reading(parts.part_of, parts.REST, {}),) * 2
    blocks = heads.walk_of(mesh, config, teacher_config, kd).rounds
    bits = 32 if config.logits_dot_in_fp32 else 8 * jax.numpy.dtype(config.dtype).itemsize
    visits = search.TYPICAL_VISITS, search.most_visits(bits)
    typical, most = (Reading(parts.part_of, parts.REST, {parts.LOSS: (blocks, number)}) for number in visits)
    return typical, most


def refusal(message: str) -> str:
    """The sentence of XLA's that says by how much a program is too large."""
    found = re.search(r"Ran out of memory.*?(?=\. |\n|$)", message)
    return found.group() if found else message.splitlines()[0]


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
    options = flags.compiler_options(config, student.mesh, distils=kd.use_kd) or {}
    lines += [("flag", f"--{name}={value}") for name, value in options.items()]
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
