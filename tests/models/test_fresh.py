"""Laws of a student's beginning: where it stands, whom that touches, and what is said of one that is far off."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import lab as lab_lib
import numpy as np
import pytest
from conftest import SMOKE, few
from flax import nnx
from flax.core.spmd import logical_axis_rules
from test_families import FAMILIES, SHRUNK

from MaxText import upstream
from MaxText.config import resolve
from MaxText.loop import sanity
from MaxText.models import fresh
from MaxText.models import student as student_lib

pytestmark = pytest.mark.e2e

WIDTH, VOCABULARY = 64, 512
TIED = {"model_name": "tiny-qwen3"}  # width 96, not normalised
KD = {"use_kd": "true", "kd_teacher_parameters_path": "unread"}
DEFAULT = ("Qwen 2.5",)


def resolved(folder: Any, **keys: Any) -> Any:
    keys = {"base_output_directory": folder, "metrics_file": "", "enable_checkpointing": "false"} | keys
    return resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in keys.items())]).student


def set_up(folder: Any, **keys: Any) -> tuple[Any, student_lib.Student]:
    config = resolved(folder, **keys)
    return config, student_lib.set_up(config, upstream.start_engine(config))


def arrays(state: Any) -> dict[tuple[Any, ...], np.ndarray]:
    values = nnx.to_flat_state(nnx.filter_state(state, nnx.Not(nnx.RngState)))
    return {path: np.asarray(variable.get_value()) for path, variable in values}


def first_cross_entropy(config: Any, student: student_lib.Student) -> float:
    """Of the family's own forward pass, on random tokens."""
    batch = lab_lib.padded_batch(vocabulary=config.vocab_size)
    valid = batch["targets_segmentation"]

    def forward(state: nnx.State) -> jax.Array:
        logits = nnx.merge(student.graphdef, state, copy=True).model(
            decoder_input_tokens=batch["inputs"],
            decoder_positions=batch["inputs_position"],
            decoder_segment_ids=batch["inputs_segmentation"],
            enable_dropout=False,
        )
        log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -(jnp.take_along_axis(log_q, batch["targets"][..., None], -1)[..., 0] * valid).sum() / valid.sum()

    with jax.set_mesh(student.mesh), logical_axis_rules(config.logical_axis_rules):
        return float(jax.jit(forward)(student.state))


@pytest.mark.parametrize("name", few(DEFAULT, FAMILIES))
def test_a_fresh_student_of_every_family_begins_within_a_nat_of_guessing(name, tmp_path):
    family = FAMILIES[name]
    keys = SHRUNK | {"base_emb_dim": WIDTH, "vocab_size": VOCABULARY} | family.keys
    config, student = set_up(tmp_path, model_name=family.preset, **KD, **keys)
    assert first_cross_entropy(config, student) == pytest.approx(math.log(VOCABULARY), abs=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The train state of a student with a tied head, as upstream draws it."""
    config = resolved(tmp_path_factory.mktemp("plain"), **TIED)
    return arrays(nnx.split(upstream.train_utils.setup_train_loop(config, upstream.start_engine(config))[-1])[1])


@pytest.mark.parametrize("keys, std", [({}, 1), (KD, 96**-0.5), ({"kd_embedding_std": 0.02}, 0.02)])
def test_a_fresh_student_is_upstreams_but_for_the_scale_of_its_table(keys, std, plain, tmp_path):
    state = arrays(set_up(tmp_path, **TIED, **keys)[1].state)
    assert state.keys() == plain.keys()
    for path, value in plain.items():
        scale = np.float32(std) if path == fresh.TABLE else 1
        np.testing.assert_array_equal(state[path], value * scale)
    assert state[fresh.TABLE].std() == pytest.approx(std, rel=0.02)


def test_a_head_of_its_own_and_one_that_is_normalised_leave_the_table_as_upstream_draws_it(tmp_path):
    untied = resolved(tmp_path, **KD)
    normalised = resolved(tmp_path, **KD, **TIED, override_model_config="true", normalize_embedding_logits="true")
    assert fresh.table_std(untied) == fresh.table_std(normalised) == upstream.EMBEDDING_STD
    assert fresh.table_std(resolved(tmp_path, **KD, kd_embedding_std=0.5)) == 0.5


def test_a_student_of_given_parameters_keeps_its_table(plain, tmp_path):
    model = {path[1:]: value for path, value in plain.items() if path[0] == "model"}
    saved = {"params": nnx.traversals.unflatten_mapping(model)}
    upstream.checkpointing.save_params_to_path(str(tmp_path / "saved"), saved)
    _, student = set_up(tmp_path, **TIED, **KD, load_parameters_path=tmp_path / "saved/items")
    assert student.origin.startswith("load_parameters_path=")
    np.testing.assert_array_equal(arrays(student.state)[fresh.TABLE], plain[fresh.TABLE])


@pytest.fixture(scope="module")
def far(train, teacher, tmp_path_factory):
    """(settings, output) of a distillation of one step that moves nothing; its student begins with a large table."""
    keys = {**TIED, **KD, "kd_teacher_parameters_path": teacher, "kd_teacher_model_name": "tiny-llama"}
    keys |= {"base_output_directory": tmp_path_factory.mktemp("far"), "enable_checkpointing": "true"}
    keys |= {"kd_embedding_std": 0.75, "learning_rate": 1e-30}
    return keys, train("far", **keys, steps=1).output


def test_a_resumed_student_keeps_its_table(plain, far):
    keys, _ = far
    _, student = set_up(None, **keys, run_name="far", steps=2)
    assert (student.start_step, student.origin) == (1, "run_name=far")
    np.testing.assert_array_equal(arrays(student.state)[fresh.TABLE], plain[fresh.TABLE] * np.float32(0.75))


def test_a_student_that_begins_far_above_guessing_is_warned_of_before_its_first_row(far):
    _, output = far
    warning = "warning: THE STUDENT BEGINS FAR ABOVE GUESSING: its cross-entropy on the first training batch is "
    assert "fresh, with an embedding table of standard deviation 0.75" in output
    assert warning in output and output.index(warning) < output.index("\nstep ")
    assert "a head tied to an embedding table of standard deviation 0.75; kd_embedding_std=0.1 " in output


@pytest.mark.parametrize("origin, hint", [("", "of its own"), ("load_parameters_path='x'", "load_parameters_path='x'")])
def test_a_warning_names_what_the_student_began_from(origin, hint, tmp_path, capsys):
    config = resolved(tmp_path)
    sanity.check_student(config, origin, 1.4 * math.log(256), "a batch")
    assert not capsys.readouterr().out
    sanity.check_student(config, origin, 1.6 * math.log(256), "a batch")
    assert hint in capsys.readouterr().out
