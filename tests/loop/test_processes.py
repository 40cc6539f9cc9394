"""Several processes train as one: connected on loopback, each with devices of its own."""

import contextlib
import pathlib
import socket
import tempfile
import time

import numpy as np
import pytest
import token_rows
from conftest import SMOKE, TRAIN, Result, environment, forked, locked, run_here

pytestmark = pytest.mark.e2e

COORDINATOR_PORT = 1234  # MaxText's, on CPUs; no setting changes it


def two_processes(folder, *arguments, program=TRAIN):
    """The trainer, or another program, as two processes of two devices each, as a launcher on CPUs starts them."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {"JAX_COORDINATOR_ADDRESS": "localhost", "JAX_PROCESS_COUNT": "2", "PROCESSES_IN_JOB": "2", "JOB_INDEX": "0"}
    command = [SMOKE, f"base_output_directory={folder}", "skip_jax_distributed_system=false", *arguments]
    outputs = [folder / f"process{index}.txt" for index in range(2)]
    with contextlib.ExitStack() as stack:
        # All workers of all sessions on this machine have one port to share.
        stack.enter_context(locked(pathlib.Path(tempfile.gettempdir(), f"port{COORDINATOR_PORT}.lock")))
        wait_for_port(COORDINATOR_PORT)
        processes = []
        for index, output in enumerate(outputs):
            variables = environment(devices=2) | job | {"JOB_COMPLETION_INDEX": str(index)}
            started = forked(run_here, (list(program), command, str(output), variables))
            processes.append(stack.enter_context(started))
        for process in processes:
            process.join(300)
        statuses = [process.exitcode for process in processes]
    texts = [output.read_text() for output in outputs]
    assert statuses == [0, 0], "\n".join(text[-3000:] for text in texts)
    return texts


def wait_for_port(port):
    """Until what else coordinates at `port` on this machine has left."""
    for _ in range(60):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return
        time.sleep(1)
    pytest.skip(f"port {port} is taken by another program")


@pytest.fixture(scope="module")
def keys(teacher):
    keys = {"use_kd": "true", "kd_teacher_parameters_path": teacher, "per_device_batch_size": 1}
    return keys | {"checkpoint_period": 2, "learning_rate_schedule_steps": 6}


@pytest.fixture(scope="module")
def one(train, keys):
    """The same batches on one device."""
    return train("one_process", **keys | {"per_device_batch_size": 4})


def assert_same_run(both, one):
    assert [row["step"] for row in both.rows()] == list(range(6))
    for name in ("loss", "kd_loss", "ce_loss", "raw_grad_norm", "total_weights"):
        np.testing.assert_allclose(both.column(f"learning/{name}"), one.column(f"learning/{name}"), rtol=5e-4)
    assert sorted(path.name for path in both.folder.glob("*.jsonl")) == ["metrics.jsonl"]


def test_two_processes_train_as_one_and_leave_one_checkpoint_and_one_metrics_file(keys, one, tmp_path):
    first, second = two_processes(tmp_path, *(f"{key}={value}" for key, value in keys.items()), "run_name=both")
    assert "step 5" in first and "step " not in second
    assert (tmp_path / "both/checkpoints/5/items").exists()
    assert_same_run(Result(0, first, tmp_path / "both"), one)


@pytest.mark.slow
def test_two_processes_go_on_as_one_that_was_never_stopped(keys, one, tmp_path):
    keys = keys | {"eval_interval": 3, "eval_steps": 1, "run_name": "both"}
    arguments = [f"{key}={value}" for key, value in keys.items()]
    two_processes(tmp_path, *arguments, "steps=4")
    assert (tmp_path / "both/checkpoints/3/items").exists()
    resumed, _ = two_processes(tmp_path, *arguments)
    assert "(resumed)" in resumed
    assert_same_run(Result(0, resumed, tmp_path / "both"), one)


@pytest.mark.slow
def test_two_processes_evaluate_all_of_the_data_though_one_has_more_of_it(teacher, tmp_path):
    lengths = [33, 20, 9, 2, 31, 12, 25, 7, 18]  # five rows for one process, four for the other: three batches and two
    file = token_rows.write(tmp_path / "rows.arrayrecord", lengths, seed=1)
    data = token_rows.KEYS | {"grain_train_files": file, "grain_eval_files": file, "num_epoch": 9}
    keys = {"use_kd": "true", "kd_teacher_parameters_path": teacher, "per_device_batch_size": 1}
    own = data | {"eval_interval": 2, "eval_steps": -1, "steps": 2, "enable_checkpointing": "false", "run_name": "both"}
    two_processes(tmp_path, *(f"{key}={value}" for key, value in (keys | own).items()))
    targets = sum(min(length, 32) - 1 for length in lengths)
    assert Result(0, "", tmp_path / "both").column("evaluation/total_weights") == [targets, targets]
