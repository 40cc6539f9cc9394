"""The distillation loss from hidden states, block by block: no [N, V] logits exist, and nothing is projected twice.

# N tokens, n tokens of a block, D student's width, E teacher's width, V vocabulary (or one device's shard of it)

The loss walks over blocks of n valid tokens. In each it projects the student, asks the teacher's side for its logits,
takes every sum that `kd_loss.kd_sums` takes, and, where the loss is differentiated, the gradient with respect to the
student's hidden states and head in the same visit; the backward pass only scales it. Per valid token that is
2 V (3 D + E) FLOPs with a teacher that is projected too, the least that there is, and memory is the heads, the gradient
of the student's head and three arrays of [n, V].

Masked tokens are left out of the blocks, so that they cost nothing wherever they lie; only the last block is filled up.

The walk knows neither where the teacher's logits come from (teacher_side.py) nor which divergence is taken of them
(divergences.py). Left out on purpose: the choice of the block's size, which follows from a byte budget that the caller
has, and any gradient for the teacher, the auxiliary sums, alpha, the temperature or the z-loss's weight.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from MaxText.distill.block import Block, Weights
from MaxText.distill.divergences import Divergence
from MaxText.distill.kd_loss import KDSums, check_temperature
from MaxText.distill.projection import Projection
from MaxText.distill.teacher_side import TeacherSide
from MaxText.distill.vocabulary import Vocabulary


class Tokens(NamedTuple):
    """What is to be predicted.

    targets: token ids in [0, V) at valid tokens.
    mask: True at valid tokens. What the others hold, here and in the models' hidden states, is never read.
    """

    targets: Int[Array, "N"]
    mask: Bool[Array, "N"]


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the compiled walk depends on."""

    divergence: Divergence
    block_size: int
    evaluation: bool
    vocabulary: Vocabulary
    pool: "_Pool"


def blockwise_kd(
    student: Projection,
    teacher: TeacherSide,
    tokens: Tokens,
    weights: Weights,
    *,
    divergence: Divergence,
    block_size: int,
    evaluation: bool = False,
    vocab_axis: str | tuple[str, ...] | None = None,
    pooled_axis: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], KDSums]:
    """Sum over valid tokens of CE, T^2 D(teacher || student) and z-loss, blended, in nats, and the sums it is made of.

        objective_sum = (1 - alpha) ce_sum + alpha kd_sum + z_weight log_z_sq_sum

    Only objective_sum is differentiable, and only with respect to the student's hidden states and head. Inside
    `jax.shard_map` (with check_vma=True) each device walks its own tokens. No collective of a head's size stands in the
    walk: the gradient of a head that is the same on several devices is added up once, after it. The caller adds up
    objective_sum and the sums over the axes that shard the tokens.

    Args:
        student: its head's gradient is accumulated over blocks in float32 and returned in its own type; each block's
            share has the precision that the derivative of its projection gives it.
        teacher: its logits, and the tokens that are kept of them. No gradient flows to it.
        tokens: targets and mask.
        weights: alpha, temperature and the z-loss's weight.
        divergence: one of `divergences`. Static.
        block_size: tokens of a block. Memory is about three float32 arrays of [block_size, V], four with top_p. Static.
        evaluation: also take kl_t1_sum and agreement_sum. Static.
        vocab_axis: mesh axis, or axes, that shard the vocabulary, where each device's projection gives its own shard of
            the logits, in order of token ids. Log-sum-exps and top-k are merged across it, and the gradient of the
            hidden states is added up over it once, after the walk. The sums are the same on all its devices.
        pooled_axis: those of vocab_axis along which tokens differ too. A block is then block_size tokens of each device
            of the axis, whose hidden states are gathered in the walk, and whose gradients are scattered back, while
            heads stay sharded: memory for a head and its gradient is that of the shard. The sums are those of all the
            axis's tokens, the same on all its devices.

    Returns:
        objective_sum and KDSums, float32, to be divided by n after the last reduction.

    Raises:
        ValueError: for block_size < 1, a temperature that is none, a teacher that is none for this student, and a
            vocab_axis that shards no head.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: expected at least 1 token")
    static = _Static(
        divergence=divergence,
        block_size=min(block_size, tokens.mask.shape[0]),
        evaluation=evaluation,
        vocabulary=Vocabulary(_axes(vocab_axis)),
        pool=_Pool(_axes(pooled_axis)),
    )
    check_temperature(weights.temperature)
    _check_axes(static, student)
    teacher.check(student.vocabulary_size(static.vocabulary), static.vocabulary)
    weights = Weights(*(jnp.asarray(weight, jnp.float32) for weight in weights))
    # A student's array that is the same on several devices gets the sum of their gradients. Without the marks jax would
    # take that sum in every block; with them, once after the walk.
    student = _varying(_varying_axes((student, teacher, tokens.mask)), student)
    return _blockwise_kd(static, student, *jax.lax.stop_gradient((teacher, tokens, weights)))


def _axes(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def _check_axes(static: _Static, student: Projection) -> None:
    axes, pooled = static.vocabulary.axes, static.pool.axes
    if not _varying_axes(student.head).issuperset(axes):
        raise ValueError(
            f"vocab_axis={axes}: expected axes of jax.shard_map(..., check_vma=True) along which the heads differ"
        )
    if not set(pooled) <= set(axes):
        raise ValueError(f"pooled_axis={pooled}: expected some of vocab_axis={axes}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise_kd(static: _Static, student: Projection, *frozen: Any) -> tuple[Float[Array, ""], KDSums]:
    """Not differentiated: the walk without gradients."""
    return _walk(static, student, *frozen, differentiate=False)[:2]


def _forward(
    static: _Static, student: Projection, *frozen: Any
) -> tuple[tuple[Float[Array, ""], KDSums], Projection | None]:
    objective_sum, sums, gradient = _walk(static, student, *frozen, differentiate=True)
    return (objective_sum, sums), gradient


def _backward(
    static: _Static, gradient: Projection, cotangents: tuple[Float[Array, ""], KDSums]
) -> tuple[Projection, None, None, None]:
    scale, _ = cotangents
    scaled = jax.tree.map(lambda part: (scale * part).astype(part.dtype), gradient)
    return scaled, None, None, None  # nothing for what is frozen


_blockwise_kd.defvjp(_forward, _backward)


def _walk(
    static: _Static, student: Projection, teacher: TeacherSide, tokens: Tokens, weights: Weights, *, differentiate: bool
) -> tuple[Float[Array, ""], KDSums, Projection | None]:
    """The objective and the sums over all valid tokens and, if asked, the objective's gradient for the student."""
    n, pool = static.block_size, static.pool
    order, number = _valid_first(tokens.mask, n)

    def visit(i: Int[Array, ""], carry: tuple[KDSums, Projection]) -> tuple[KDSums, Projection]:
        sums, gradient = carry
        at = jax.lax.dynamic_slice(order, (i * n,), (n,))
        rows = _Rows(at, i * n + jnp.arange(n, dtype=jnp.int32) < number)
        hidden = pool.rows_of(student.hidden, rows)
        block = functools.partial(_block, static, teacher, tokens, weights, rows)
        if differentiate:
            logits, pull_back = jax.vjp(student.project, student.head, hidden)
            block_sums, slope = block(logits).sums_and_gradient()
            gradient = _added(gradient, pull_back(slope.astype(logits.dtype)), rows, pool)
        else:
            block_sums = block(student.project(student.head, hidden)).sums()
        return jax.tree.map(jnp.add, sums, block_sums), gradient

    # Inside `jax.shard_map` a loop's carry must be marked from the start as differing between devices where it will.
    differ = _varying_axes((student, teacher, tokens.mask))
    start = _varying(differ - set(static.vocabulary.axes), _zero_sums(static.evaluation))
    zeros = _varying(differ, _zero_gradient(student)) if differentiate else None
    sums, gradient = jax.lax.fori_loop(0, pool.most(-(-number // n)), visit, (start, zeros))
    objective_sum = (
        (1.0 - weights.alpha) * sums.ce_sum + weights.alpha * sums.kd_sum + weights.z_weight * sums.log_z_sq_sum
    )
    if differentiate:
        gradient = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), gradient, student)
    return objective_sum, sums, gradient


def _valid_first(mask: Bool[Array, "N"], n: int) -> tuple[Int[Array, "M"], Int[Array, ""]]:
    """Where the tokens lie that blocks of n take in turn, the valid ones first, and how many of those there are."""
    # The last block is filled up with the first valid token, whose numbers are as sound as any.
    order = jnp.nonzero(mask, size=-(-mask.shape[0] // n) * n, fill_value=jnp.argmax(mask))[0]
    return order.astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32)


def _block(
    static: _Static, teacher: TeacherSide, tokens: Tokens, weights: Weights, rows: "_Rows", logits: Float[Array, "n V"]
) -> Block:
    teacher_rows = jax.tree.map(lambda array: static.pool.rows_of(array, rows), teacher.rows)
    return Block(
        student=logits.astype(jnp.float32),
        teacher=teacher.block(teacher_rows, weights.temperature, static.vocabulary),
        targets=static.pool.rows_of(tokens.targets[:, None], rows, to="invarying"),
        is_valid=static.pool.gathered(rows.are_valid, to="invarying")[:, None],
        weights=weights,
        divergence=static.divergence,
        vocabulary=static.vocabulary,
        evaluation=static.evaluation,
    )


def _added(gradient: Projection, share: tuple[PyTree, Float[Array, "n D"]], rows: "_Rows", pool: "_Pool") -> Projection:
    """The gradient with a block's share of it, for the head and for the hidden states of the block's rows."""
    head_share, hidden_rows = share
    own = pool.scattered(hidden_rows).astype(gradient.hidden.dtype)
    beyond = gradient.hidden.shape[0]
    return dataclasses.replace(
        gradient,
        hidden=gradient.hidden.at[jnp.where(rows.are_valid, rows.at, beyond)].set(own, mode="drop"),
        head=jax.tree.map(lambda total, share: total + share.astype(total.dtype), gradient.head, head_share),
    )


class _Rows(NamedTuple):
    """A block's tokens: where they lie on this device, and which of them count. What fills a block up does not."""

    at: Int[Array, "n"]
    are_valid: Bool[Array, "n"]


class _Pool(NamedTuple):
    """The devices whose blocks are one: those along the axes. None: each device walks alone."""

    axes: tuple[str, ...] = ()

    def rows_of(self, array: Array, rows: _Rows, **how: str) -> Array:
        """The pool's rows of an array of which each device has those of its own tokens."""
        own = array[rows.at]
        if self.axes:
            # A device without a valid token goes along with the others of its pool; what its rows hold is not read.
            are_valid = rows.are_valid.reshape(-1, *[1] * (array.ndim - 1))
            own = jnp.where(are_valid, own, jnp.zeros((), array.dtype))
        return self.gathered(own, **how)

    def gathered(self, x: Array, **how: str) -> Array:
        """The rows of all the pool's devices; with to="invarying", marked as the same on each of them."""
        return jax.lax.all_gather(x, self.axes, axis=0, tiled=True, **how) if self.axes else x

    def scattered(self, x: Float[Array, "n D"]) -> Float[Array, "m D"]:
        """This device's rows of the sum over the pool."""
        if not self.axes:
            return x
        return jax.lax.psum_scatter(x.astype(jnp.float32), self.axes, scatter_dimension=0, tiled=True)

    def most(self, number: Int[Array, ""]) -> Int[Array, ""]:
        return jax.lax.pmax(number, self.axes) if self.axes else number


def _varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes of the surrounding `jax.shard_map` along which any of the arrays differs."""
    return frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def _varying(axes: frozenset[str], tree: PyTree) -> PyTree:
    """The same arrays, marked as differing along these axes. The gradient of the mark is a sum over them."""

    def mark(leaf: Array) -> Array:
        missing = tuple(axes - jax.typeof(leaf).mat.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def _zero_sums(evaluation: bool) -> KDSums:
    fields = KDSums._fields if evaluation else [name for name in KDSums._fields if name not in KDSums._field_defaults]
    return KDSums(**{name: jnp.zeros((), jnp.float32) for name in fields})


def _zero_gradient(student: Projection) -> Projection:
    """Of the head in float32, since it is added up over blocks."""
    head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), student.head)
    return dataclasses.replace(student, hidden=jnp.zeros_like(student.hidden), head=head)
