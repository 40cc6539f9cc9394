"""Systematic draws from softmax(logits / T): evenly spaced points on the cumulative distribution, one random offset.

# n positions of a block, V vocabulary (or one device's shard of it), C chunks of S tokens, N draws

The expected number of a token's draws is N times its probability, as with independent draws, and it is always within
one of that. So the shares of N draws have less variance at the same size.

A point is looked for among the shards' masses, then among the chunks' of its shard, then among a chunk's tokens: no
sort, no array of [n, N, V]. Sums of floats that are taken in several orders need not ascend, so that at each level the
first part is taken that both has mass and reaches the point, or the last one with mass where none reaches it: a token
of mass 0 is never drawn, whatever the rounding.

Source: Madow and Madow, "On the Theory of Systematic Sampling" (1944).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from MaxText.distill.truncation import Scalar
from MaxText.distill.vocabulary import Vocabulary

# Tokens of a chunk; each point's chunk is looked at. It divides most vocabularies, so that nothing is filled up.
_CHUNK = 128


def systematic_draws(
    logits: Float[Array, "n V"],
    offsets: Float[Array, "n 1"],
    *,
    draws: int,
    temperature: Scalar,
    vocabulary: Vocabulary,
) -> Int[Array, "n N"]:
    """Token ids of the points (offset + j) / N of the cumulative distribution, ascending; a token's ids are its draws.

    Args:
        logits: float32, at temperature 1; -inf for tokens of mass 0, and finite for one at least.
        offsets: in [0, 1); uniform, one per position. The draws are a function of these and of the logits.
        draws: N. Static.
        temperature: T > 0.
        vocabulary: how the last axis is laid out. The ids are the same on all its devices.
    """
    maximum = vocabulary.maxima(lambda _, logits: logits, logits)
    # What is missing of the last chunk has no mass.
    missing = -logits.shape[-1] % _CHUNK
    padded = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    padded = padded.reshape(logits.shape[0], -1, _CHUNK)

    def weights(logits: Array, maximum: Array) -> Array:
        return jnp.exp((logits - maximum) / temperature)

    masses = jnp.sum(weights(padded, maximum[..., None]), axis=-1)
    own = jnp.sum(masses, axis=-1, keepdims=True)
    shards = vocabulary.shards(own)
    shard_ends = jnp.cumsum(shards, axis=-1)
    points = (offsets + jnp.arange(draws, dtype=jnp.float32)) * (shard_ends[:, -1:] / draws)
    shard = _reached(shards[:, None], shard_ends[:, None], points)
    before = vocabulary.own_shard(shard_ends - shards)

    chunk_ends = before + jnp.cumsum(masses, axis=-1)
    chunk = _reached(masses[:, None], chunk_ends[:, None], points)
    tokens = weights(jnp.take_along_axis(padded, chunk[..., None], axis=1), maximum[..., None])
    start = jnp.take_along_axis(chunk_ends - masses, chunk, axis=-1)
    token = _reached(tokens, start[..., None] + jnp.cumsum(tokens, axis=-1), points)
    return vocabulary.of_shard(shard, vocabulary.first(logits) + chunk * _CHUNK + token)


def _reached(masses: Float[Array, "n #N P"], ends: Float[Array, "n #N P"], points: Float[Array, "n N"]) -> Array:
    """Of P parts in a row the one in which each point lies."""
    has_mass = masses > 0.0
    parts = jnp.arange(masses.shape[-1], dtype=jnp.int32)
    reach = has_mass & (ends > points[..., None])
    last = jnp.max(jnp.where(has_mass, parts, 0), axis=-1)
    return jnp.minimum(jnp.min(jnp.where(reach, parts, masses.shape[-1]), axis=-1), last)
