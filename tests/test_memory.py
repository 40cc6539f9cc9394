"""What a whole run needs of memory, as the operating system counts it: the engine, both models and the loss."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, SMOKE, environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# 4,096 tokens of a vocabulary of 131,072: the float32 logits of one model alone would be 2 GiB.
SHAPE = ["vocab_size=131072", "per_device_batch_size=128", "max_target_length=32", "override_model_config=true"]


def peak_bytes(folder, *arguments):
    """The largest resident set of a run in a process of its own; a fork would count what it shares."""
    command = [sys.executable, "MaxText/train.py", SMOKE, *SHAPE, f"base_output_directory={folder}", *arguments]
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment(), stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        assert process.returncode == 0, output.read()[-3000:]
    return usage.ru_maxrss * 1024


def test_distillation_over_a_large_vocabulary_peaks_below_1_8_gib(tmp_path):
    peak_bytes(tmp_path, "run_name=teacher", "steps=1", "num_vocab_tiling=8")
    kd = ("use_kd=true", f"kd_teacher_parameters_path={tmp_path}/teacher/checkpoints")
    assert peak_bytes(tmp_path, "run_name=student", "steps=2", "enable_checkpointing=false", *kd) < 1.8 * 2**30
