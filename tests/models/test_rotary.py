"""Laws of Llama 3's rotary positions: each model of a process has the scaling that its own configuration says."""

import jax
import numpy as np
import pytest
from conftest import SMOKE
from flax import nnx

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.keys import ConfigError
from MaxText.config.teacher import resolve_teacher

pytestmark = pytest.mark.e2e

STUDENT = ["model_name=llama3.2-1b", "override_model_config=true", "base_num_decoder_layers=1"]
KD = ["use_kd=true", "kd_teacher_parameters_path=unread"]
OLDER = "kd_teacher_model_name=llama3.1-8b"


def initialize(folder, *arguments):
    given = [SMOKE, f"base_output_directory={folder}", "metrics_file=", "enable_checkpointing=false"]
    return resolve.initialize(["train.py", *given, *STUDENT, *KD, *arguments])


def rotary(config):
    """The module of rotary positions in the model of a configuration, built as shapes."""
    mesh = jax.sharding.Mesh(upstream.maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = upstream.model_creation_utils.create_nnx_abstract_model(config, mesh)[1]
    found = [module for _, module in nnx.iter_graph(model) if isinstance(module, upstream.embeddings.RotaryEmbedding)]
    assert len(found) == 1
    return found[0]


def wavelengths(width, factor, low=1.0, high=4.0, original=8192):
    """Of the pairs of a head, in tokens per radian: Meta's definition, band by band, in float64."""
    found = []
    for pair in range(width // 2):
        radians = 5e5 ** (2 * pair / width)
        turns = original / (2 * np.pi * radians)
        kept = (turns - low) / (high - low)
        if turns > high:
            found.append(radians)
        elif turns < low:
            found.append(radians * factor)
        else:
            found.append(1 / ((1 - kept) / factor / radians + kept / radians))
    return np.repeat(found, 2)


def stretched(module):
    return np.asarray(module.timescale).ravel()


def test_teacher_and_student_of_one_process_each_scale_positions_by_their_own_factor(tmp_path):
    run = initialize(tmp_path, OLDER)
    student, teacher = rotary(run.student), rotary(resolve_teacher(run, True))
    np.testing.assert_allclose(stretched(student), wavelengths(64, 32), rtol=1e-5)
    np.testing.assert_allclose(stretched(teacher), wavelengths(128, 8), rtol=1e-5)
    assert type(teacher) is upstream.embeddings.LLaMARotaryEmbedding  # the engine's own, to the last bit
    again = rotary(initialize(tmp_path, OLDER, "rope_llama3_factor=8").student)
    np.testing.assert_allclose(stretched(again), wavelengths(64, 8), rtol=1e-5)


def test_each_constant_reaches_the_model_of_student_and_teacher(tmp_path):
    constants = {"factor": 5.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0, "original_length": 300}
    keys = {f"rope_llama3_{name}": value for name, value in constants.items()}
    run = initialize(tmp_path, OLDER, f"kd_teacher_overrides={keys}".replace("'", ""))
    expected = wavelengths(128, 5, 1.5, 6, 300)
    np.testing.assert_allclose(stretched(rotary(resolve_teacher(run, True))), expected, rtol=1e-5)
    run = initialize(tmp_path, *(f"{key}={value}" for key, value in keys.items()))
    np.testing.assert_allclose(stretched(rotary(run.student)), wavelengths(64, 5, 1.5, 6, 300), rtol=1e-5)
    own = resolve_teacher(run, True)  # of the student's architecture: with its constants
    np.testing.assert_allclose(stretched(rotary(own)), wavelengths(64, 5, 1.5, 6, 300), rtol=1e-5)


def test_a_scaling_that_is_switched_off_scales_nothing(tmp_path):
    plain = rotary(initialize(tmp_path, "rope_use_scale=false").student)
    np.testing.assert_allclose(stretched(plain), np.repeat(5e5 ** (np.arange(0, 64, 2) / 64), 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("rope_llama3_factor=0.5", "rope_llama3_factor=0.5: Input should be greater than or equal to 1"),
        ("rope_llama3_original_length=0", "rope_llama3_original_length=0: Input should be greater than 0"),
        ("rope_llama3_low_freq_factor=4", "rope_llama3_low_freq_factor=4: below rope_llama3_high_freq_factor, 4"),
        ("kd_teacher_overrides={rope_llama3_high_freq_factor: 1}", "the teacher's settings: .*below rope_llama3_high"),
    ],
)
def test_constants_out_of_their_ranges_are_refused(argument, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        resolve_teacher(initialize(tmp_path, argument), True)
