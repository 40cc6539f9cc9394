"""The entropy of a student's distribution at each token, from hidden states, block by block: no [N, V] logits exist.

# N tokens, n tokens of a block, V vocabulary (or one device's shard of it)

The walk is that of blockwise.py, with one product a block and nothing to differentiate. Left out on purpose: what is
chosen by the entropies.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from MaxText.distill.block import finite
from MaxText.distill.projection import Projection
from MaxText.distill.rows import Pool, axes_of, check_axes, valid_first, varying, varying_axes
from MaxText.distill.vocabulary import Vocabulary


def entropies(
    student: Projection,
    mask: Bool[Array, "N"],
    *,
    block_size: int,
    vocab_axis: str | tuple[str, ...] | None = None,
    pooled_axis: str | tuple[str, ...] | None = None,
) -> Float[Array, "N"]:
    """H(q) = -sum_i q_i log q_i of the student's softmax q at T = 1, per token, in nats; 0 at tokens that are masked.

    Args:
        student: no gradient flows to it.
        mask: True at valid tokens. What the others hold is never read.
        block_size, vocab_axis, pooled_axis: as for `blockwise.blockwise_kd`.

    Raises:
        ValueError: for block_size < 1, and a vocab_axis that shards no head.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: expected at least 1 token")
    vocabulary, pool = Vocabulary(axes_of(vocab_axis)), Pool(axes_of(pooled_axis))
    check_axes(vocabulary, pool, student.head)
    student = jax.lax.stop_gradient(student)
    n, beyond = min(block_size, mask.shape[0]), mask.shape[0]
    blocks = valid_first(mask, n)

    def visit(i: Int[Array, ""], found: Float[Array, "N"]) -> Float[Array, "N"]:
        rows = blocks.rows(i, n)
        of_block = entropy(student.project(student.head, pool.rows_of(student.hidden, rows)), vocabulary)
        own = pool.own(of_block, n)[:, 0]
        return found.at[jnp.where(rows.are_valid, rows.at, beyond)].set(own, mode="drop")

    differ = varying_axes((student.hidden, mask))
    return jax.lax.fori_loop(0, pool.most(blocks.blocks(n)), visit, varying(differ, jnp.zeros(mask.shape, jnp.float32)))


def entropy(logits: Float[Array, "n V"], vocabulary: Vocabulary) -> Float[Array, "n 1"]:
    """log Z minus the mean logit, both counted from the largest."""
    maximum = finite(vocabulary.maxima(lambda ids, logits: logits, logits))

    def terms(ids: Int[Array, "1 V"], logits: Float[Array, "n V"]) -> tuple[Array, Array]:
        weight = jnp.exp(logits - maximum)
        return weight, jnp.where(weight > 0, weight * (logits - maximum), 0.0)  # 0 log 0 = 0

    total, mean = vocabulary.sums(terms, logits)
    return jnp.log(total) - mean / total
