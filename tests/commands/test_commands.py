"""Laws of every command: asked for help it says what it does, and does nothing."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("scripts/**/*")]
    if path.suffix == ".sh" or (path.suffix == ".py" and "__main__" in path.read_text())
)


def test_there_are_commands():
    assert {"setup.sh", "scripts/demo/run.py", "scripts/launch_gpu.sh"} <= set(COMMANDS)


@pytest.mark.e2e
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_asked_for_help_says_what_it_does_and_does_nothing(command, tmp_path):
    program = "bash" if command.endswith(".sh") else sys.executable
    asked = subprocess.run(
        [program, str(ROOT / command), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (asked.returncode, asked.stderr) == (0, "")
    assert os.path.basename(command) in asked.stdout
    assert len(asked.stdout.splitlines()) > 1
    assert not os.listdir(tmp_path)
