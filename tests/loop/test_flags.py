"""Laws of what XLA is told: a distillation step has its chip's flags, wherever it is compiled; the run's own win."""

import types

import numpy as np
import pytest

from MaxText.chips import CHIPS
from MaxText.config.keys import ConfigError
from MaxText.loop import flags

WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


def mesh(kind):
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)]))


def options(kind="TPU v5 lite", own="", distils=True):
    return flags.compiler_options(types.SimpleNamespace(compile_xla_flags=own), mesh(kind), distils=distils)


def test_a_distillation_step_has_the_flags_of_its_chip():
    assert options() == {WINDOWED: "1000000"}
    assert options("cpu") is None and options("NVIDIA H100 80GB HBM3") is None


def test_the_engine_s_own_runs_have_their_own_flags_alone():
    assert options(distils=False) is None
    assert options(own="--xla_a=1", distils=False) == {"xla_a": "1"}


def test_a_run_s_flags_win_over_its_chip_s_one_by_one():
    assert options(own=f"--{WINDOWED}=5") == {WINDOWED: "5"}
    assert options(own="--xla_a=1") == {WINDOWED: "1000000", "xla_a": "1"}


def test_each_file_of_flags_is_of_a_chip_and_holds_flags():
    files = {file.stem for file in flags.FLAGS.glob("*.yml")}
    assert "v5e" in files and files <= {chip.name for chip in CHIPS.values()}
    assert all(flags.parsed(flags.of_chip(chip)) for chip in CHIPS.values() if chip.name in files)


def test_what_is_no_flag_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"compile_xla_flags='nonsense'.*--key=value"):
        options(own="nonsense")
