"""Laws of the heads: the blockwise loss projects as the decoder does, and its blocks fit the memory they are given."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMOKE, environment, few
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.teacher import resolve_teacher
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens
from MaxText.distill.kd_loss import kd_sums
from MaxText.models import heads

pytestmark = pytest.mark.e2e

TIED = {"model_name": "tiny-qwen3", "override_model_config": "true"}
HEADS = {
    "untied": {},
    "untied, bfloat16": {"dtype": "bfloat16", "logits_dot_in_fp32": "false", "cast_logits_to_fp32": "false"},
    "untied, bfloat16, float32 product": {"dtype": "bfloat16", "logits_dot_in_fp32": "true"},
    "tied": TIED,
    "tied, bfloat16": TIED | {"dtype": "bfloat16"},
    "tied, scaled": TIED | {"normalize_embedding_logits": "true"},
    "tied, soft cap": TIED | {"final_logits_soft_cap": 3.0, "logits_dot_in_fp32": "true"},
}


# Of a teacher: no student's weights are held so.
FP8 = {
    "fp8": {"weight_dtype": "float8_e4m3fn"},
    "fp8, scales of blocks": {"weight_dtype": "float8_e4m3fn", "weight_block_size": 32},
}


def run_and_model(**keys):
    """A run, and its student; its teacher where there is one."""
    run = resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in keys.items())])
    config = upstream.with_vocab_tiling(resolve_teacher(run, True) if run.kd.use_kd else run.student)
    mesh = upstream.maxtext_utils.get_mesh_from_config(config)
    create, _ = upstream.model_creation_utils.create_nnx_abstract_model(config, mesh)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        return run, jax.jit(create)()


# Each kind of head once, one of them in bfloat16; the others in the long matrix.
DEFAULT = ("untied, bfloat16, float32 product", "tied, scaled", "tied, soft cap", "fp8, scales of blocks")


@pytest.mark.parametrize("name", few(DEFAULT, (*HEADS, *FP8)))
def test_the_projection_is_that_of_the_decoders_own_head(name):
    if name in FP8:
        _, model = run_and_model(use_kd=True, kd_teacher_parameters_path="x", kd_teacher_overrides=FP8[name])
        scale = model.decoder.logits_dense.kernel_scale
        scale.set_value(jax.random.uniform(jax.random.key(1), scale.get_value().shape, minval=0.1, maxval=0.3))
    else:
        _, model = run_and_model(**HEADS[name])
    config = model.config
    last = jax.random.normal(jax.random.key(0), (2, 5, config.emb_dim), jnp.float32).astype(config.dtype)
    with jax.set_mesh(model.mesh), logical_axis_rules(config.logical_axis_rules):
        expected = model.logits_from_hidden_states_for_vocab_tiling(last, True, "train")
        hidden = heads.normed_hidden_states(model, {"decoder": {"hidden_states": (last,)}}, enable_dropout=False)
        got = heads.project(*heads.head_of(model), heads.flat(hidden))
    assert got.dtype == (jnp.float32 if config.logits_dot_in_fp32 else config.dtype)
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(heads.flat(expected), np.float32).astype(np.float32)
    )


def test_a_decoder_that_ends_in_hidden_states_has_the_same_state():
    _, model = run_and_model()
    graphdef, state = nnx.split(model)
    changed = heads.ends_in_hidden_states(graphdef, state)
    assert jax.tree.structure(nnx.state(nnx.merge(changed, state))) == jax.tree.structure(state)
    assert nnx.merge(changed, state).decoder.config.num_vocab_tiling > 1


BLOCKS = ({"kd_top_p": 0.9}, 4), ({"dtype": "bfloat16"}, 3), ({}, 3)


@pytest.mark.parametrize(("keys", "copies"), few(BLOCKS[:2], BLOCKS), ids=str)
def test_a_block_of_the_step_stays_under_kd_block_mib(keys, copies):
    """On a CPU, where logits are cast to float32 whatever the head computes in."""
    budget = {"use_kd": True, "kd_teacher_parameters_path": "x", "kd_block_mib": 1, "per_device_batch_size": 32}
    run, model = run_and_model(**budget, **keys)
    walk = heads.walk_of(model.mesh, run.student, model.config, run.kd)
    per_token = copies * 4 * run.student.vocab_size
    assert walk.rounds > 1 and walk.block * per_token <= 2**20 < 2 * walk.block * per_token


def objective_and_flops(rows, length=32):
    """Of random hidden states on four devices: what the loss is and its gradient, by devices and as defined; FLOPs."""
    keys = {"use_kd": True, "kd_teacher_parameters_path": "x", "kd_temperature": 2.0}
    run, model = run_and_model(per_device_batch_size=rows / 4, max_target_length=length, **keys)
    config, weights = run.student, Weights(alpha=jnp.float32(0.7), temperature=jnp.float32(2), z_weight=1e-3)
    random = jax.random.split(jax.random.key(0), 4)
    student, teacher = (jax.random.normal(key, (rows, length, config.emb_dim)) for key in random[:2])
    targets = jax.random.randint(random[2], (rows, length), 0, config.vocab_size)
    tokens = Tokens(targets, jax.random.uniform(random[3], (rows, length)) < 0.7)
    head = heads.head_of(model)

    def by_devices(student):
        sides = (heads.Side(config, head, hidden) for hidden in (student, teacher))
        return heads.kd_objective(model.mesh, run.kd, *sides, tokens, weights, evaluation=False)[0]

    def defined(student):
        logits = (heads.project(*head, hidden) for hidden in (student, teacher))
        sums = kd_sums(*logits, *tokens, temperature=weights.temperature)
        return 0.3 * sums.ce_sum + 0.7 * sums.kd_sum + weights.z_weight * sums.log_z_sq_sum

    with jax.set_mesh(model.mesh), logical_axis_rules(config.logical_axis_rules):
        program = jax.jit(jax.value_and_grad(by_devices)).lower(student).compile()
        return program(student), jax.value_and_grad(defined)(student), program.cost_analysis()["flops"]


def check_few_rows():
    flops = {}
    for rows in (2, 4):
        got, expected, flops[rows] = objective_and_flops(rows)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(got[1], expected[1], atol=1e-5 * np.abs(expected[1]).max())
    assert flops[2] < 0.6 * flops[4], flops


@pytest.mark.slow
def test_a_token_s_loss_is_computed_by_one_device_also_where_there_are_more_devices_than_rows():
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [os.path.dirname(__file__), *sys.path]))}
    command = [sys.executable, "-c", "import test_heads; test_heads.check_few_rows()"]
    process = subprocess.run(command, env=os.environ | environment(4) | paths, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
