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
from MaxText.distill.vocabulary import Vocabulary

# Tokens of a chunk, at most: the width of an accelerator's registers. It divides most vocabularies, so that nothing is
# filled up.
_CHUNK = 128
# Values of the positions that a CPU draws for at a time.
_ROW_VALUES = 1 << 19


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

    def by(chunk: int, on_cpu: bool) -> Callable[..., Drawn]:
        return functools.partial(_drawn, draws, temperature, vocabulary, terms, chunk, on_cpu)

    def by_rows(*arrays: Array) -> Drawn:
        return _by_rows(by(_narrow_chunk(logits.shape[-1]), on_cpu=True), *arrays)

    return jax.lax.platform_dependent(logits, offsets, maximum, cpu=by_rows, default=by(_CHUNK, on_cpu=False))


def _by_rows(drawn: Callable[..., Drawn], *arrays: Array) -> Drawn:
    """The same, some positions at a time, of which all that is computed stays in a CPU's cache."""
    n, vocabulary = arrays[0].shape
    size = max(8, _ROW_VALUES // vocabulary)
    if n <= size:
        return drawn(*arrays)
    rest = n % size

    def visit(i: Array) -> Drawn:
        return drawn(*(jax.lax.dynamic_slice_in_dim(array, rest + i * size, size) for array in arrays))

    found = jax.lax.map(visit, jnp.arange(n // size))
    found = jax.tree.map(lambda of: of.reshape(-1, *of.shape[2:]), found)
    if not rest:
        return found
    return jax.tree.map(lambda *of: jnp.concatenate(of), drawn(*(array[:rest] for array in arrays)), found)


def _narrow_chunk(tokens: int) -> int:
    """For a CPU: the sum over chunks and the looks at the tokens of those that points lie in then take equally long."""
    return min(_CHUNK, 1 << max(3, (tokens // 8).bit_length() // 2))


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

    def written(array: Array) -> Array:
        """XLA for CPUs computes anew, and number by number, what several uses have in common and is not written."""
        return jax.lax.optimization_barrier(array) if on_cpu else array

    def weights(from_maximum: Array) -> Array:
        return written(jnp.exp(from_maximum / temperature))

    def sums(logits: Array) -> tuple[Array, PyTree[Array]]:
        from_maximum = logits - maximum[..., None]
        found = weights(from_maximum)
        return jax.tree.map(lambda of: jnp.sum(of, axis=-1), (found, terms(from_maximum, found)))

    masses, others = sums(padded)
    own = jnp.sum(masses, axis=-1, keepdims=True)
    shards = vocabulary.shards(own)
    shard_ends = jnp.cumsum(shards, axis=-1)
    total = shard_ends[:, -1:]
    points = (offsets + jnp.arange(draws, dtype=jnp.float32)) * (total / draws)
    shard = _reached(shards[:, None], shard_ends[:, None], points)
    before = vocabulary.own_shard(shard_ends - shards)

    chunk_ends = written(before + jnp.cumsum(masses, axis=-1))
    place = written((_searched if on_cpu else _reached)(masses[:, None], chunk_ends[:, None], points))
    tokens = weights(written(jnp.take_along_axis(padded, place[..., None], axis=1)) - maximum[..., None])
    start = (_looked_up if on_cpu else _compared)(chunk_ends - masses, place)
    token = _reached(tokens, start[..., None] + (_summed if on_cpu else jnp.cumsum)(tokens, axis=-1), points)
    ids = vocabulary.of_shard(shard, vocabulary.first(logits) + place * chunk + token)
    return Drawn(ids, total, jax.tree.map(lambda of: vocabulary.sums(lambda _, of: of, of), others))


def _looked_up(values: Float[Array, "n C"], at: Int[Array, "n N"]) -> Float[Array, "n N"]:
    return jnp.take_along_axis(values, at, axis=-1)


def _compared(values: Float[Array, "n C"], at: Int[Array, "n N"]) -> Float[Array, "n N"]:
    """The same where a lookup costs as much as a hundred comparisons: accelerators take one number after the other."""
    here = at[..., None] == jnp.arange(values.shape[-1], dtype=jnp.int32)
    return jnp.sum(jnp.where(here, values[:, None], 0.0), axis=-1)


def _summed(masses: Float[Array, "n N S"], axis: int) -> Float[Array, "n N S"]:
    """Cumulative sums by a product: a CPU multiplies faster than it adds up."""
    return masses @ jnp.triu(jnp.ones((masses.shape[axis],) * 2))


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
