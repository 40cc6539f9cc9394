"""Laws of the heads: the blockwise loss projects as the decoder does, and its blocks fit the memory they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMOKE
from flax import nnx
from flax.core.spmd import logical_axis_rules

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.teacher import resolve_teacher
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


def model_and_config(**keys):
    arguments = ["train.py", SMOKE, *(f"{key}={value}" for key, value in keys.items())]
    run = resolve.initialize(arguments)
    config = upstream.with_vocab_tiling(resolve_teacher(run, True) if run.kd.use_kd else run.student)
    mesh = upstream.maxtext_utils.get_mesh_from_config(config)
    create, _ = upstream.model_creation_utils.create_nnx_abstract_model(config, mesh)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        return jax.jit(create)(), config


@pytest.mark.parametrize("name", (*HEADS, *FP8))
def test_the_projection_is_that_of_the_decoders_own_head(name):
    if name in FP8:
        model, config = model_and_config(use_kd=True, kd_teacher_parameters_path="x", kd_teacher_overrides=FP8[name])
        scale = model.decoder.logits_dense.kernel_scale
        scale.set_value(jax.random.uniform(jax.random.key(1), scale.get_value().shape, minval=0.1, maxval=0.3))
    else:
        model, config = model_and_config(**HEADS[name])
    last = jax.random.normal(jax.random.key(0), (2, 5, config.emb_dim), jnp.float32).astype(config.dtype)
    with jax.set_mesh(model.mesh), logical_axis_rules(config.logical_axis_rules):
        expected = model.logits_from_hidden_states_for_vocab_tiling(last, True, "train")
        hidden = heads.normed_hidden_states(model, {"decoder": {"hidden_states": (last,)}}, enable_dropout=False)
        got = heads.project(*heads.head_of(model), heads.flat(hidden))
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(heads.flat(expected), np.float32).astype(np.float32)
    )


def test_a_decoder_that_ends_in_hidden_states_has_the_same_state():
    model, _ = model_and_config()
    graphdef, state = nnx.split(model)
    changed = heads.ends_in_hidden_states(graphdef, state)
    assert jax.tree.structure(nnx.state(nnx.merge(changed, state))) == jax.tree.structure(state)
    assert nnx.merge(changed, state).decoder.config.num_vocab_tiling > 1


@pytest.mark.parametrize(("vocabulary", "mib", "top_p"), [(131072, 256, 0.0), (131072, 256, 0.9), (512, 64, 0.0)])
def test_a_block_fits_its_budget(vocabulary, mib, top_p):
    keys = {"use_kd": True, "kd_block_mib": mib, "kd_top_p": top_p}
    arguments = [f"{key}={value}" for key, value in keys.items()]
    kd = resolve.initialize(["train.py", SMOKE, "kd_teacher_parameters_path=x", *arguments]).kd
    tokens = heads.block_tokens(vocabulary, kd)
    copies = 4 if top_p else 3
    assert tokens % 8 == 0 and tokens * copies * vocabulary * 4 <= mib * 2**20
    assert (tokens + 128) * copies * vocabulary * 4 > mib * 2**20
