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

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from MaxText.distill.truncation import Scalar
from MaxText.distill.vocabulary import CHUNK_VALUES, Vocabulary

# Tokens of a chunk, at most: the width of an accelerator's registers. It divides most vocabularies, so that nothing is
# filled up.
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

    def by(chunk: int, on_cpu: bool) -> Callable[[Array, Array], Array]:
        return functools.partial(_drawn, draws, temperature, vocabulary, chunk, on_cpu)

    on_cpu = by(_narrow_chunk(logits.shape[-1]), on_cpu=True)
    return jax.lax.platform_dependent(logits, offsets, cpu=on_cpu, default=by(_CHUNK, on_cpu=False))


def _narrow_chunk(tokens: int) -> int:
    """For a CPU: the sum over chunks and the looks at the tokens of those that points lie in then take equally long."""
    return min(_CHUNK, 1 << max(3, (tokens // 16).bit_length() // 2))


def _drawn(
    draws: int,
    temperature: Scalar,
    vocabulary: Vocabulary,
    chunk: int,
    on_cpu: bool,
    logits: Float[Array, "n V"],
    offsets: Float[Array, "n 1"],
) -> Int[Array, "n N"]:
    maximum = vocabulary.maxima(lambda _, logits: logits, logits)
    # What is missing of the last chunk has no mass.
    missing = -logits.shape[-1] % chunk
    padded = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    padded = padded.reshape(logits.shape[0], -1, chunk)

    def weights(logits: Array) -> Array:
        found = jnp.exp((logits - maximum[..., None]) / temperature)
        # XLA for CPUs takes exponentials one by one, and several times, where they are not written.
        return jax.lax.optimization_barrier(found) if on_cpu else found

    masses = _masses(padded, weights, CHUNK_VALUES if on_cpu else None)
    own = jnp.sum(masses, axis=-1, keepdims=True)
    shards = vocabulary.shards(own)
    shard_ends = jnp.cumsum(shards, axis=-1)
    points = (offsets + jnp.arange(draws, dtype=jnp.float32)) * (shard_ends[:, -1:] / draws)
    shard = _reached(shards[:, None], shard_ends[:, None], points)
    before = vocabulary.own_shard(shard_ends - shards)

    chunk_ends = before + jnp.cumsum(masses, axis=-1)
    place = (_searched if on_cpu else _reached)(masses[:, None], chunk_ends[:, None], points)
    tokens = weights(jnp.take_along_axis(padded, place[..., None], axis=1))
    start = jnp.take_along_axis(chunk_ends - masses, place, axis=-1)
    token = _reached(tokens, start[..., None] + jnp.cumsum(tokens, axis=-1), points)
    return vocabulary.of_shard(shard, vocabulary.first(logits) + place * chunk + token)


def _masses(padded: Float[Array, "n C S"], weights: Callable[[Array], Array], slab: int | None) -> Float[Array, "n C"]:
    """The mass of each chunk, in slabs of so many values at a time, which stay in a CPU's cache, if asked for."""
    n, chunks, size = padded.shape
    per_slab = chunks if slab is None else max(1, slab // (n * size))
    slabs = chunks // per_slab

    def sums(of: Array) -> Array:
        return jnp.sum(weights(of), axis=-1)

    if slabs <= 1:
        return sums(padded)
    rest = chunks % per_slab

    def visit(i: Array) -> Array:
        return sums(jax.lax.dynamic_slice_in_dim(padded, rest + i * per_slab, per_slab, axis=1))

    others = jnp.moveaxis(jax.lax.map(visit, jnp.arange(slabs)), 0, 1).reshape(n, -1)
    return jnp.concatenate([sums(padded[:, :rest]), others], axis=1) if rest else others


def _reached(masses: Float[Array, "n #N P"], ends: Float[Array, "n #N P"], points: Float[Array, "n N"]) -> Array:
    """Of P parts in a row the one in which each point lies."""
    has_mass = masses > 0.0
    parts = jnp.arange(masses.shape[-1], dtype=jnp.int32)
    reach = has_mass & (ends > points[..., None])
    last = jnp.max(jnp.where(has_mass, parts, 0), axis=-1)
    return jnp.minimum(jnp.min(jnp.where(reach, parts, masses.shape[-1]), axis=-1), last)


def _searched(masses: Float[Array, "n 1 P"], ends: Float[Array, "n 1 P"], points: Float[Array, "n N"]) -> Array:
    """The same by bisection: the logarithm of P looks at a point, one after the other."""
    has_mass = masses[:, 0] > 0.0
    # Ascending, and a part without mass ends where the one before it does.
    ends = jax.lax.cummax(jnp.where(has_mass, ends[:, 0], -jnp.inf), axis=1)
    found = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(ends, points)
    last = jnp.max(jnp.where(has_mass, jnp.arange(ends.shape[1], dtype=jnp.int32), 0), axis=1, keepdims=True)
    return jnp.minimum(found.astype(jnp.int32), last)
