"""Set-up without a network: what is asked for is exact, and what cannot work says so in one line."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = sorted(ROOT.glob("requirements*.txt"))
PIN = re.compile(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*")


def specifiers(file: Path) -> list[str]:
    """The lines of a requirements file that name packages."""
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r ")]


def setup(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of setup.sh in `folder`, so that no outcome can touch this checkout's .venv."""
    shutil.copy(ROOT / "setup.sh", with_makefile(folder))
    return subprocess.run(
        [shutil.which("bash"), "setup.sh", *args], cwd=folder, env=os.environ | env, capture_output=True, text=True
    )


def write_script(path: Path, body: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


def make(*args: str, cwd: Path) -> str:
    """What make prints; its own variables are dropped, since these tests themselves run under make."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PLATFORM"))}
    return subprocess.run(["make", *args], cwd=cwd, env=env, capture_output=True, text=True, check=True).stdout


def with_makefile(folder: Path) -> Path:
    for file in ("Makefile", "pyproject.toml", *(path.name for path in REQUIREMENTS)):
        shutil.copy(ROOT / file, folder)
    return folder


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A python3.12 on PATH that makes a .venv of itself and logs installations; where `broken` exists they fail."""
    (tmp_path / "bin").mkdir()
    write_script(
        tmp_path / "bin/python3.12",
        """case "$*" in
          *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "$*" >.venv/pyvenv.cfg; echo venv >>log ;;
          *install*) echo install >>log; [ ! -e broken ] ;;
          *import*) echo "$0" ;;
        esac""",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return tmp_path


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda path: path.name)
def test_every_package_is_pinned_to_one_exact_version(file):
    assert [line for line in specifiers(file) if not PIN.fullmatch(line)] == []


def test_no_package_is_pinned_twice():
    names = [re.split("==", line)[0].lower() for file in REQUIREMENTS for line in specifiers(file)]
    assert sorted(names) == sorted(set(names))


def test_platform_requirements_add_to_the_common_ones():
    for platform in ("tpu", "gpu"):
        assert "-r requirements.txt" in (ROOT / f"requirements-{platform}.txt").read_text().splitlines()


def test_the_project_does_not_take_the_name_of_the_engine():
    assert 'name = "maxtext-distillation"' in (ROOT / "pyproject.toml").read_text()
    assert "maxtext==0.2.5" in specifiers(ROOT / "requirements.txt")


@pytest.mark.parametrize(
    "script", ["setup.sh", ".ci/run", "deploy/restartable.sh", "deploy/slurm.sbatch", "scripts/launch_gpu.sh"]
)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_an_unknown_platform_is_refused_in_one_line(tmp_path):
    result = setup(tmp_path, "abacus")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "setup.sh: unknown platform 'abacus': allowed are cpu, tpu and gpu\n"


def test_without_a_suitable_python_one_line_says_what_to_install_and_nothing_is_made(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("dirname", "cat", "sha256sum", "cut", "grep", "touch", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    write_script(tools / "python3.12", "exit 127")  # a shim of a version that is not selected
    write_script(tools / "python3", "exit 1")  # an older Python
    result = setup(tmp_path, PATH=str(tools), HOME=str(tmp_path), PYENV_ROOT=str(tmp_path / "pyenv"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "install" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_environment_made_by_hand_is_left_alone(tmp_path):
    config = tmp_path / ".venv/pyvenv.cfg"
    config.parent.mkdir()
    config.write_text("home = /usr/bin\n")
    result = setup(tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert config.read_text() == "home = /usr/bin\n"


def test_a_second_run_installs_nothing(stand_in):
    assert setup(stand_in).returncode == 0
    log = (stand_in / "log").read_text()
    assert log.startswith("venv\ninstall\n")
    assert setup(stand_in).returncode == 0
    assert (stand_in / "log").read_text() == log


def test_an_interrupted_run_leaves_no_stamp_and_the_next_starts_afresh(stand_in):
    (stand_in / "broken").touch()
    assert setup(stand_in).returncode != 0
    assert not (stand_in / ".venv/.installed").exists()
    (stand_in / "broken").unlink()
    assert setup(stand_in).returncode == 0
    assert (stand_in / ".venv/.installed").exists()
    assert (stand_in / "log").read_text().count("venv") == 2


def test_another_platform_gets_an_environment_of_its_own(stand_in):
    assert setup(stand_in).returncode == 0
    assert setup(stand_in, "gpu").returncode == 0
    assert (stand_in / "log").read_text().count("venv") == 2
    assert make("-n", "-W", "pyproject.toml", "test", cwd=with_makefile(stand_in)).startswith("bash setup.sh gpu\n")


@pytest.mark.parametrize("target", ["demo", "demo-smollm2", "test", "test-slow", "check", "bench"])
def test_make_targets_set_up_a_missing_environment_first(target, tmp_path):
    assert make("-n", target, cwd=with_makefile(tmp_path)).startswith("bash setup.sh cpu\n")


def test_make_alone_lists_every_target():
    targets = [line.split()[0] for line in make(cwd=ROOT).splitlines()]
    tests = ["check", "test-fast", "test", "test-slow"]
    assert targets == ["help", "demo", "demo-smollm2", *tests, "bench", "fit", "fit-table", "clean"]
