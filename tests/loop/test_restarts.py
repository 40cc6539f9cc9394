"""Laws of what happens to runs: termination, kill -9, a changed configuration, divergence, a full disk, an early end.

The runs read rows of random tokens, each in its place: a restart that reads one batch twice, or none, has other losses.
What is signalled, and what tells by its status or its whole output, is a process; the rest runs in the test's own. All
runs have the learning rate's schedule in common, and so their programs. docs/design/restarts.md says what is promised.
"""

import contextlib
import io
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
import types

import jax
import numpy as np
import pytest
import token_rows
from conftest import ROOT, SMOKE, TRAIN, Result, execute, run_in_this_process, started
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import train as trainer
from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.loop import failures, manifest, termination

pytestmark = pytest.mark.e2e

CHECKPOINTING = "maxtext.common.checkpointing"
STEPS = 120
PERIOD = 20
# The trainer, which says what it compiles. (JAX_LOG_COMPILES is read when jax is imported, before the fork.)
COUNTING = """
import runpy
from jax import monitoring

def tell(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration":
        print("compiled", about.get("fun_name"), flush=True)

monitoring.register_event_duration_secs_listener(tell)
runpy.run_path("MaxText/train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Keys of a data set that is a little longer than a run, of 4 rows a step."""
    folder = tmp_path_factory.mktemp("data")
    return token_rows.KEYS | {
        "grain_train_files": token_rows.write(folder / "train.arrayrecord", 4 * (STEPS + 40) * [32], seed=0),
        "grain_eval_files": token_rows.write(folder / "eval.arrayrecord", 4 * [32], seed=1),
    }


@pytest.fixture(scope="module")
def kd(data, teacher):
    """Keys of a distillation on that data."""
    return data | {
        "use_kd": "true",
        "kd_teacher_parameters_path": teacher,
        "steps": STEPS,
        "learning_rate_schedule_steps": STEPS,
        "checkpoint_period": PERIOD,
        "max_num_checkpoints_to_keep": 2,
    }


@pytest.fixture(scope="module")
def plain(data):
    keys = {"steps": STEPS, "learning_rate_schedule_steps": STEPS, "checkpoint_period": 10_000}
    return data | keys | {"eval_interval": 50, "eval_start_step": 50, "eval_steps": 1}


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    script = tmp_path_factory.mktemp("program") / "train.py"
    script.write_text(COUNTING)
    return [str(script)]


@pytest.fixture(scope="module")
def whole(kd, counting, tmp_path_factory):
    """A distillation that nothing happens to."""
    return succeed(tmp_path_factory.mktemp("whole") / "run", kd, counting)


@pytest.fixture(scope="module")
def whole_plain(plain, tmp_path_factory):
    """A run without a teacher that nothing happens to."""
    return succeed(tmp_path_factory.mktemp("whole_plain") / "run", plain)


def arguments(folder, keys):
    """The command line of the run whose folder is `folder`."""
    keys = {"run_name": folder.name, "base_output_directory": folder.parent} | keys
    return [SMOKE, *(f"{key}={value}" for key, value in keys.items())]


def run(folder, keys, program=TRAIN):
    return execute(list(program), arguments(folder, keys), folder)


def succeed(folder, keys, program=None):
    """A run that ends well: in this process, unless it is of a program."""
    if program is None:
        return run_in_this_process(arguments(folder, keys), folder)
    result = run(folder, keys, program)
    assert result.status == 0, result.output[-4000:]
    return result


def refusal(folder, keys, error=ConfigError):
    """The message that a run is refused with before its first step."""
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(error) as raised:
        trainer.main(["train.py", *arguments(folder, keys)])
    assert not reaches(0)(output.getvalue())
    return str(raised.value)


def refusal_to_go_on(folder, keys):
    """The message that a run is refused with which stands in `folder`; everything is left as it was."""
    before = contents(folder)
    message = refusal(folder, keys)
    assert contents(folder) == before
    return message


def contents(folder):
    """Path -> bytes of every file of a run but its output."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def interrupted(folder, keys, number, ready, program=TRAIN):
    """A run that gets the signal `number` as soon as `ready(its output)`."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "interrupted.txt"
    output.unlink(missing_ok=True)
    with started(list(program), arguments(folder, keys), output) as process:
        deadline = time.monotonic() + 300
        while not (output.exists() and ready(output.read_text())):
            assert process.is_alive(), f"it ended before its moment:\n{output.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"its moment never came:\n{output.read_text()[-4000:]}"
            time.sleep(0.001)
        os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode is not None, "the signal did not end it"
        return Result(process.exitcode, output.read_text(), folder)


def reaches(step):
    """Whether an output has the line of `step` or a later one."""
    return lambda output: any(int(found) >= step for found in re.findall(r"^step +(\d+)/.*\n", output, re.M))


def last_step(output):
    return int(re.findall(r"^step +(\d+)/", output, re.M)[-1])


def checkpoints(folder):
    """The steps of the finished checkpoints."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def newest_is_finite(folder):
    """Whether the newest checkpoint can be read, and all its numbers are numbers."""
    stored = ocp.load(folder / f"checkpoints/{checkpoints(folder)[-1]}", checkpointable_name="items")
    arrays = [a for a in jax.tree.leaves(stored) if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)]
    return len(arrays) > 10 and all(np.isfinite(array).all() for array in arrays)


def copy(folder, tmp_path):
    """Another run that stands where the run in `folder` does, under its name."""
    shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / folder.name


def assert_equal(result, reference):
    """No row is lost or doubled, and the losses are the same bits."""
    for kind in ("learning/", "evaluation/"):
        assert [row["step"] for row in result.rows(kind)] == [row["step"] for row in reference.rows(kind)]
        losses = [name for name in reference.rows(kind)[0] if "loss" in name] if reference.rows(kind) else []
        for name in losses:
            np.testing.assert_array_equal(result.column(name), reference.column(name), err_msg=name)
    assert [row["step"] for row in result.rows()] == list(range(STEPS))


# Termination ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_kd", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_terminated_run_saves_its_last_step_and_goes_on_as_if_nothing_had_been(use_kd, request, tmp_path):
    keys = request.getfixturevalue("kd" if use_kd else "plain") | {"checkpoint_period": 10_000}
    reference = request.getfixturevalue("whole" if use_kd else "whole_plain")
    stopped = interrupted(tmp_path / "run", keys, signal.SIGTERM, reaches(30))
    assert stopped.status == 0, stopped.output[-4000:]
    assert "training stopped: SIGTERM" in stopped.output
    last = last_step(stopped.output)
    assert 30 <= last < STEPS - 1
    assert checkpoints(stopped.folder)[-1] == last
    again = succeed(stopped.folder, keys)
    assert f"steps {last + 1} to {STEPS - 1} (resumed)" in again.output
    assert_equal(again, reference)


@pytest.mark.parametrize(
    ("keys", "last"),
    [
        ({"save_checkpoint_on_start": "false"}, 0),
        # As long as a save is under way, orbax declines another.
        ({"enable_continuous_checkpointing": "true", "checkpoint_period": 2}, 2),
    ],
    ids=str,
)
def test_the_last_step_before_a_termination_is_saved_whichever_it_is(keys, last, tmp_path, monkeypatch):
    class Notice:
        asked = 0

        @property
        def received(self):
            self.asked += 1
            return self.asked > last

    monkeypatch.setattr(termination, "Notice", Notice)
    if "enable_continuous_checkpointing" in keys:
        decision = f"{CHECKPOINTING}._should_save_checkpoint_at_step"
        monkeypatch.setattr(decision, lambda manager, step, config, force: force)
    stopped = succeed(tmp_path / "run", keys)
    assert last_step(stopped.output) == last and "training stopped: SIGTERM" in stopped.output
    assert checkpoints(stopped.folder)[-1] == last


@pytest.mark.parametrize("is_finite", (True, False))
def test_hosts_ask_at_every_step_whether_they_are_to_stop(is_finite, monkeypatch):
    asked = []

    def reached_preemption(manager, step):
        asked.append(step)
        return step == 3

    monkeypatch.setattr(f"{CHECKPOINTING}.reached_preemption", reached_preemption)
    monkeypatch.setattr(f"{CHECKPOINTING}.maybe_save_checkpoint", lambda *arguments: None)
    monkeypatch.setattr(f"{CHECKPOINTING}.wait_until_finished", lambda manager: None)
    monkeypatch.setattr(upstream, "save_is_due", lambda manager, config, step: step % 2 == 1)
    student = types.SimpleNamespace(checkpoint_manager=object(), data_iterator=None)
    logger = types.SimpleNamespace(flush=lambda: None, state_is_finite=is_finite)
    with pytest.raises(upstream.exceptions.StopTraining, match="SIGTERM"):
        for step in range(9):
            trainer.save(None, student, None, logger, step)
    assert asked == [0, 1, 2, 3]


def test_an_interrupted_run_says_so_in_one_line_and_goes_on_from_its_newest_checkpoint(whole, kd, tmp_path):
    stopped = interrupted(tmp_path / "run", kd, signal.SIGINT, reaches(PERIOD + 5))
    assert stopped.status == 1, stopped.output[-4000:]
    assert stopped.output.endswith("interrupted; the same command goes on where the newest checkpoint stands\n")
    assert "Traceback" not in stopped.output
    assert checkpoints(stopped.folder)[-1] == PERIOD
    assert_equal(succeed(stopped.folder, kd), whole)


# kill -9 --------------------------------------------------------------------------------------------------------------


def compilations(result):
    return re.findall(r"^compiled (.*train_step.*)$", result.output, re.M)


def save_is_under_way(folder, step):
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return any(name.startswith(f"{step}.") for name in names)


def test_a_killed_run_goes_on_as_if_nothing_had_been_and_compiles_once(whole, kd, counting, tmp_path):
    folder = tmp_path / "run"
    killed = interrupted(folder, kd, signal.SIGKILL, lambda _: save_is_under_way(folder, 2 * PERIOD))
    assert killed.status == -signal.SIGKILL
    assert checkpoints(folder)[-1] in (PERIOD, 2 * PERIOD)
    killed = interrupted(folder, kd, signal.SIGKILL, reaches(3 * PERIOD + 7))
    assert "(resumed)" in killed.output
    again = succeed(folder, kd, counting)
    assert "(resumed)" in again.output
    assert_equal(again, whole)
    assert len(compilations(whole)) == 1
    assert compilations(again) == compilations(whole)


def test_a_complete_run_has_nothing_left_to_do_and_one_beyond_its_steps_is_refused(whole, kd, tmp_path):
    folder = copy(whole.folder, tmp_path)
    before = contents(folder)
    assert f"holds step {STEPS - 1}, the last of {STEPS}" in succeed(folder, kd).output
    assert contents(folder) == before
    assert f"a checkpoint already exists at step {STEPS - 1}" in refusal_to_go_on(folder, kd | {"steps": STEPS - 1})


@pytest.mark.slow
def test_it_may_be_killed_at_any_moment(whole, kd, tmp_path):
    moments = random.Random(0)
    keys = kd | {"checkpoint_period": 5}
    folder, began, kills = tmp_path / "run", 0, 0
    while kills < 8:
        # Of the start-up, or of the steps: far enough on average to come to the next checkpoint.
        step, seconds = began + moments.choice([-1, 2, 5, 7, 9]), moments.uniform(0, 0.05)
        if step >= STEPS - 5:
            shutil.rmtree(folder)
            began = 0
            continue

        def ready(output, step=step, seconds=seconds, began=began):
            if reaches(step)(output) or (step < began and "devices" in output):
                time.sleep(seconds)
                return True
            return False

        interrupted(folder, keys, signal.SIGKILL, ready)
        kills += 1
        finished = checkpoints(folder) if (folder / "checkpoints").exists() else []
        began = finished[-1] + 1 if finished else 0
    assert_equal(succeed(folder, keys), whole)


# The manifest ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_refused_another_teacher_and_other_settings_unless_allowed(whole, kd, tmp_path):
    folder = copy(whole.folder, tmp_path)
    other = whole.folder / f"checkpoints/{STEPS - 1}"  # a student is a teacher of the same shapes
    keys = kd | {"steps": STEPS + 5, "kd_alpha": 0.75, "kd_teacher_parameters_path": other}
    message = refusal_to_go_on(folder, keys)
    assert "kd_allow_change=False" in message
    assert "kd_alpha: 0.5 before, 0.75 now" in message
    assert re.search(rf"teacher: {kd['kd_teacher_parameters_path']}/5 \(.*\) before, {other} \(.*\) now", message)
    allowed = succeed(folder, keys | {"kd_allow_change": "true"})
    assert "warning: kd_allow_change=true: kd_alpha: 0.5 before, 0.75 now" in allowed.output
    assert "warning: kd_allow_change=true: teacher: " in allowed.output
    assert allowed.rows()[-1]["step"] == STEPS + 4
    # From now on these are what the run is held to.
    assert "kd_alpha: 0.75 before, 0.5 now" in refusal_to_go_on(folder, keys | {"steps": STEPS + 10, "kd_alpha": 0.5})


@pytest.mark.slow
def test_a_moved_teacher_and_another_block_size_are_no_change(whole, kd, tmp_path):
    moved = shutil.copytree(kd["kd_teacher_parameters_path"], tmp_path / "moved")
    folder = copy(whole.folder, tmp_path)
    keys = kd | {"steps": STEPS + 2, "kd_teacher_parameters_path": moved, "kd_block_mib": 64}
    again = succeed(folder, keys)
    assert f"the teacher has moved, its parameters are the same: {kd['kd_teacher_parameters_path']}/5" in again.output
    assert again.rows()[-1]["step"] == STEPS + 1


def test_a_run_without_a_teacher_is_refused_one_later(teacher, tmp_path):
    folder = copy(pathlib.Path(teacher).parent, tmp_path)  # it learned from the data alone
    message = refusal_to_go_on(folder, {"use_kd": "true", "kd_teacher_parameters_path": teacher, "steps": 10})
    assert "use_kd: False before, True now" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_the_fingerprint_sees_one_changed_element_an_exchange_and_another_name(dtype):
    def fingerprint(array, name="kernel"):
        return manifest.fingerprint(nnx.State({name: nnx.Param(array)}))

    array = jax.numpy.asarray(np.arange(12).reshape(3, 4) % 2, dtype)
    others = [
        (array.at[2, 1].set(0),),
        (array[:, jax.numpy.array([1, 0, 2, 3])],),
        (array.reshape(4, 3),),
        (array, "bias"),
    ]
    assert fingerprint(array) == fingerprint(array.copy())
    assert len({fingerprint(array), *(fingerprint(*other) for other in others)}) == 1 + len(others)


# What ends a run ------------------------------------------------------------------------------------------------------


def test_a_diverged_run_stops_and_its_newest_checkpoint_is_finite(whole, kd, tmp_path):
    folder = copy(whole.folder, tmp_path)
    # The first step's parameters are finite, their norm is not: it could go on, and is not saved.
    keys = {"steps": STEPS + 20, "learning_rate": 1e30, "checkpoint_period": 1, "abort_on_inf_loss": "false"}
    result = run(folder, kd | keys | {"learning_rate_schedule_steps": STEPS + 20})
    assert result.status == 1, result.output[-4000:]
    assert "Traceback" not in result.output
    assert "warning: not saved: the state is not finite" in result.output
    what = "(gradient norm nan, parameter norm nan)"
    assert f"error: step {STEPS + 1} left a state that is not finite {what}" in result.output
    assert [row["step"] for row in result.rows()] == list(range(STEPS + 2))
    assert checkpoints(folder)[-1] == STEPS - 1
    assert newest_is_finite(folder)


def test_what_is_not_finite_is_named():
    def divergence(**scalars):
        scalars = {"loss": 1.0, "ce_loss": 1.0, "kd_loss": 1.0, "grad_norm": 1.0, "param_norm": 1.0} | scalars
        skipped = {"optim/step_skipped": scalars.pop("step_skipped", 0.0)}
        return failures.divergence({f"learning/{name}": value for name, value in scalars.items()} | skipped, 7)[0]

    nan, inf = float("nan"), float("inf")
    assert divergence() == ""
    assert divergence(loss=nan, kd_loss=nan) == "the loss of step 7 is nan (kd nan)"
    assert divergence(param_norm=inf) == "step 7 left a state that is not finite (parameter norm inf)"
    assert divergence(grad_norm=nan) == "step 7 left a state that is not finite (gradient norm nan)"
    assert divergence(grad_norm=nan, step_skipped=1.0) == ""


def test_an_output_folder_that_cannot_be_one_is_named(plain, tmp_path):
    (tmp_path / "file").touch()
    keys = plain | {"base_output_directory": tmp_path / "file", "metrics_file": ""}
    message = refusal(tmp_path / "run", keys)
    assert f"base_output_directory='{tmp_path / 'file'}'" in message
    assert "Not a directory" in message


def test_evaluation_data_that_cannot_be_read_ends_a_run_with_a_message(plain, tmp_path):
    rows = token_rows.write(tmp_path / "eval.arrayrecord", 400 * [32], seed=3)
    written = bytearray(rows.read_bytes())
    written[1000:8000] = bytes(7000)  # the index at the end is whole: the file opens
    rows.write_bytes(written)
    keys = plain | {"grain_eval_files": rows, "steps": 3, "eval_start_step": 1, "eval_interval": 1, "eval_steps": 0}
    with pytest.raises(failures.RunError) as raised:
        succeed(tmp_path / "run", keys)
    message = str(raised.value)
    assert f"grain_eval_files='{rows}'" in message
    assert "the evaluation data could not be read" in message


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow  # Orbax, whose writer threads fail all at once, has been seen not to let the process end
def test_a_full_disk_ends_a_run_with_a_message_and_its_newest_checkpoint_is_whole(plain, small_disk, tmp_path):
    keys = plain | {"checkpoint_period": 5, "max_num_checkpoints_to_keep": 100}
    folder = small_disk / "run"
    result = execute(["MaxText/train.py"], arguments(folder, keys), tmp_path / "output")
    assert result.status == 1, result.output[-4000:]
    assert f"{ROOT}/MaxText/" not in result.output  # no traceback of ours; Orbax logs its threads' own
    message = result.output[result.output.rindex("error: ") :]
    assert f"base_output_directory='{small_disk}" in message
    assert "No space left" in message or "RESOURCE_EXHAUSTED" in message
    assert checkpoints(folder)[-1] >= 5
    assert newest_is_finite(folder)


# The teacher, looked at -----------------------------------------------------------------------------------------------


def test_a_teacher_that_knows_nothing_of_the_data_is_warned_of(whole):
    assert "warning: THE TEACHER IS NO BETTER THAN GUESSING" in whole.output


@pytest.mark.parametrize("eval_interval", [0, 50])
def test_a_teacher_above_kd_teacher_max_ce_is_refused_before_anything_is_written(kd, eval_interval, tmp_path):
    keys = kd | {"kd_teacher_max_ce": 3, "eval_interval": eval_interval, "save_checkpoint_on_start": "true"}
    folder = tmp_path / "run"
    batch = "the first evaluation batch" if eval_interval else "the first training batch"
    assert f"kd_teacher_max_ce=3: the teacher's cross-entropy on {batch} is " in refusal(folder, keys)
    assert checkpoints(folder) == []
    assert not (folder / "metrics.jsonl").exists() or Result(2, "", folder).rows() == []


# An early end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["target loss", "end of the data"])
def test_a_run_that_ends_early_ends_with_an_evaluation(plain, end, tmp_path):
    keys = plain | {"eval_start_step": 2, "eval_interval": 2}
    if end == "target loss":
        keys |= {"target_eval_loss": 100}
    else:
        keys |= {"grain_train_files": token_rows.write(tmp_path / "short.arrayrecord", 16 * [32], seed=2)}
    result = succeed(tmp_path / "run", keys)
    assert "training stopped: " in result.output
    last = last_step(result.output)
    assert last < STEPS - 1
    assert [row["step"] for row in result.rows("evaluation/")][-1] == last
    assert checkpoints(result.folder)[-1] == last
    if end == "end of the data":
        read = f"{last + 1} steps, 16 rows, {16 * 31} tokens read, 1 epoch"
        assert f"the training data has ended before step {last + 1} of {STEPS}: {read}" in result.output
