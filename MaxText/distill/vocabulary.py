"""The vocabulary's axis of a block's logits: whole or sharded, visited once for any number of sums or largest values.

# n positions of a block, V vocabulary (or one device's shard of it)

A visit reduces several arrays that are made of the logits, and stores none of them. Logits stay in the type that the
head gave them; wherever they are read they are float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PyTree

# (ids "1 V", *logits "n V", in float32) -> a tree of arrays "n V", for all tokens or a chunk of them
Terms = Callable[..., PyTree[Float[Array, "n V"]]]


class Vocabulary(NamedTuple):
    """The vocabulary's axis, the last one of logits: whole, or one shard of it per device along a mesh axis.

    axes: the mesh axes that shard it inside `jax.shard_map`, in order of token ids; none where it is whole.
    """

    axes: tuple[str, ...] = ()

    def size(self, logits: Float[Array, "n V"]) -> int:
        return logits.shape[-1] * (jax.lax.axis_size(self.axes) if self.axes else 1)

    def first(self, logits: Float[Array, "n V"]) -> int | Int[Array, ""]:
        """The token id of this device's first logit."""
        return logits.shape[-1] * jax.lax.axis_index(self.axes) if self.axes else 0

    def sums(self, terms: Terms, *logits: Float[Array, "n V"]) -> PyTree[Float[Array, "n 1"]]:
        """The sum over all tokens of each of the arrays in the tree terms(ids, *logits); none of them is stored."""
        partial = _reduce(terms, jnp.sum, jnp.add, self.first(logits[0]), logits)
        return jax.lax.psum(partial, self.axes) if self.axes else partial

    def maxima(self, terms: Terms, *logits: Float[Array, "n V"]) -> PyTree[Float[Array, "n 1"]]:
        """Likewise the largest values."""
        partial = _reduce(terms, _max, jnp.maximum, self.first(logits[0]), logits)
        return jax.lax.pmax(partial, self.axes) if self.axes else partial

    def shards(self, values: Float[Array, "n 1"]) -> Float[Array, "n S"]:
        """Each shard's values, in order of token ids."""
        return jax.lax.all_gather(values, self.axes, axis=1, tiled=True, to="invarying") if self.axes else values

    def own_shard(self, values: Float[Array, "n S"]) -> Float[Array, "n 1"]:
        """Of each shard's values this device's."""
        return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(self.axes), 1, axis=1) if self.axes else values

    def of_shard(self, shard: Int[Array, "n K"], values: Int[Array, "n K"]) -> Int[Array, "n K"]:
        """The values that the device of a shard has, on all devices."""
        if not self.axes:
            return values
        return jax.lax.psum(jnp.where(shard == jax.lax.axis_index(self.axes), values, 0), self.axes)

    def ids(self, logits: Float[Array, "n V"]) -> Int[Array, "1 V"]:
        return self.first(logits) + jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]

    def at(self, logits: Float[Array, "n V"], tokens: Int[Array, "n K"]) -> Float[Array, "n K"]:
        """The values at some token ids per position, the same on all devices."""
        if not self.axes:
            return jnp.take_along_axis(logits, tokens, axis=-1).astype(jnp.float32)
        local = tokens - self.first(logits)
        is_here = (local >= 0) & (local < logits.shape[-1])
        value = jnp.take_along_axis(logits, jnp.where(is_here, local, 0), axis=-1).astype(jnp.float32)
        return jax.lax.psum(jnp.where(is_here, value, 0.0), self.axes)

    def replaced(
        self, logits: Float[Array, "n V"], tokens: Int[Array, "n K"], values: Float[Array, "#n #K"] | float
    ) -> Float[Array, "n V"]:
        """The logits with other values at some token ids per position, which ascend; ids that are no token's are
        passed over."""
        place, how = self._places(logits, tokens)
        return place.set(values, **how)

    def added(
        self, logits: Float[Array, "n V"], tokens: Int[Array, "n K"], values: Float[Array, "#n #K"]
    ) -> Float[Array, "n V"]:
        """Likewise with these values on top."""
        place, how = self._places(logits, tokens)
        return place.add(values, **how)

    def _places(self, logits: Float[Array, "n V"], tokens: Int[Array, "n K"]) -> tuple[Any, dict[str, Any]]:
        positions = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        how = {"mode": "drop", "wrap_negative_indices": False, "indices_are_sorted": True, "unique_indices": True}
        return logits.at[positions, tokens - self.first(logits)], how

    def top_k(self, logits: Float[Array, "n V"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """The k largest values and their token ids, in descending order, equal values by lower token id."""
        # Behind the barrier, because a compiler that sees the result cut further (to its first or last column) no
        # longer recognises the selection, and sorts the whole vocabulary.
        values, ids = jax.lax.optimization_barrier(jax.lax.top_k(logits, min(k, logits.shape[-1])))
        if not self.axes:
            return values, ids
        ids = ids + self.first(logits)
        # Shards are gathered in order of token ids and top_k is stable, so that ties stay in order. k numbers per
        # shard and position travel, not the vocabulary.
        values, ids = (jax.lax.all_gather(x, self.axes, axis=1, tiled=True, to="invarying") for x in (values, ids))
        values, order = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(ids, order, axis=-1)


# Values of a chunk of the vocabulary that a CPU reduces at a time: a few such arrays stay in its cache.
CHUNK_VALUES = 1 << 18


def _reduce(
    terms: Terms,
    reduce: Callable[..., Array],
    combine: Callable[[Array, Array], Array],
    first_id: int | Int[Array, ""],
    logits: tuple[Float[Array, "n V"], ...],
) -> PyTree[Float[Array, "n 1"]]:
    """One visit of the vocabulary that reduces each of the arrays in the tree terms(ids, *logits).

    Compilers for accelerators fuse the terms into one reduction of several outputs. XLA's for CPUs writes every
    exponential that two reductions share as an array of [n, V]: there the visit goes chunk by chunk.
    """

    def whole(*chunk: Array, start: int | Int[Array, ""] = 0) -> PyTree[Float[Array, "n 1"]]:
        ids = first_id + start + jnp.arange(chunk[0].shape[-1], dtype=jnp.int32)[None]
        found = terms(ids, *(x.astype(jnp.float32) for x in chunk))
        return jax.tree.map(lambda term: reduce(term, axis=-1, keepdims=True), found)

    rows, vocabulary = logits[0].shape
    size = max(128, CHUNK_VALUES // rows)
    if vocabulary <= size:
        return whole(*logits)

    def chunked(*logits: Array) -> PyTree[Float[Array, "n 1"]]:
        rest = vocabulary % size or size
        first = whole(*(x[:, :rest] for x in logits))
        if not jax.tree.leaves(first):  # nothing is asked for
            return first

        def visit(i: Int[Array, ""], reduced: PyTree) -> PyTree:
            start = rest + i * size
            chunk = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in logits)
            return jax.tree.map(combine, reduced, whole(*chunk, start=start))

        return jax.lax.fori_loop(0, (vocabulary - rest) // size, visit, first)

    return jax.lax.platform_dependent(*logits, cpu=chunked, default=whole)


def _max(term: Num[Array, "n V"], **axes: Any) -> Num[Array, "n 1"]:
    """The largest values. A TPU's compiler takes those of bfloat16 logits, known as such, apart from all that is
    float32: the sums and other maxima that it has in the same product."""
    if term.dtype == jnp.float32:
        term = jax.lax.platform_dependent(term, tpu=_as_float32, default=lambda term: term)
    return jnp.max(term, **axes)


def _as_float32(term: Float[Array, "n V"]) -> Float[Array, "n V"]:
    """The same, whatever it was made of."""
    return jax.lax.reduce_precision(term, exponent_bits=8, mantissa_bits=23)
