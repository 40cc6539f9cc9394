"""Laws of compilation: once per step, with the run's flags, and what was compiled ahead is what runs."""

import collections
import contextlib

import jax
import jax.numpy as jnp
import lab as lab_lib
import pytest
from conftest import few
from flax.core.spmd import logical_axis_rules

from MaxText import train, train_compile, upstream
from MaxText.chips import CHIPS
from MaxText.config.keys import ConfigError
from MaxText.loop import flags, targets
from MaxText.models import teacher as teacher_lib

pytestmark = pytest.mark.e2e

FLAGS = "--xla_cpu_enable_fast_min_max=True"


@contextlib.contextmanager
def compilations():
    """How often each function was compiled meanwhile."""
    counts = collections.Counter()

    def note(event, _seconds, fun_name="", **_more):
        if "backend_compile" in event:
            counts[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield counts
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, teacher):
    keys = {"compile_xla_flags": FLAGS, "eval_interval": 2, "eval_steps": 1}
    return lab_lib.make(tmp_path_factory.mktemp("lab"), teacher, **keys)


mostly_kd = pytest.mark.parametrize("use_kd", few((True,), (True, False)))


@mostly_kd
def test_each_step_is_compiled_once_with_the_flags_and_no_more_when_it_runs(lab, use_kd):
    config, student, mesh = lab.run.student, lab.student, lab.student.mesh
    kd = lab.run.kd.model_copy(update={"use_kd": use_kd})
    with compilations() as counts:
        steps = train.compile_steps(config, kd, student, lab.teacher)
        state = jax.tree.map(jnp.copy, student.state)
        for _ in range(2):
            batch = student.data_loader.load_next_batch()
            with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
                state, _ = steps.train(state, batch)
        batch = jax.device_put(next(iter(student.eval_data_iterator)), steps.eval_data_sharding)
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules_for_eval):
            jax.block_until_ready(steps.evaluate(state, batch))
    assert counts["jit(train_step)"] == 1, counts
    assert counts["jit(eval_step)"] == 1, counts


@mostly_kd
def test_what_train_compile_certifies_is_what_runs(lab, use_kd):
    config, student = lab.run.student, lab.student
    kd = lab.run.kd.model_copy(update={"use_kd": use_kd})
    data = upstream.sharding.get_input_data_sharding(config, student.mesh, rules=config.logical_axis_rules)
    (train_step, arguments), _ = train.jit_steps(config, kd, student, lab.teacher, data, None)
    with jax.set_mesh(student.mesh), logical_axis_rules(config.logical_axis_rules):
        runs = train_step.lower(student.state, *arguments, student.data_loader.load_next_batch())
    shapes = teacher_lib.abstract(lab.teacher.config, student.mesh, kd.kd_teacher_dtype)
    certified = train_compile.trace(config, kd, train_compile.abstract_student(config, student.mesh), shapes)
    assert certified.lower().as_text() == runs.as_text()


def flagged(config, flags):
    return upstream.pyconfig.HyperParameters(config._pydantic_config.model_copy(update={"compile_xla_flags": flags}))


@pytest.mark.parametrize(
    ("flags", "why"),
    (("--xla_no_such=1", "xla_no_such"), ("xla_no_such", "--key=value"), ("--xla_gpu_dump_llvmir=no", "bool")),
)
def test_flags_that_are_none_are_refused_by_name(lab, flags, why):
    with pytest.raises(ConfigError, match=f"compile_xla_flags='{flags}'.*{why}"):
        train.compile_steps(flagged(lab.run.student, flags), lab.run.kd, lab.student, lab.teacher)


@pytest.mark.parametrize("use_kd", (True, False), ids=("kd", "plain"))
def test_train_compile_compiles_with_the_flags_too(lab, use_kd):
    config = flagged(lab.run.student, "--xla_no_such=1")
    traced = train_compile.trace(config, lab.run.kd.model_copy(update={"use_kd": use_kd}), lab.student, lab.teacher)
    with pytest.raises(ConfigError, match=r"compile_xla_flags.*xla_no_such"):
        train.compiled(config, traced.lower())


@pytest.fixture
def flags_of_this_machine(monkeypatch):
    """As if the table of chips held it."""
    monkeypatch.setattr(flags, "chip_of", lambda _: CHIPS["TPU v5 lite"])
    monkeypatch.setattr(flags, "of_chip", lambda _: "--xla_no_such=1")


def test_the_flags_of_the_chip_reach_the_distillation_steps_alone(lab, flags_of_this_machine):
    config, student, mesh = flagged(lab.run.student, ""), lab.student, lab.student.mesh
    with pytest.raises(ConfigError, match="xla_no_such"):
        train.compile_steps(config, lab.run.kd, student, lab.teacher)
    data = upstream.sharding.get_input_data_sharding(config, mesh, rules=config.logical_axis_rules)
    plain = lab.run.kd.model_copy(update={"use_kd": False})
    (step, arguments), _ = train.jit_steps(config, plain, student, None, data, None)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        train.compiled(config, step.lower(student.state, *arguments, student.data_loader.load_next_batch()))


def test_the_flags_of_the_chip_reach_the_step_that_computes_targets(lab, flags_of_this_machine):
    config, mesh = flagged(lab.run.student, ""), lab.student.mesh
    step = targets.jitted(config, lab.run.kd, lab.teacher, mesh)
    batch = lab.student.data_loader.load_next_batch() | {
        targets.ROW_KEY: jnp.zeros(config.micro_batch_size_to_train_on, jnp.uint32)
    }
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        lowered = step.lower(lab.teacher.state, batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
        lowered.compile()
