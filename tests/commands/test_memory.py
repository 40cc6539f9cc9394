"""What a whole run needs of memory, as the operating system counts it, does not grow with logits."""

import re

import pytest
from conftest import SMOKE, execute

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

VOCABULARY, LENGTH = 16384, 32
ROWS = (64, 256)

# The trainer, which says at its end how large it was. What a parent is told of a child counts the size of the parent
# that it was forked from.
MEASURED = """
import atexit, re, runpy

def tell():
    print("peak KiB", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

atexit.register(tell)
runpy.run_path("MaxText/train.py", run_name="__main__")
"""


def test_a_distillation_of_more_tokens_does_not_grow_by_their_logits(tmp_path):
    """Of two runs, so that what both hold (imports, models, one block of logits) is no part of it."""
    (tmp_path / "train.py").write_text(MEASURED)

    def peak_bytes(name, *arguments):
        shape = [f"vocab_size={VOCABULARY}", "override_model_config=true", f"max_target_length={LENGTH}"]
        given = [SMOKE, *shape, f"base_output_directory={tmp_path}", f"run_name={name}", "steps=2", *arguments]
        result = execute([str(tmp_path / "train.py")], given, tmp_path)
        assert result.status == 0, result.output[-3000:]
        return int(re.search(r"peak KiB (\d+)", result.output)[1]) * 1024

    peak_bytes("teacher", "checkpoint_period=1")
    kd = ("use_kd=true", f"kd_teacher_parameters_path={tmp_path}/teacher/checkpoints", "enable_checkpointing=false")
    few, many = (peak_bytes(f"student{rows}", f"per_device_batch_size={rows}", *kd) for rows in ROWS)
    logits = (ROWS[1] - ROWS[0]) * LENGTH * VOCABULARY * 4  # of one model: 384 MiB
    assert many - few < logits / 4
