"""What is stored of a teacher: per token some ids with their weights, and two numbers of the whole distribution.

# N tokens, n tokens of a block, E teacher's width, V vocabulary (or one device's shard of it), K draws or k largest

The teacher alone walks over blocks of valid tokens, as the loss does: no [N, V] logits exist, and masked tokens cost
nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from MaxText.distill.block import finite
from MaxText.distill.kd_loss import check_temperature, check_vocabularies
from MaxText.distill.projection import Projection
from MaxText.distill.rows import Pool, axes_of, check_axes, valid_first, varying, varying_axes
from MaxText.distill.systematic import systematic_draws
from MaxText.distill.teacher_side import shared_logits
from MaxText.distill.truncation import KeptBound, check_truncation
from MaxText.distill.vocabulary import Vocabulary


class Targets(NamedTuple):
    """Of each token; what masked ones hold stands in brackets.

    ids: of the draws, with repeats, or of the k largest, ascending. [V]
    log_probs: of the k largest at temperature T, over the whole vocabulary. None for draws. [-inf]
    log_tail: of the mass outside the k largest at temperature T; -inf for none. None for draws. [-inf]
    target_log_prob: at T = 1. [0]
    entropy: at temperature T, in nats. [0]
    """

    ids: Int[Array, "N K"]
    log_probs: Float[Array, "N K"] | None
    log_tail: Float[Array, "N"] | None
    target_log_prob: Float[Array, "N"]
    entropy: Float[Array, "N"]


def teacher_targets(
    teacher: Projection,
    mask: Bool[Array, "N"],
    targets: Int[Array, "N"],
    offsets: Float[Array, "N"] | None = None,
    *,
    block_size: int,
    temperature: float = 1.0,
    draws: int = 0,
    top_k: int = 0,
    shared_vocabulary: int = 0,
    vocab_axis: str | tuple[str, ...] | None = None,
    pooled_axis: str | tuple[str, ...] | None = None,
) -> Targets:
    """What `stored.StoredTeacher` is made of: `draws` systematic draws per token, or the `top_k` largest.

    Args:
        teacher: its hidden states and head.
        mask: True at valid tokens. What the others hold is never read.
        targets: token ids; read at valid tokens only.
        offsets: in [0, 1), uniform, one per token; of draws, which are a function of them and the distribution.
        block_size: tokens of a block, of which a float32 array of [block_size, V] exists. Static.
        temperature: T > 0, of the stored weights. Static.
        draws: how many per token; 0 where top_k is asked for. Static.
        top_k: how many tokens; the vocabulary's size is allowed. Equal logits go to the lower id. Static.
        shared_vocabulary: as for `kd_loss.kd_sums`: the others have no mass, and as a target a log-probability of -inf.
        vocab_axis, pooled_axis: as for `blockwise_kd`. The targets are the same on all devices that have a token.

    Raises:
        ValueError: for an argument without meaning, which it names.
    """
    vocabulary, pool = Vocabulary(axes_of(vocab_axis)), Pool(axes_of(pooled_axis))
    check_axes(vocabulary, pool, teacher.head)
    size = teacher.vocabulary_size(vocabulary)
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: expected at least 1 token")
    if (draws < 1) == (top_k < 1):
        raise ValueError(f"draws={draws} and top_k={top_k}: expected one of them, at least 1, and 0 for the other")
    if (draws > 0) != (offsets is not None):
        raise ValueError(f"draws={draws}: expected an offset per token for draws, and none without")
    check_temperature(temperature)
    check_vocabularies(size, size, shared_vocabulary)
    check_truncation(shared_vocabulary or size, top_k=top_k, top_p=0.0)
    kind = _Kind(temperature, draws, top_k, vocabulary)
    n = min(block_size, mask.shape[0])
    blocks = valid_first(mask, n)

    def visit(i: Int[Array, ""], found: Targets) -> Targets:
        rows = blocks.rows(i, n)

        def pooled(array: Array) -> Array:
            return pool.rows_of(array, rows, to="invarying")

        logits = shared_logits(teacher, pooled(teacher.hidden), shared_vocabulary, vocabulary)
        block = kind.block(logits, pooled(targets[:, None]), None if offsets is None else pooled(offsets[:, None]))
        place = jnp.where(rows.are_valid, rows.at, mask.shape[0])
        return jax.tree.map(lambda all, part: all.at[place].set(pool.own(part, n), mode="drop"), found, block)

    # The same on each device that has a shard of the vocabulary for these tokens.
    differ = varying_axes((teacher, mask, targets, offsets)) - (set(vocabulary.axes) - set(pool.axes))
    nothing = varying(differ, kind.nothing(mask.shape[0], size))
    return jax.lax.fori_loop(0, pool.most(blocks.blocks(n)), visit, nothing)


class _Kind(NamedTuple):
    """What is asked for; static."""

    temperature: float
    draws: int
    top_k: int
    vocabulary: Vocabulary

    def nothing(self, tokens: int, size: int) -> Targets:
        """What masked tokens hold."""
        zeros = jnp.zeros((tokens,), jnp.float32)
        ids = jnp.full((tokens, self.draws or self.top_k), size, jnp.int32)
        if self.draws:
            return Targets(ids, None, None, zeros, zeros)
        return Targets(ids, jnp.full(ids.shape, -jnp.inf, jnp.float32), zeros - jnp.inf, zeros, zeros)

    def block(
        self, logits: Float[Array, "n V"], targets: Int[Array, "n 1"], offsets: Float[Array, "n 1"] | None
    ) -> Targets:
        return self._largest(logits, targets) if offsets is None else self._draws(logits, targets, offsets)

    def _draws(self, logits: Float[Array, "n V"], targets: Int[Array, "n 1"], offsets: Float[Array, "n 1"]) -> Targets:
        vocabulary, temperature = self.vocabulary, self.temperature
        maximum = finite(vocabulary.maxima(lambda _, logits: logits, logits))

        def terms(from_maximum: Array, weights: Array) -> tuple[Array | None, Array]:
            at_t1 = None if temperature == 1.0 else jnp.exp(from_maximum)
            return at_t1, _cross(from_maximum / temperature, weights)

        drawn = systematic_draws(
            logits, offsets, maximum, terms, draws=self.draws, temperature=temperature, vocabulary=vocabulary
        )
        total_at_t1, cross = drawn.sums
        of_all = self._of_all(logits, targets, maximum, total_at_t1, drawn.total, cross)
        return Targets(drawn.ids, None, None, *of_all)

    def _largest(self, logits: Float[Array, "n V"], targets: Int[Array, "n 1"]) -> Targets:
        vocabulary, temperature = self.vocabulary, self.temperature
        # Of zeros the negative ones would be ordered lower than the positive ones.
        logits = jnp.where(logits == 0.0, 0.0, logits)
        values, ids = vocabulary.top_k(logits, self.top_k)
        values = values.astype(jnp.float32)  # differences of them are taken
        bound = KeptBound(values[:, -1:], ids[:, -1:])

        def outside(ids: Int[Array, "1 V"], logits: Float[Array, "n V"]) -> Float[Array, "n V"]:
            return jnp.where(bound.keeps(logits, ids), -jnp.inf, logits)

        maximum = finite(values[:, :1])
        tail_maximum = finite(vocabulary.maxima(outside, logits))

        def terms(ids: Int[Array, "1 V"], logits: Float[Array, "n V"]) -> PyTree[Float[Array, "n V"]]:
            from_maximum = logits - maximum
            weights = jnp.exp(from_maximum / temperature)
            tail = jnp.exp((outside(ids, logits) - tail_maximum) / temperature)
            return jnp.exp(from_maximum), weights, _cross(from_maximum / temperature, weights), tail

        total_at_t1, total, cross, tail = vocabulary.sums(terms, logits)
        log_total = jnp.log(total)
        ids, log_probs = jax.lax.sort((ids, (values - maximum) / temperature - log_total), num_keys=1)
        log_tail = (tail_maximum - maximum) / temperature + jnp.log(tail) - log_total
        of_all = self._of_all(logits, targets, maximum, total_at_t1, total, cross)
        return Targets(ids, log_probs, log_tail[:, 0], *of_all)

    def _of_all(
        self,
        logits: Float[Array, "n V"],
        targets: Int[Array, "n 1"],
        maximum: Float[Array, "n 1"],
        total_at_t1: Float[Array, "n 1"] | None,
        total: Float[Array, "n 1"],
        cross: Float[Array, "n 1"],
    ) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
        """The log-probability of the target at T = 1, and the entropy."""
        at_target = self.vocabulary.at(logits, targets) - maximum
        log_prob = at_target - jnp.log(total if total_at_t1 is None else total_at_t1)
        return log_prob[:, 0], (jnp.log(total) - cross / total)[:, 0]


def _cross(scaled: Array, weights: Array) -> Array:
    """The terms of the entropy. A token of mass 0 adds nothing, also where the logarithm of its mass is -inf."""
    return jnp.where(weights > 0.0, weights * scaled, 0.0)
