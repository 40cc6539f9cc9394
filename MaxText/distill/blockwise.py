"""The distillation loss from hidden states, block by block: no [N, V] logits exist, and nothing is projected twice.

# N tokens, n tokens of a block, D student's width, E teacher's width, V vocabulary (or one device's shard of it)

The loss walks over blocks of n valid tokens. In each it projects the student, asks the teacher's side for its logits,
takes every sum that `kd_loss.kd_sums` takes, and, where the loss is differentiated, the gradient with respect to the
student's hidden states and head in the same visit; the backward pass only scales it. Per valid token that is
2 V (3 D + E) FLOPs with a teacher that is projected too, the least that there is, and memory is the heads, the gradient
of the student's head and three arrays of [n, V].

The walk knows neither what the teacher's side of a block is (teacher_side.py) nor which divergence is taken from it
(divergences.py). Left out on purpose: the choice of the block's size, which follows from a byte budget that the caller
has, and any gradient for the teacher, the auxiliary sums, alpha, the temperature or the z-loss's weight.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from MaxText.distill.block import Asked, LossBlock, StudentBlock, Weights
from MaxText.distill.divergences import Divergence
from MaxText.distill.kd_loss import KDSums, check_temperature
from MaxText.distill.projection import Projection
from MaxText.distill.rows import Pool, Rows, axes_of, check_axes, valid_first, varying, varying_axes
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

    asked: Asked
    block_size: int
    pool: Pool
    sums: tuple[str, ...]  # those of KDSums that are known


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
        teacher: what is known of its distribution, logits or what was stored of it. No gradient flows to it.
        tokens: targets and mask.
        weights: alpha, temperature and the z-loss's weight. A temperature that is a number is one in the
            program, too: at 1 compilers see that cross-entropy's weights are the divergence's, and take half of the
            exponentials.
        divergence: one of `divergences`. Static.
        block_size: tokens of a block. Memory is about three float32 arrays of [block_size, V], four with top_p. Static.
        evaluation: also take kl_t1_sum and agreement_sum, where the teacher's side knows them. Static.
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
        ValueError: for block_size < 1, a temperature that is none, a teacher that is none for this student or this
            loss, and a vocab_axis that shards no head.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: expected at least 1 token")
    asked = Asked(divergence, Vocabulary(axes_of(vocab_axis)), evaluation)
    pool = Pool(axes_of(pooled_axis))
    check_temperature(weights.temperature)
    check_axes(asked.vocabulary, pool, student.head)
    size = student.vocabulary_size(asked.vocabulary)
    teacher.check(size, asked, weights.temperature)
    static = _Static(asked, min(block_size, tokens.mask.shape[0]), pool, teacher.known_sums(size, asked))
    weights = Weights(*(jnp.asarray(weight, jnp.float32) for weight in weights))
    # A student's array that is the same on several devices gets the sum of their gradients. Without the marks jax would
    # take that sum in every block; with them, once after the walk.
    student = varying(varying_axes((student, teacher, tokens.mask)), student)
    return _blockwise_kd(static, student, *jax.lax.stop_gradient((teacher, tokens, weights)))


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
    blocks = valid_first(tokens.mask, n)
    are_valid = blocks.are_valid
    targets = jnp.where(are_valid, tokens.targets[blocks.order], 0)
    by_block = Tokens(*(pool.by_block(array, n) for array in (targets, are_valid)))
    hidden, teacher_rows = pool.readable((student.hidden, teacher.rows), blocks)

    def visit(i: Int[Array, ""], carry: tuple[KDSums, Projection]) -> tuple[KDSums, Projection]:
        sums, gradient = carry
        rows = blocks.rows(i, n)
        of_student = pool.rows_of(hidden, rows)
        of_teacher = jax.tree.map(lambda array: pool.rows_of(array, rows, to="invarying"), teacher_rows)
        of_block = jax.tree.map(lambda array: array[i], by_block)
        block = functools.partial(_block, static, teacher, of_teacher, of_block, weights)
        if differentiate:
            logits, pull_back = jax.vjp(student.project, student.head, of_student)
            block_sums, slope = block(logits).sums_and_gradient()
            gradient = _added(gradient, pull_back(slope.astype(logits.dtype)), rows, pool)
        else:
            block_sums = block(student.project(student.head, of_student)).sums()
        return jax.tree.map(jnp.add, sums, block_sums), gradient

    # Inside `jax.shard_map` a loop's carry must be marked from the start as differing between devices where it will.
    differ = varying_axes((student, teacher, tokens.mask))
    start = varying(differ - set(static.asked.vocabulary.axes), _zero_sums(static.sums))
    zeros = varying(differ, _zero_gradient(student)) if differentiate else None
    sums, gradient = jax.lax.fori_loop(0, pool.most(blocks.blocks(n)), visit, (start, zeros))
    objective_sum = (
        (1.0 - weights.alpha) * sums.ce_sum + weights.alpha * sums.kd_sum + weights.z_weight * sums.log_z_sq_sum
    )
    if differentiate:
        gradient = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), gradient, student)
    return objective_sum, sums, gradient


def _block(
    static: _Static,
    teacher: TeacherSide,
    of_teacher: PyTree,
    tokens: Tokens,
    weights: Weights,
    logits: Float[Array, "n V"],
) -> LossBlock:
    student = StudentBlock(
        logits=logits,
        targets=tokens.targets,
        is_valid=tokens.mask,
        weights=weights,
        asked=static.asked,
    )
    return teacher.block(of_teacher, student)


def _added(gradient: Projection, share: tuple[PyTree, Float[Array, "n D"]], rows: Rows, pool: Pool) -> Projection:
    """The gradient with a block's share of it, for the head and for the hidden states of the block's rows."""
    head_share, hidden_rows = share
    own = pool.scattered(hidden_rows).astype(gradient.hidden.dtype)
    beyond = gradient.hidden.shape[0]
    return dataclasses.replace(
        gradient,
        hidden=gradient.hidden.at[jnp.where(rows.are_valid, rows.at, beyond)].set(own, mode="drop"),
        head=jax.tree.map(lambda total, share: total + share.astype(total.dtype), gradient.head, head_share),
    )


def _zero_sums(names: tuple[str, ...]) -> KDSums:
    return KDSums(**{name: jnp.zeros((), jnp.float32) for name in names})


def _zero_gradient(student: Projection) -> Projection:
    """Of the head in float32, since it is added up over blocks."""
    head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), student.head)
    return dataclasses.replace(student, hidden=jnp.zeros_like(student.hidden), head=head)
