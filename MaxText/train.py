"""Trains a student against a frozen teacher, on MaxText.

    python MaxText/train.py <config>.yml use_kd=true kd_teacher_parameters_path=<checkpoint> key=value ...

The story, from top to bottom: configuration, student and data, teacher, steps, loop. Order matters: a wrong key is
reported before the engine is imported, a wrong checkpoint before the student's state is made.
"""

import contextlib
import dataclasses
import datetime
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app
from etils import epy
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import pyconfig, upstream

with epy.lazy_imports():
    from MaxText import heads, report, step
    from MaxText import metrics as metrics_lib
    from MaxText import teacher as teacher_lib


def main(argv: Sequence[str]) -> None:
    # 1. Configuration. Everything that is wrong with the input is raised as ConfigError, here or in 2 and 3.
    run = pyconfig.initialize(list(argv))
    config, kd = run.student, run.kd
    for warning in kd.warnings():
        report.say(f"warning: {warning}")
    checkpoint: Any = None
    teacher_config: Any = None
    if kd.use_kd:
        checkpoint = teacher_lib.find_checkpoint(kd.kd_teacher_parameters_path)
        teacher_config = pyconfig.teacher_config(run, checkpoint.scan_layers)
    recorder = upstream.start_engine(config)
    if not kd.use_kd and (option := upstream.needs_own_loop(config)):
        report.say(f"{option} is set: MaxText's own loop runs this, with its own console and metrics")
        with upstream.monitored(config, recorder), refusals_as_config_errors():
            upstream.train_utils.validate_train_config(config)
            upstream.pre_train.run(config, recorder)
        return

    with upstream.monitored(config, recorder):
        # 2. Student and data: upstream's set-up, a checkpoint of this run restored if there is one.
        student = set_up_student(config, recorder)
        start_step = student.start_step

        # 3. Teacher: restored once, on the student's mesh.
        teacher = None
        if kd.use_kd:
            teacher = teacher_lib.load(teacher_config, checkpoint, student.mesh, kd.kd_teacher_dtype)

        # 4. Steps: compiled before the loop, so that step 0 costs what every step costs.
        steps = compile_steps(config, kd, student, teacher)
        flops = upstream.tflops_per_step(config, teacher_config if kd.teacher_in_step else None)
        logger = metrics_lib.MetricLogger(config, student.learning_rate_schedule, start_step, flops)
        logger.write_setup_info_to_tensorboard(nnx.state(student.state, nnx.Param))
        report.header(run, student, teacher)

        # 5. Loop.
        train(config, student, steps, logger, recorder)


@dataclasses.dataclass
class Student:
    """What upstream's set-up makes: the train state on its shards, and everything that feeds and saves it."""

    graphdef: nnx.GraphDef
    state: nnx.State
    state_shardings: nnx.State
    params_shardings: nnx.State
    mesh: jax.sharding.Mesh
    learning_rate_schedule: Callable
    start_step: int
    data_loader: Any
    data_iterator: Any
    rampup_manager: Any
    eval_data_iterator: Any
    checkpoint_manager: Any


def set_up_student(config: Any, recorder: Any) -> Student:
    """Builds or restores the student's train state and opens the data.

    Raises:
      ConfigError: upstream refuses the settings, the data or the checkpoint.
    """
    with refusals_as_config_errors():
        upstream.train_utils.validate_train_config(config)
        (_, manager, shardings, model, mesh, schedule, iterator, loader, rampup, eval_iterator, train_state) = (
            upstream.train_utils.setup_train_loop(config, recorder)
        )
        start_step = upstream.pre_train.get_first_step(model, train_state)
        upstream.train_utils.validate_completed_steps(start_step, config.steps)
    graphdef, state = nnx.split(train_state)
    params_shardings, shardings = upstream.sharding.maybe_update_params_sharding_with_opt(config, shardings)
    return Student(
        graphdef=graphdef,
        # A restored state is not always on the shardings the step is compiled for: it would be compiled twice.
        state=jax.device_put(state, shardings),
        state_shardings=shardings,
        params_shardings=params_shardings,
        mesh=mesh,
        learning_rate_schedule=schedule,
        start_step=start_step,
        data_loader=loader,
        data_iterator=iterator,
        rampup_manager=rampup,
        eval_data_iterator=eval_iterator,
        checkpoint_manager=manager,
    )


@contextlib.contextmanager
def refusals_as_config_errors() -> Iterator[None]:
    """What upstream raises while it sets up a run is about the user's input; log_config=true shows its traceback."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError, OSError, NotImplementedError) as error:
        raise pyconfig.ConfigError(f"{str(error) or type(error).__name__} (log_config=true shows where)") from error


# Steps ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Steps:
    """The jitted steps with their constant arguments bound.

    Attributes:
      train: (state, batch) -> (new state, metrics); donates the state.
      evaluate: (state, batch) -> sums; None without evaluation data.
      eval_data_sharding: how an evaluation batch is laid out.
    """

    train: Callable
    evaluate: Callable | None
    eval_data_sharding: Any


def compile_steps(config: Any, kd: pyconfig.Distillation, student: Student, teacher: Any) -> Steps:
    """Jits the steps and compiles them."""
    rules, eval_rules = config.logical_axis_rules, config.logical_axis_rules_for_eval
    data = upstream.sharding.get_input_data_sharding(config, student.mesh, rules=rules)
    eval_data = upstream.sharding.get_input_data_sharding(config, student.mesh, rules=eval_rules)
    (train_step, train_arguments), (evaluate, eval_arguments) = jit_steps(config, kd, student, teacher, data, eval_data)

    options = upstream.max_utils.parse_libtpu_flags_to_dict(config.compile_xla_flags)
    # Profile-guided compilation compiles by itself, later; a step that was loaded from a file is compiled.
    if not jax.config.jax_enable_pgle and not config.compiled_trainstep_file:
        with jax.set_mesh(student.mesh), logical_axis_rules(rules):
            batch = upstream.maxtext_utils.get_shaped_batch(config, batch_sharding=data)
            upstream.maxtext_utils.maybe_dump_jaxpr(config, train_step, (student.state, *train_arguments, batch))
            train_step.lower(student.state, *train_arguments, batch).compile(compiler_options=options)
        if evaluate is not None:
            with jax.set_mesh(student.mesh), logical_axis_rules(eval_rules):
                batch = upstream.maxtext_utils.get_shaped_batch(config, batch_sharding=eval_data, is_eval=True)
                evaluate.lower(student.state, *eval_arguments, batch).compile(compiler_options=options)

    return Steps(
        train=lambda state, batch: train_step(state, *train_arguments, batch),
        evaluate=(lambda state, batch: evaluate(state, *eval_arguments, batch)) if evaluate is not None else None,
        eval_data_sharding=eval_data,
    )


Jitted = tuple[Any, tuple]  # a jitted step, and what it takes between the state and the batch


def jit_steps(
    config: Any, kd: pyconfig.Distillation, student: Student, teacher: Any, data: Any, eval_data: Any
) -> tuple[Jitted, Jitted]:
    """The steps for training and evaluation; which ones is decided here, once, and not in traced code.

    The states may be shapes without values: nothing is computed (train_compile.py).
    """
    plain_train, plain_eval = upstream.train_utils.jit_train_and_eval_step(
        config,
        student.graphdef,
        student.mesh,
        student.state,
        student.state_shardings,
        upstream.pre_train.train_step,
        upstream.pre_train.eval_step,
        student.eval_data_iterator,
        student.params_shardings,
    )
    eval_graphdef = upstream.pre_train.build_eval_graphdef(config, student.graphdef, student.state)
    if plain_eval is not None and eval_graphdef is not None:
        shardings, eval_step = student.state_shardings, upstream.pre_train.eval_step
        plain_eval = upstream.train_utils.jit_eval_step(config, eval_graphdef, shardings, eval_data, eval_step)
    train_step: Jitted = plain_train, ()
    evaluate: Jitted = plain_eval, ()
    if kd.use_kd:
        graphdef = heads.ends_in_hidden_states(student.graphdef, student.state)
        models = step.Models(config, graphdef, teacher.config, teacher.graphdef, kd, student.mesh)
        if kd.teacher_in_step:
            train_step = jit_train_step(models, student, teacher, data), (teacher.state,)
        if student.eval_data_iterator:
            evaluate = jit_eval_step(models, student, teacher, eval_data), (teacher.state,)
    return train_step, evaluate


def jit_train_step(models: "step.Models", student: Student, teacher: Any, data_sharding: Any) -> Any:
    return jax.jit(
        functools.partial(step.train_step, models, student.params_shardings),
        in_shardings=(student.state_shardings, teacher.shardings, data_sharding),
        out_shardings=(student.state_shardings, None),
        donate_argnums=0,
    )


def jit_eval_step(models: "step.Models", student: Student, teacher: Any, data_sharding: Any) -> Any:
    graphdef = upstream.pre_train.build_eval_graphdef(models.config, models.student, student.state)
    return jax.jit(
        functools.partial(step.eval_step, dataclasses.replace(models, student=graphdef or models.student)),
        in_shardings=(student.state_shardings, teacher.shardings, data_sharding),
    )


NO_TIME = datetime.timedelta(0)  # the logger takes the time of a step itself, when it is complete

# Loop -----------------------------------------------------------------------------------------------------------------


def train(config: Any, student: Student, steps: Steps, logger: "metrics_lib.MetricLogger", recorder: Any) -> nnx.State:
    """Runs the steps that are left. Step n is dispatched before step n - 1 is logged."""
    state, manager = student.state, student.checkpoint_manager
    profiler = upstream.profiler.Profiler(config, offset_step=student.start_step)
    shaped = upstream.maxtext_utils.get_shaped_batch(config)
    upstream.train_utils.prepare_before_run_start(
        config, state, student.learning_rate_schedule, student.start_step, student.mesh, student.data_loader, shaped
    )
    logger.start_clock()
    try:
        for step_number in range(student.start_step, config.steps):
            profiler.maybe_activate_profiler(step_number, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step_number):
                batch = student.data_loader.load_next_batch(rampup_manager=student.rampup_manager)
                with (
                    upstream.goodput.maybe_record_goodput(recorder, upstream.goodput.GoodputEvent.STEP, step_number),
                    jax.set_mesh(student.mesh),
                    logical_axis_rules(config.logical_axis_rules),
                ):
                    state, step_metrics = steps.train(state, batch)
            upstream.dump_hlo_once(config, student.start_step, step_number, state)
            evaluated = steps.evaluate is not None and evaluation_is_due(config, step_number)
            if evaluated:
                logger.flush()
                logger.time_step(step_metrics)
                evaluate(config, student, steps, state, logger)
            profiler.maybe_deactivate_profiler(step_number, state)
            logger.buffer_and_write_metrics(step_metrics, step_number, NO_TIME)
            if evaluated:
                logger.start_clock()
            upstream.checkpointing.maybe_save_checkpoint(manager, state, config, student.data_iterator, step_number)
    except upstream.exceptions.StopTraining as reason:
        profiler.deactivate()
        if upstream.is_data_failure(reason):
            raise pyconfig.ConfigError(str(reason)) from reason
        report.say(f"training stopped: {reason}")
    finally:
        logger.flush_metrics_and_cleanup()
    if manager is not None and config.save_checkpoint_on_completion:
        with contextlib.suppress(upstream.exceptions.StopTraining):  # a termination signal, which stopped the loop
            upstream.checkpointing.maybe_save_checkpoint(manager, state, config, student.data_iterator)
    if manager is not None:
        upstream.checkpointing.wait_until_finished(manager)
    if manager is not None:
        report.say(f"checkpoints: {config.checkpoint_dir}")
    return state


def evaluation_is_due(config: Any, step_number: int) -> bool:
    """On upstream's interval, and after the last step."""
    if config.eval_interval <= 0:
        return False
    since = step_number - config.eval_start_step
    return step_number == config.steps - 1 or (since >= 0 and since % config.eval_interval == 0)


def evaluate(config: Any, student: Student, steps: Steps, state: nnx.State, logger: Any) -> None:
    """Hands the sums of every evaluation batch to the logger, which divides them once."""
    if hasattr(student.eval_data_iterator, "reset"):
        student.eval_data_iterator.reset()
    assert steps.evaluate is not None
    logger.reset_eval_metrics()
    count = 0
    for count, batch in enumerate(student.eval_data_iterator, start=1):
        batch = jax.device_put(batch, steps.eval_data_sharding)
        with jax.set_mesh(student.mesh), logical_axis_rules(config.logical_axis_rules_for_eval):
            sums = steps.evaluate(state, batch)
        logger.buffer_and_write_metrics(sums, count - 1, NO_TIME, is_training=False)
        # Before the next fetch: hosts whose data has ended would wait for one that goes on.
        if 0 < config.eval_steps <= count:
            break
    if count == 0:
        report.say("warning: the evaluation data holds no full batch: nothing was evaluated")


def command_line(argv: Sequence[str]) -> None:
    """`main`, with bad input as one message at the end of the output and status 2."""
    try:
        main(argv)
    except pyconfig.ConfigError as error:
        if upstream.is_verbose() and error.__cause__ is not None:
            raise
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(command_line)
