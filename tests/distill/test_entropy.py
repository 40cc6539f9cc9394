"""Laws of the entropies that positions are chosen by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_blockwise import in_four_devices

from MaxText.distill.entropy import entropies
from MaxText.distill.projection import Projection

N, D, V = 50, 8, 300


def project(head, hidden):
    return hidden @ head


def inputs(scale=1.0):
    random = np.random.default_rng(0)
    hidden, head = random.normal(size=(N, D)), scale * random.normal(size=(D, V))
    mask = random.random(N) < 0.6
    return *(jnp.asarray(x, jnp.float32) for x in (hidden, head)), jnp.asarray(mask)


def reference(hidden, head, mask):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    q = weights / weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mask, -np.where(q > 0, q * np.log(q), 0).sum(-1), 0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_they_are_those_of_the_softmax_whatever_the_block(scale):
    hidden, head, mask = inputs(scale)
    expected = reference(hidden, head, mask)
    for block_size in (1, 7, N):
        found = entropies(Projection(hidden, head, project), mask, block_size=block_size)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_tokens_without_mass_and_masked_positions_are_not_read():
    hidden, head, mask = inputs()

    def without_some(head, hidden):
        return jnp.where(jnp.arange(V) < V // 2, hidden @ head, -jnp.inf)

    hidden = jnp.where(mask[:, None], hidden, jnp.nan)
    found = entropies(Projection(hidden, head, without_some), mask, block_size=16)
    expected = reference(jnp.nan_to_num(hidden), head[:, : V // 2], mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def check_shards():
    hidden, head, mask = inputs()
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    hidden, mask = hidden[:48], mask.at[:12].set(False)[:48]
    expected = reference(hidden, head, mask)
    for token_axes, pooled in ((("data",), ()), (("data", "tensor"), ("tensor",))):

        def local(hidden, head, mask, pooled=pooled):
            model = Projection(hidden, head, project)
            return entropies(model, mask, block_size=5, vocab_axis="tensor", pooled_axis=pooled)

        tokens = P(token_axes)
        specs = (P(token_axes, None), P(None, "tensor"), tokens)
        found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens))(hidden, head, mask)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_on_shards_of_the_vocabulary_they_are_the_same():
    in_four_devices(check_shards)


def test_no_gradient_flows_through_them_and_a_block_has_a_token():
    hidden, head, mask = inputs()

    def total(head, block_size):
        return entropies(Projection(hidden, head, project), mask, block_size=block_size).sum()

    assert not np.any(jax.grad(total)(head, 8))
    with pytest.raises(ValueError, match="block_size=0"):
        total(head, 0)
