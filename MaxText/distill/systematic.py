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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from MaxText.distill.truncation import Scalar
from MaxText.distill.vocabulary import CHUNK_VALUES, Vocabulary

# Tokens of a chunk, at most: the width of an accelerator's registers. It divides most vocabularies, so that nothing is
# filled up.
_CHUNK = 128


# (logits from the maximum on, weights at T), of some tokens -> a tree of arrays like them
Terms = Callable[[Array, Array], PyTree[Array]]


class Drawn(NamedTuple):
    """Draws, and what the visit of the vocabulary that they are found in took besides.

    ids: of the points (offset + j) / N of the cumulative distribution, ascending; a token's ids are its draws.
    total: the sum of the weights at T, from the maximum on.
    sums: of the terms.
    """

    ids: Int[Array, "n N"]
    total: Float[Array, "n 1"]
    sums: PyTree[Float[Array, "n 1"]]


def systematic_draws(
    logits: Float[Array, "n V"],
    offsets: Float[Array, "n 1"],
    maximum: Float[Array, "n 1"],
    terms: Terms = lambda logits, weights: (),
    *,
    draws: int,
    temperature: Scalar,
    vocabulary: Vocabulary,
) -> Drawn:
    """Systematic draws from softmax(logits / T), and sums over the vocabulary.

    Args:
        logits: float32, at temperature 1; -inf for tokens of mass 0, and finite for one at least.
        offsets: in [0, 1); uniform, one per position. The draws are a function of these and of the logits.
        maximum: of the logits.
        terms: what is to be summed.
        draws: N. Static.
        temperature: T > 0.
        vocabulary: how the last axis is laid out. What is returned is the same on all its devices.
    """

    def by(chunk: int, on_cpu: bool) -> Callable[[Array, Array, Array], Drawn]:
        return functools.partial(_drawn, draws, temperature, vocabulary, terms, chunk, on_cpu)

    on_cpu = by(_narrow_chunk(logits.shape[-1]), on_cpu=True)
    elsewhere = by(_CHUNK, on_cpu=False)
    return jax.lax.platform_dependent(logits, offsets, maximum, cpu=on_cpu, default=elsewhere)


def _narrow_chunk(tokens: int) -> int:
    """For a CPU: the sum over chunks and the looks at the tokens of those that points lie in then take equally long."""
    return min(_CHUNK, 1 << max(3, (tokens // 16).bit_length() // 2))


def _drawn(
    draws: int,
    temperature: Scalar,
    vocabulary: Vocabulary,
    terms: Terms,
    chunk: int,
    on_cpu: bool,
    logits: Float[Array, "n V"],
    offsets: Float[Array, "n 1"],
    maximum: Float[Array, "n 1"],
) -> Drawn:
    # What is missing of the last chunk has no mass.
    missing = -logits.shape[-1] % chunk
    padded = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    padded = padded.reshape(logits.shape[0], -1, chunk)

    def weights(from_maximum: Array) -> Array:
        found = jnp.exp(from_maximum / temperature)
        # XLA for CPUs takes exponentials one by one, and several times, where they are not written.
        return jax.lax.optimization_barrier(found) if on_cpu else found

    def sums(logits: Array) -> tuple[Array, PyTree[Array]]:
        from_maximum = logits - maximum[..., None]
        found = weights(from_maximum)
        return jax.tree.map(lambda of: jnp.sum(of, axis=-1), (found, terms(from_maximum, found)))

    masses, others = _by_chunk(padded, sums, CHUNK_VALUES if on_cpu else None)
    own = jnp.sum(masses, axis=-1, keepdims=True)
    shards = vocabulary.shards(own)
    shard_ends = jnp.cumsum(shards, axis=-1)
    total = shard_ends[:, -1:]
    points = (offsets + jnp.arange(draws, dtype=jnp.float32)) * (total / draws)
    shard = _reached(shards[:, None], shard_ends[:, None], points)
    before = vocabulary.own_shard(shard_ends - shards)

    chunk_ends = before + jnp.cumsum(masses, axis=-1)
    place = (_searched if on_cpu else _reached)(masses[:, None], chunk_ends[:, None], points)
    tokens = weights(jnp.take_along_axis(padded, place[..., None], axis=1) - maximum[..., None])
    start = jnp.take_along_axis(chunk_ends - masses, place, axis=-1)
    token = _reached(tokens, start[..., None] + jnp.cumsum(tokens, axis=-1), points)
    ids = vocabulary.of_shard(shard, vocabulary.first(logits) + place * chunk + token)
    return Drawn(ids, total, jax.tree.map(lambda of: vocabulary.sums(lambda _, of: of, of), others))


def _by_chunk(
    padded: Float[Array, "n C S"], sums: Callable[[Array], PyTree[Float[Array, "n C"]]], slab: int | None
) -> PyTree[Float[Array, "n C"]]:
    """The sums of each chunk, in slabs of so many values at a time, which stay in a CPU's cache, if asked for."""
    n, chunks, size = padded.shape
    per_slab = chunks if slab is None else max(1, slab // (n * size))
    slabs = chunks // per_slab
    if slabs <= 1:
        return sums(padded)
    rest = chunks % per_slab

    def visit(i: Array) -> PyTree[Float[Array, "n C"]]:
        return sums(jax.lax.dynamic_slice_in_dim(padded, rest + i * per_slab, per_slab, axis=1))

    def in_a_row(of: Float[Array, "slabs n C"]) -> Float[Array, "n C"]:
        return jnp.moveaxis(of, 0, 1).reshape(n, -1)

    others = jax.tree.map(in_a_row, jax.lax.map(visit, jnp.arange(slabs)))
    if not rest:
        return others
    return jax.tree.map(lambda *of: jnp.concatenate(of, axis=1), sums(padded[:, :rest]), others)


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
