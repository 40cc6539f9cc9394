"""What a whole run needs of memory, as the operating system counts it: the engine, both models and the loss."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SMOKE, environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# 4,096 tokens of a vocabulary of 131,072: the float32 logits of one model alone would be 2 GiB.
SHAPE = ["vocab_size=131072", "per_device_batch_size=128", "max_target_length=32", "override_model_config=true"]


# The trainer, which says at its end how large it was. What a parent is told of a child counts the size of the parent
# that it was forked from.
MEASURED = """
import atexit, re, runpy

def tell():
    print("peak KiB", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

atexit.register(tell)
runpy.run_path("MaxText/train.py", run_name="__main__")
"""


def peak_bytes(folder, *arguments):
    """The largest resident set of a run in a process of its own."""
    command = [sys.executable, "-c", MEASURED, SMOKE, *SHAPE, f"base_output_directory={folder}", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return int(re.search(r"peak KiB (\d+)", result.stdout)[1]) * 1024


def test_distillation_over_a_large_vocabulary_peaks_below_the_logits_of_one_model(tmp_path):
    # Measured: 1.79 to 1.84 GiB, of which 0.25 are XLA's, compiling.
    peak_bytes(tmp_path, "run_name=teacher", "steps=1", "num_vocab_tiling=8")
    kd = ("use_kd=true", f"kd_teacher_parameters_path={tmp_path}/teacher/checkpoints")
    assert peak_bytes(tmp_path, "run_name=student", "steps=2", "enable_checkpointing=false", *kd) < 2 * 2**30
