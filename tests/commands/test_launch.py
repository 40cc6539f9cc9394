"""Laws of the launchers: the status that a scheduler sees, nodes that train as one, Slurm's part, images."""

import contextlib
import fnmatch
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMOKE, Result, environment

RESTARTABLE = ["bash", str(ROOT / "deploy/restartable.sh")]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def write_program(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


@contextlib.contextmanager
def group(command, **options):
    """A process of which nothing is left at the end, nor of the processes that it has started."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# The status -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_the_status_is_the_commands_own(status):
    assert subprocess.run([*RESTARTABLE, "bash", "-c", f"exit {status}"]).returncode == status


def test_the_command_gets_its_words_as_they_are():
    words = ["a b", "", "$x", "'", "{y: 1}"]
    shown = subprocess.run([*RESTARTABLE, "printf", "<%s>", *words], capture_output=True, text=True).stdout
    assert shown == "".join(f"<{word}>" for word in words)


@pytest.mark.parametrize(
    ("on_term", "status"),
    [("sleep 0.2; exit 0", 143), ("exit 0", 143), ("exit 1", 1), ("trap - TERM; kill $$", 143)],
    ids=["saves and ends well", "ends well at once", "fails to save", "dies"],
)
@pytest.mark.parametrize("signals", [1, 2])
def test_a_run_that_ends_well_because_of_sigterm_is_to_be_started_again(on_term, status, signals):
    program = f"trap '{on_term}' TERM; echo ready; while :; do sleep 0.05; done"
    with group([*RESTARTABLE, "bash", "-c", program], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert process.wait(10) == status


# One machine, several nodes -------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path):
    """A copy of the launcher with a python that shows how it is called."""
    for script in ("scripts/launch_gpu.sh", "deploy/restartable.sh"):
        (tmp_path / script).parent.mkdir(parents=True)
        shutil.copy(ROOT / script, tmp_path / script)
    shown = "JAX_COORDINATOR_IP JAX_COORDINATOR_PORT NNODES NODE_RANK"
    write_program(tmp_path / ".venv/bin/python", f'printf "%s\\n" "$@"; for v in {shown}; do echo "$v=${{!v:-}}"; done')

    def launch(*words, **variables):
        command = ["bash", "scripts/launch_gpu.sh", *words]
        kept = {key: value for key, value in os.environ.items() if key != "NODE_RANK"}
        return subprocess.run(command, cwd=tmp_path, env=kept | variables, capture_output=True, text=True)

    return launch


def test_a_node_alone_connects_to_nobody(stand_in):
    lines = stand_in("my.yml", "steps=3", JAX_COORDINATOR_IP="left over").stdout.splitlines()
    assert lines[0] == "MaxText/train.py" and lines[1].endswith("/my.yml")
    assert lines[2:4] == ["hardware=gpu", "steps=3"]
    assert "JAX_COORDINATOR_IP=" in lines


def test_nodes_are_told_where_the_first_is_and_which_they_are(stand_in):
    lines = stand_in("my.yml", NNODES="3", NODE_RANK="2", COORDINATOR="node0:6002").stdout.splitlines()
    assert lines[-4:] == ["JAX_COORDINATOR_IP=node0", "JAX_COORDINATOR_PORT=6002", "NNODES=3", "NODE_RANK=2"]


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ([], {}, "CONFIG.yml"),
        (["steps=3"], {}, "CONFIG.yml"),
        (["my.yml"], {"NNODES": "two"}, "NNODES=two"),
        (["my.yml"], {"NNODES": "2", "COORDINATOR": "node0:6002"}, "NODE_RANK="),
        (["my.yml"], {"NNODES": "2", "NODE_RANK": "2", "COORDINATOR": "node0:6002"}, "NODE_RANK=2"),
        (["my.yml"], {"NNODES": "2", "NODE_RANK": "0", "COORDINATOR": "node0"}, "HOST:PORT"),
    ],
)
def test_a_launch_that_cannot_work_says_why_in_one_line(stand_in, words, variables, said):
    result = stand_in(*words, **variables)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


@contextlib.contextmanager
def two_nodes(folder, *keys):
    """launch_gpu.sh on two nodes, which are this machine's CPU twice -> the two processes."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("", 0)) as free:
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = ["bash", "scripts/launch_gpu.sh", SMOKE, "skip_jax_distributed_system=false", "run_name=both"]
    command += [f"base_output_directory={folder}", *keys]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(2):
            nodes = {"NNODES": "2", "NODE_RANK": str(rank), "COORDINATOR": coordinator}
            variables = os.environ | environment(devices=2) | nodes
            output = stack.enter_context((folder / f"node{rank}.txt").open("w"))
            started = group(command, cwd=ROOT, env=variables, stdout=output, stderr=output)
            processes.append(stack.enter_context(started))
        yield processes


def statuses(processes):
    return [process.wait(300) for process in processes]


def wait_for_rows(path, count):
    for _ in range(600):
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.5)
    raise AssertionError(f"{path} has fewer than {count} rows after 5 minutes")


@pytest.mark.slow
@pytest.mark.e2e
def test_two_nodes_that_are_asked_to_leave_save_one_step_and_go_on_from_it(tmp_path):
    """SIGTERM comes to one of them; jax.distributed agrees with the other on the step."""
    keys = ["per_device_batch_size=1", "checkpoint_period=100000", "learning_rate_schedule_steps=100000"]
    with two_nodes(tmp_path, *keys, "steps=100000") as processes:
        wait_for_rows(tmp_path / "both/metrics.jsonl", 5)
        processes[1].send_signal(signal.SIGTERM)
        assert statuses(processes) == [0, 143], (tmp_path / "node0.txt").read_text()[-3000:]
    last = 3 + max(int(path.name) for path in (tmp_path / "both/checkpoints").iterdir() if path.name.isdigit())
    with two_nodes(tmp_path, *keys, f"steps={last + 1}") as processes:
        assert statuses(processes) == [0, 0], (tmp_path / "node0.txt").read_text()[-3000:]
    assert "step " not in (tmp_path / "node1.txt").read_text()
    assert [row["step"] for row in Result(0, "", tmp_path / "both").rows()] == list(range(last + 1))


# Slurm ----------------------------------------------------------------------------------------------------------------


def sbatch(folder, srun, *words):
    """deploy/slurm.sbatch, with programs of this name in Slurm's place: srun is `srun`, scontrol notes its words."""
    write_program(folder / "bin/srun", srun)
    write_program(folder / "bin/scontrol", f'echo "$@" >{folder}/scontrol')
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    command = ["bash", ROOT / "deploy/slurm.sbatch", *words]
    return subprocess.run(command, cwd=folder, env=os.environ | environment() | slurm, capture_output=True, text=True)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (143, True)])
def test_a_job_is_queued_again_only_after_a_termination(tmp_path, status, requeued):
    assert sbatch(tmp_path, f"exit {status}", "my.yml").returncode == status
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"


def test_a_job_without_a_config_is_refused(tmp_path):
    result = sbatch(tmp_path, "exit 0")
    assert result.returncode == 2 and "CONFIG.yml" in result.stderr


# What srun does with two tasks on one node: their ranks, and the worst of their statuses.
SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
worst=0
for task in $first $second; do wait $task; status=$?; ((status > worst)) && worst=$status; done
exit $worst
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_tasks_of_a_job_find_each_other_by_what_slurm_tells_them(tmp_path):
    keys = ["skip_jax_distributed_system=false", "run_name=job", f"base_output_directory={tmp_path}", "steps=3"]
    result = sbatch(tmp_path, SRUN, SMOKE, *keys)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("2 x cpu") == 1  # one header, of both tasks' devices
    assert [row["step"] for row in Result(0, "", tmp_path / "job").rows()] == [0, 1, 2]


# Images ---------------------------------------------------------------------------------------------------------------


def instructions(dockerfile):
    """A Dockerfile's instructions: [(name, rest), ...]."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def copied(dockerfile):
    """What is copied before the whole tree is."""
    sources = [shlex.split(rest)[:-1] for name, rest in instructions(dockerfile) if name == "COPY"]
    assert sources[-1] == ["."]
    return [source for group in sources[:-1] for source in group]


def is_ignored(path):
    """Whether .dockerignore names the path or a folder above it; ** stands for any number of folders."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    places = [path, *map(str, list(Path(path).parents)[:-1])]
    return any(
        fnmatch.fnmatch(place, pattern) or fnmatch.fnmatch(f"/{place}", pattern.replace("**", "*"))
        for place in places
        for pattern in patterns
    )


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_files_that_exist_and_installs_no_other_versions_than_setup_does(dockerfile):
    files = copied(dockerfile)
    assert all((ROOT / name).is_file() and not is_ignored(name) for name in files)
    runs = " ".join(rest for name, rest in instructions(dockerfile) if name == "RUN")
    (requirements,) = re.findall(r"-r (\S+)", runs)
    platform = dockerfile.suffix[1:]
    assert requirements == f"requirements-{platform}.txt"
    included = re.findall(r"^-r (\S+)", (ROOT / requirements).read_text(), re.MULTILINE)
    assert {requirements, *included} == set(files)
    setup = (ROOT / "setup.sh").read_text()
    assert "$(grep '^uv==' requirements.txt)" in runs and "$(grep '^uv==' requirements.txt)" in setup
    assert not re.search(r"[a-z]==|[a-z]>=", runs.replace("'^uv=='", ""))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_images_python_is_one_that_the_project_allows(dockerfile):
    base = dict(instructions(dockerfile))["FROM"]
    assert base == "python:3.12-slim"
    assert 'requires-python = ">=3.12,<3.14"' in (ROOT / "pyproject.toml").read_text()


def test_an_image_holds_what_is_tracked_and_nothing_that_is_made_here():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [path for path in tracked.splitlines() if is_ignored(path)] == []
    for made in (
        ".venv/bin/python",
        ".venv-xpk/bin/xpk",
        ".git/config",
        "runs/demo/demo.png",
        "MaxText/__pycache__/x.pyc",
    ):
        assert is_ignored(made), made
