"""Trains a student against a frozen teacher, on MaxText.

    python MaxText/train.py <config>.yml use_kd=true kd_teacher_parameters_path=<checkpoint> key=value ...

The story, from top to bottom: configuration, student and data, teacher, steps, loop. Order matters: a wrong key is
reported before the engine is imported, a wrong checkpoint before the student's state is made. What a run survives, and
what a restart is held to: docs/design/restarts.md.
"""

import contextlib
import dataclasses
import datetime
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app
from etils import epath, epy
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.data import data_settings
from MaxText.config.keys import ConfigError, Distillation
from MaxText.config.teacher import resolve_teacher
from MaxText.console import RunError, end_with, first_line, say, waiting

with epy.lazy_imports():
    from MaxText.data import ahead, cached, coverage, faults, iterators, pipelines, templates, tokens
    from MaxText.loop import compute, ending, failures, flags, header, manifest, sanity, step, termination
    from MaxText.loop import metrics as metrics_lib
    from MaxText.models import heads, vocabularies
    from MaxText.models import student as student_lib
    from MaxText.models import teacher as teacher_lib


def main(argv: Sequence[str]) -> None:
    # 1. Configuration. Everything that is wrong with the input is raised as ConfigError, here or before the loop.
    run = resolve.initialize(list(argv))
    config, kd = run.student, run.kd
    checkpoint: Any = None
    teacher_config: Any = None
    if kd.has_teacher:
        checkpoint = teacher_lib.find_checkpoint(kd.kd_teacher_parameters_path)
        teacher_config = resolve_teacher(run, checkpoint.scan_layers)
    if kd.use_kd:
        vocabularies.check_same_tokens(config, kd)
    recorder = upstream.start_engine(config)
    tokens.check_fits(config)
    templates.check(config)
    stored = cached.find(config, kd)
    kd = cached.learned_from(kd, stored)
    for warning in kd.warnings():
        say(f"warning: {warning}")
    if warning := pipelines.taken_for_padding(config) if stored is None else cached.evaluated_on_less(config, stored):
        say(f"warning: {warning}")
    if not kd.use_kd and (option := upstream.needs_own_loop(config)):
        say(f"{option} is set: MaxText's own loop runs this, with its own console and metrics")
        for line in coverage.report(config, upstream.maxtext_utils.get_mesh_from_config(config)):
            say(line)
        refusals = student_lib.refusals_as_config_errors(config)
        with upstream.monitored(config, recorder), refusals, iterators.closed_at_the_end():
            upstream.train_utils.validate_train_config(config)
            with pipelines.mended(config):
                upstream.pre_train.run(config, recorder)
        return
    if is_complete(config):
        say(f"nothing left to do: {config.checkpoint_dir} holds step {config.steps - 1}, the last of {config.steps}")
        return

    with upstream.monitored(config, recorder), iterators.closed_at_the_end():
        # 2. Student and data: upstream's set-up, a checkpoint of this run restored if there is one.
        student = student_lib.set_up(config, recorder, stored)
        start_step = student.start_step

        # 3. Teacher: restored once, on the student's mesh. What was stored of one comes with the data.
        teacher = None
        if kd.has_teacher:
            with waiting("restoring the teacher"):
                mesh, dtype = student.mesh, kd.kd_teacher_dtype
                teacher = teacher_lib.load(teacher_config, checkpoint, mesh, dtype, kd.kd_vocab_size)
            if stored is not None:
                cached.check_same_teacher(kd, stored, manifest.fingerprint(teacher.state))
        manifest.keep(config, kd, teacher, student)  # a resumed run goes on as it began

        # 4. Steps: compiled before the loop, so that step 0 costs what every step costs.
        with waiting("compiling"):
            steps = compile_steps(config, kd, student, teacher)
        header.header(dataclasses.replace(run, kd=kd), student, teacher)
        for line in coverage.report(config, student.mesh):
            say(line)
        look = None  # at both models, on one batch: of evaluation or else the first of training
        if not kd.use_kd or not sanity.check_on_evaluation(config, kd, student, steps):
            look = functools.partial(sanity.check_on_first_step, config, kd, student.origin)

        # 5. Loop.
        of_step = compute.of_run(config, teacher_config if kd.teacher_in_step else None, student.mesh)
        logger = metrics_lib.MetricLogger(config, student.learning_rate_schedule, start_step, of_step)
        logger.write_setup_info_to_tensorboard(nnx.state(student.state, nnx.Param))
        with termination.noticed() as notice, failures.writing(config, student.checkpoint_manager):
            train(config, student, steps, logger, recorder, notice, look)


def is_complete(config: Any) -> bool:
    """Whether the newest checkpoint is the last step's: the run was stopped at its very end, and started again."""
    if not config.enable_checkpointing:
        return False
    return teacher_lib.committed_steps(epath.Path(config.checkpoint_dir))[-1:] == [config.steps - 1]


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


def compile_steps(config: Any, kd: Distillation, student: "student_lib.Student", teacher: Any) -> Steps:
    """Jits the steps and compiles them."""
    rules, eval_rules = config.logical_axis_rules, config.logical_axis_rules_for_eval
    data = upstream.sharding.get_input_data_sharding(config, student.mesh, rules=rules)
    eval_data = upstream.sharding.get_input_data_sharding(config, student.mesh, rules=eval_rules)
    (train_step, train_arguments), (evaluate, eval_arguments) = jit_steps(config, kd, student, teacher, data, eval_data)

    # Profile-guided compilation compiles by itself, later; a step that was loaded from a file is compiled.
    if not jax.config.jax_enable_pgle and not config.compiled_trainstep_file:
        with jax.set_mesh(student.mesh), logical_axis_rules(rules):
            batch = cached.shaped_batch(config, student.cached, batch_sharding=data)
            upstream.maxtext_utils.maybe_dump_jaxpr(config, train_step, (student.state, *train_arguments, batch))
            compiled(config, train_step.lower(student.state, *train_arguments, batch))
        if evaluate is not None:
            with jax.set_mesh(student.mesh), logical_axis_rules(eval_rules):
                batch = cached.shaped_batch(config, student.cached, batch_sharding=eval_data, is_eval=True)
                compiled(config, evaluate.lower(student.state, *eval_arguments, batch))

    return Steps(
        train=lambda state, batch: train_step(state, *train_arguments, batch),
        evaluate=(lambda state, batch: evaluate(state, *eval_arguments, batch)) if evaluate is not None else None,
        eval_data_sharding=eval_data,
    )


Jitted = tuple[Any, tuple]  # a jitted step, and what it takes between the state and the batch


def jit_steps(
    config: Any, kd: Distillation, student: "student_lib.Student", teacher: Any, data: Any, eval_data: Any
) -> tuple[Jitted, Jitted]:
    """The steps for training and evaluation; which ones is decided here, once, and not in traced code.

    The states may be shapes without values: nothing is computed (train_compile.py).
    """
    jit = functools.partial(jax.jit, compiler_options=flags.compiler_options(config, student.mesh, distils=kd.use_kd))
    plain_train, plain_eval = upstream.plain_steps(config, student, data, eval_data, jit)
    train_step: Jitted = plain_train, ()
    evaluate: Jitted = plain_eval, ()
    if kd.use_kd:
        graphdef = heads.ends_in_hidden_states(student.graphdef, student.state)
        temperature = student.cached.temperature if student.cached is not None else None
        models = step.Models(config, graphdef, None, None, kd, student.mesh, temperature)
        taught: Any = models, None, None  # by what was stored: no teacher's graph, state and shardings
        live = taught
        if teacher is not None:
            beside = dataclasses.replace(models, teacher_config=teacher.config, teacher=teacher.graphdef)
            live = beside, teacher.state, teacher.shardings
        if kd.distils:
            models, frozen, where = live if kd.teacher_in_step else taught
            function = named(step.train_step, models, student.params_shardings)
            given, returned = (student.state_shardings, where, data), (student.state_shardings, None)
            train_step = jit(function, in_shardings=given, out_shardings=returned, donate_argnums=0), (frozen,)
        if student.eval_data_iterator:
            models, frozen, where = live
            graphdef = upstream.pre_train.build_eval_graphdef(config, graphdef, student.state) or graphdef
            function = named(step.eval_step, dataclasses.replace(models, student=graphdef))
            evaluate = jit(function, in_shardings=(student.state_shardings, where, eval_data)), (frozen,)
    return train_step, evaluate


def named(function: Callable, *arguments: Any) -> Callable:
    """The function with its first arguments bound, under its name in profiles and XLA's dumps."""
    bound: Any = functools.partial(function, *arguments)
    bound.__name__ = function.__name__
    return bound


def compiled(config: Any, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program, with the options that its step was jitted with."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if re.match("INVALID_ARGUMENT.*option", str(error)):
            raise ConfigError(f"compile_xla_flags={config.compile_xla_flags!r}: {error}") from error
        raise


NO_TIME = datetime.timedelta(0)  # the logger takes the time of a step itself, when it is complete

# Loop -----------------------------------------------------------------------------------------------------------------


def train(
    config: Any,
    student: "student_lib.Student",
    steps: Steps,
    logger: "metrics_lib.MetricLogger",
    recorder: Any,
    notice: "termination.Notice",
    look: Callable[[dict[str, Any]], None] | None,
) -> nnx.State:
    """Runs the steps that are left. Step n is dispatched before step n - 1 is logged.

    Args:
      notice: of a termination signal, which ends the loop after the step at hand.
      look: is shown the first step's metrics before anything of that step is logged or saved; may raise.
    """
    state = student.state
    done = evaluated = student.start_step - 1
    terminated, batch = False, None
    profiler = upstream.profiler.Profiler(config, offset_step=student.start_step)
    shaped = cached.shaped_batch(config, student.cached)
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
                ahead.begin(student.data_iterator)
            upstream.dump_hlo_once(config, student.start_step, step_number, state)
            if look is not None and step_number == student.start_step:
                look(step_metrics["scalar"])
            logger.buffer_and_write_metrics(step_metrics, step_number, NO_TIME)
            done = step_number
            if steps.evaluate is not None and evaluation_is_due(config, step_number):
                evaluated = step_number
                evaluate(config, student, steps, state, logger, step_number)
            profiler.maybe_deactivate_profiler(step_number, state)
            save(config, student, state, logger, step_number)
            if notice.received:
                raise upstream.exceptions.StopTraining("SIGTERM has come")
    except upstream.exceptions.StopTraining as reason:
        profiler.deactivate()
        if upstream.is_data_failure(reason):
            what = faults.named(config, reason, ("train",)) or first_line(reason.__context__ or reason)
            kind = ConfigError if student.cached is None else RunError  # a cache has been looked at
            raise kind(f"{data_settings(config)}: {what}") from reason
        if upstream.is_end_of_data(reason):
            logger.flush()
            schedule, start = student.learning_rate_schedule, student.start_step
            say("\n".join(ending.data_has_ended(config, schedule, start, done, logger.tokens, batch)))
        else:
            say(f"training stopped: {reason}")
        terminated = upstream.is_termination(reason)  # there is little time then: the restart evaluates
        if steps.evaluate is not None and evaluated < done and not terminated:
            with contextlib.suppress(upstream.exceptions.StopTraining):
                evaluate(config, student, steps, state, logger, done)
    finally:
        logger.flush_metrics_and_cleanup()
    logger.check_has_learned()
    if config.save_checkpoint_on_completion or terminated:
        save(config, student, state, logger)
    if student.checkpoint_manager is not None:
        with failures.saving(config):
            upstream.checkpointing.wait_until_finished(student.checkpoint_manager)
        say(f"checkpoints: {config.checkpoint_dir}")
    return state


def save(
    config: Any,
    student: "student_lib.Student",
    state: nnx.State,
    logger: "metrics_lib.MetricLogger",
    step_number: int | None = None,
) -> None:
    """Saves if a save is due, after the last step (None) if that is not saved.

    Before it the step's row is written, so that no restart misses it, and its state is known to be finite.

    Raises:
      StopTraining: another host has had a termination signal.
    """
    manager = student.checkpoint_manager
    if manager is None:
        return
    iterator = student.data_iterator
    is_due = step_number is None or upstream.save_is_due(manager, config, step_number)
    if is_due:
        logger.flush()  # may say that the run has diverged
    if is_due and not logger.state_is_finite:
        say("warning: not saved: the state is not finite")
        is_due = False
    with failures.saving(config):
        if is_due and step_number is None:
            upstream.save_last_step(manager, state, config, iterator)
        elif is_due:
            upstream.checkpointing.maybe_save_checkpoint(manager, state, config, iterator, step_number)
        if step_number is not None:  # at each step, whatever came of it
            upstream.stop_if_told(manager, step_number)


def evaluation_is_due(config: Any, step_number: int) -> bool:
    """On upstream's interval, and after the last step."""
    if config.eval_interval <= 0:
        return False
    since = step_number - config.eval_start_step
    return step_number == config.steps - 1 or (since >= 0 and since % config.eval_interval == 0)


def evaluate(
    config: Any,
    student: "student_lib.Student",
    steps: Steps,
    state: nnx.State,
    logger: "metrics_lib.MetricLogger",
    step_number: int,
) -> None:
    """Hands the sums of every evaluation batch to the logger, which divides them once.

    Raises:
      StopTraining: the target loss is reached.
    """
    logger.flush()  # the step's own time ends here
    if hasattr(student.eval_data_iterator, "reset"):
        student.eval_data_iterator.reset()
    assert steps.evaluate is not None
    logger.reset_eval_metrics()
    count = 0
    batches = failures.batches(config, iter(student.eval_data_iterator))
    for count, batch in enumerate(batches, start=1):
        batch = jax.device_put(batch, steps.eval_data_sharding)
        with jax.set_mesh(student.mesh), logical_axis_rules(config.logical_axis_rules_for_eval):
            sums = steps.evaluate(state, batch)
        logger.buffer_and_write_metrics(sums, count - 1, NO_TIME, is_training=False)
        if 0 < config.eval_steps <= count:
            break
    if count == 0:
        say("warning: the evaluation data holds no row: nothing was evaluated")
    logger.finish_evaluation(step_number)


def command_line(argv: Sequence[str]) -> None:
    """`main`, with what ended it early as one message at the end of the output; status 2 for bad input, else 1."""
    try:
        main(argv)
    except (ConfigError, RunError) as error:
        if upstream.is_verbose() and error.__cause__ is not None:
            raise
        end_with(error, 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where the newest checkpoint stands")


if __name__ == "__main__":
    app.run(command_line)
