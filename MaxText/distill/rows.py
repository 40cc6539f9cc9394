"""The tokens of a block: which ones, where they lie, and how several devices have a block together.

# N tokens, n tokens of a block on a device, m those of all the devices that pool them

Masked tokens are left out of the blocks, so that they cost nothing wherever they lie; only the last block is filled up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from MaxText.distill.vocabulary import Vocabulary


class Rows(NamedTuple):
    """A block's tokens: where they lie on this device, and which of them count. What fills a block up does not."""

    at: Int[Array, "n"]
    are_valid: Bool[Array, "n"]


class ValidFirst(NamedTuple):
    """Where the tokens lie that blocks take in turn, the valid ones first, and how many of those there are."""

    order: Int[Array, "M"]
    number: Int[Array, ""]

    @property
    def are_valid(self) -> Bool[Array, "M"]:
        """In this order: what fills the last block up is not."""
        return jnp.arange(self.order.shape[0], dtype=jnp.int32) < self.number

    def blocks(self, n: int) -> Int[Array, ""]:
        return -(-self.number // n)

    def rows(self, i: Int[Array, ""], n: int) -> Rows:
        """Those of the i-th block of n tokens."""
        at = jax.lax.dynamic_slice(self.order, (i * n,), (n,))
        return Rows(at, i * n + jnp.arange(n, dtype=jnp.int32) < self.number)


def valid_first(mask: Bool[Array, "N"], n: int) -> ValidFirst:
    # The last block is filled up with the first valid token, whose numbers are as sound as any.
    order = jnp.nonzero(mask, size=-(-mask.shape[0] // n) * n, fill_value=jnp.argmax(mask))[0]
    return ValidFirst(order.astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32))


class Pool(NamedTuple):
    """The devices whose blocks are one: those along the axes. None: each device walks alone."""

    axes: tuple[str, ...] = ()

    def readable(self, arrays: PyTree[Shaped[Array, "N ..."]], blocks: ValidFirst) -> PyTree[Shaped[Array, "N ..."]]:
        """The same, but zeros on a device without a valid token, which goes along with the others of its pool: what its
        tokens hold is not read. Before the walk, where it is part of what the arrays come from."""

        def read(array: Array) -> Array:
            return jnp.where(blocks.number > 0, array, jnp.zeros((), array.dtype))

        return jax.tree.map(read, arrays) if self.axes else arrays

    def rows_of(self, array: Array, rows: Rows, **how: str) -> Array:
        """The pool's rows of an array of which each device has those of its own tokens."""
        return self.gathered(array[rows.at], **how)

    def by_block(self, own: Shaped[Array, "M"], n: int) -> Shaped[Array, "B m 1"]:
        """What each of the pool's devices has in the order in which blocks take it, n at a time: the blocks, each laid
        out as `gathered` does it. Once, before the walk."""
        of_all = jax.lax.all_gather(own, self.axes, axis=0, to="invarying") if self.axes else own[None]
        return jnp.swapaxes(of_all.reshape(of_all.shape[0], -1, n), 0, 1).reshape(-1, of_all.shape[0] * n, 1)

    def gathered(self, x: Array, **how: str) -> Array:
        """The rows of all the pool's devices; with to="invarying", marked as the same on each of them."""
        return jax.lax.all_gather(x, self.axes, axis=0, tiled=True, **how) if self.axes else x

    def scattered(self, x: Float[Array, "m D"]) -> Float[Array, "n D"]:
        """This device's rows of the sum over the pool."""
        if not self.axes:
            return x
        return jax.lax.psum_scatter(x.astype(jnp.float32), self.axes, scatter_dimension=0, tiled=True)

    def own(self, x: Array, n: int) -> Array:
        """This device's n rows of an array that is the same on all of the pool's."""
        return jax.lax.dynamic_slice_in_dim(x, n * jax.lax.axis_index(self.axes), n) if self.axes else x

    def most(self, number: Int[Array, ""]) -> Int[Array, ""]:
        return jax.lax.pmax(number, self.axes) if self.axes else number


def axes_of(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def check_axes(vocabulary: Vocabulary, pool: Pool, head: PyTree) -> None:
    """Raises ValueError for a vocab_axis that shards no head, and a pooled_axis that is none of it."""
    if not varying_axes(head).issuperset(vocabulary.axes):
        raise ValueError(
            f"vocab_axis={vocabulary.axes}: expected axes of jax.shard_map(..., check_vma=True) along which the heads "
            "differ"
        )
    if not set(pool.axes) <= set(vocabulary.axes):
        raise ValueError(f"pooled_axis={pool.axes}: expected some of vocab_axis={vocabulary.axes}")


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes of the surrounding `jax.shard_map` along which any of the arrays differs."""
    return frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def varying(axes: frozenset[str], tree: PyTree) -> PyTree:
    """The same arrays, marked as differing along these axes. The gradient of the mark is a sum over them."""

    def mark(leaf: Array) -> Array:
        missing = tuple(axes - jax.typeof(leaf).mat.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)
