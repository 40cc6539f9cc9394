"""The distillation loss from hidden states, block by block: no [N, V] logits exist, and nothing is projected twice.

# N tokens, n tokens of a block, D student's width, E teacher's width, V vocabulary (or one device's shard of it)

The loss walks over blocks of n valid tokens. In each it projects student and teacher, takes every sum that
`kd_loss.kd_sums` takes, and, where the loss is differentiated, the gradient with respect to the student's hidden
states and head in the same visit; the backward pass only scales it. Per valid token that is 2 V (3 D + E) FLOPs, the
least that there is, and memory is the heads, the gradient of the student's head and three arrays of [n, V].

Masked tokens are left out of the blocks, so that they cost nothing wherever they lie; only the last block is filled up.

Gradient with respect to the student's logits z at a valid token, where s = softmax(z), log_z its log-sum-exp, y the
target's one-hot vector, and p, q, K, P, Q are those of `kd_loss.kl_divergence`:

    (1 - alpha) (s - y)  +  2 z_weight log_z s  +  alpha T slope

        renormalize          slope = q(.|K) - p(.|K) in K, 0 outside
        other_bucket         slope = q - p in K, q - P q / Q outside
        renormalize_teacher  slope = q - p(.|K) in K, q outside

Left out on purpose: the choice of the block's size, which follows from a byte budget that the caller has, and any
gradient for the teacher, the auxiliary sums, alpha, the temperature or the z-loss's weight.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from MaxText.distill.kd_loss import KDSums, check_kd_arguments
from MaxText.distill.truncation import kept_bound
from MaxText.distill.vocabulary import Vocabulary

Project = Callable[[PyTree, Float[Array, "n width"]], Float[Array, "n V"]]


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the compiled walk depends on."""

    student_project: Project
    teacher_project: Project
    top_k: int
    top_p: float
    truncation_strategy: str
    shared_vocabulary: int
    block_size: int
    evaluation: bool
    vocabulary: Vocabulary
    pooled_axes: tuple[str, ...]


class _Weights(NamedTuple):
    """What may change from step to step without a new compilation; float32 scalars."""

    alpha: Float[Array, ""]
    temperature: Float[Array, ""]
    z_weight: Float[Array, ""]


def blockwise_kd(
    student_hidden: Float[Array, "N D"],
    student_head: PyTree,
    teacher_hidden: Float[Array, "N E"],
    teacher_head: PyTree,
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"],
    *,
    student_project: Project,
    teacher_project: Project,
    alpha: float | Float[Array, ""],
    temperature: float | Float[Array, ""],
    z_weight: float | Float[Array, ""] = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    truncation_strategy: str = "renormalize",
    shared_vocabulary: int = 0,
    block_size: int,
    evaluation: bool = False,
    vocab_axis: str | tuple[str, ...] | None = None,
    pooled_axis: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], KDSums]:
    """Sum over valid tokens of CE, T^2 KL(teacher || student) and z-loss, blended, in nats, and the sums it is made of.

        objective_sum = (1 - alpha) ce_sum + alpha kd_sum + z_weight log_z_sq_sum

    Only objective_sum is differentiable, and only with respect to student_hidden and student_head. Inside
    `jax.shard_map` (with check_vma=True) each device walks its own tokens. No collective of a head's size stands in the
    walk: the gradient of a head that is the same on several devices is added up once, after it. The caller adds up
    objective_sum and the sums over the axes that shard the tokens.

    Args:
        student_hidden: what student_project takes, one row per token; any float type.
        student_head: parameters of student_project. Their gradient is accumulated over blocks in float32 and returned
            in their own type; each block's share has the precision that student_project's derivative gives it.
        teacher_hidden, teacher_head: likewise; no gradient flows to them.
        targets: token ids in [0, V) at valid tokens.
        mask: True at valid tokens. What the others hold is never read.
        student_project: (head, hidden "n D") -> logits "n V" of any float type: final norm, matrix, soft cap, scale.
            A static argument: pass one and the same function at each call, or the caller's jit compiles again.
        teacher_project: likewise.
        alpha: weight of the divergence; 1 - alpha is that of cross-entropy.
        temperature: T > 0.
        z_weight: weight of the squared log-sum-exp of the student's logits.
        top_k, top_p, truncation_strategy: as for `kd_loss.kl_divergence`. Static.
        shared_vocabulary: as for `kd_loss.kd_sums`. Static.
        block_size: tokens of a block. Memory is about three float32 arrays of [block_size, V], four with top_p. Static.
        evaluation: also take kl_t1_sum and agreement_sum. Static.
        vocab_axis: mesh axis, or axes, that shard the vocabulary, where each device's project functions give its own
            shard of the logits, in order of token ids. Log-sum-exps and top-k are merged across it, and the gradient
            of the hidden states is added up over it once, after the walk. The sums are the same on all its devices.
        pooled_axis: those of vocab_axis along which tokens differ too. A block is then block_size tokens of each device
            of the axis, whose hidden states are gathered in the walk, and whose gradients are scattered back, while
            heads stay sharded: memory for a head and its gradient is that of the shard. The sums are those of all the
            axis's tokens, the same on all its devices.

    Returns:
        objective_sum and KDSums, float32, to be divided by n after the last reduction.

    Raises:
        ValueError: by `kd_loss.check_kd_arguments`, for block_size < 1, and for a vocab_axis that shards no head.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: expected at least 1 token")
    static = _Static(
        student_project=student_project,
        teacher_project=teacher_project,
        top_k=top_k,
        top_p=top_p,
        truncation_strategy=truncation_strategy,
        shared_vocabulary=shared_vocabulary,
        block_size=min(block_size, mask.shape[0]),
        evaluation=evaluation,
        vocabulary=Vocabulary(_axes(vocab_axis)),
        pooled_axes=_axes(pooled_axis),
    )
    _check(static, student_hidden, student_head, teacher_hidden, teacher_head, temperature)
    weights = _Weights(*(jnp.asarray(weight, jnp.float32) for weight in (alpha, temperature, z_weight)))
    # A student's array that is the same on several devices gets the sum of their gradients. Without the marks jax would
    # take that sum in every block; with them, once after the walk.
    differ = _varying_axes((student_hidden, student_head, teacher_hidden, teacher_head, mask))
    student_hidden, student_head = _varying(differ, (student_hidden, student_head))
    frozen = jax.lax.stop_gradient((teacher_hidden, teacher_head, targets, mask, weights))
    return _blockwise_kd(static, student_hidden, student_head, *frozen)


def _axes(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def _check(static, student_hidden, student_head, teacher_hidden, teacher_head, temperature):
    axes = static.vocabulary.axes
    if not _varying_axes((student_head, teacher_head)).issuperset(axes):
        raise ValueError(
            f"vocab_axis={axes}: expected axes of jax.shard_map(..., check_vma=True) along which the heads differ"
        )
    if not set(static.pooled_axes) <= set(axes):
        raise ValueError(f"pooled_axis={static.pooled_axes}: expected some of vocab_axis={axes}")
    student = jax.eval_shape(static.student_project, student_head, student_hidden[:1])
    teacher = jax.eval_shape(static.teacher_project, teacher_head, teacher_hidden[:1])
    check_kd_arguments(
        static.vocabulary.size(student),
        static.vocabulary.size(teacher),
        temperature=temperature,
        top_k=static.top_k,
        top_p=static.top_p,
        truncation_strategy=static.truncation_strategy,
        shared_vocabulary=static.shared_vocabulary,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise_kd(static: _Static, student_hidden, student_head, *frozen):
    """Not differentiated: the walk without gradients."""
    return _walk(static, student_hidden, student_head, *frozen, differentiate=False)[:2]


def _forward(static: _Static, student_hidden, student_head, *frozen):
    objective_sum, sums, gradients = _walk(static, student_hidden, student_head, *frozen, differentiate=True)
    return (objective_sum, sums), gradients


def _backward(static: _Static, gradients, cotangents):
    scale, _ = cotangents
    nothing_for_frozen = (None,) * 5
    return *jax.tree.map(lambda gradient: (scale * gradient).astype(gradient.dtype), gradients), *nothing_for_frozen


_blockwise_kd.defvjp(_forward, _backward)


def _walk(static, student_hidden, student_head, teacher_hidden, teacher_head, targets, mask, weights, *, differentiate):
    """The sums over all valid tokens and, if asked, the objective's gradients for student_hidden and student_head."""
    tokens, n = mask.shape[0], static.block_size
    # Valid tokens first. The last block is filled up with the first valid token, whose numbers are as sound as any.
    order = jnp.nonzero(mask, size=-(-tokens // n) * n, fill_value=jnp.argmax(mask))[0].astype(jnp.int32)
    number = jnp.sum(mask, dtype=jnp.int32)

    pool = static.pooled_axes

    def own_rows(rows, is_valid, array):
        # A device without a valid token goes along with the others of its pool; what its rows hold is not read.
        return jnp.where(is_valid[:, None], array[rows], jnp.zeros((), array.dtype)) if pool else array[rows]

    def pooled(x):
        return jax.lax.all_gather(x, pool, axis=0, tiled=True) if pool else x

    def pooled_alike(x):
        return jax.lax.all_gather(x, pool, axis=0, tiled=True, to="invarying") if pool else x

    def visit(block, carry):
        sums, hidden_gradient, head_gradient = carry
        rows = jax.lax.dynamic_slice(order, (block * n,), (n,))
        is_own_valid = block * n + jnp.arange(n, dtype=jnp.int32) < number
        is_valid = pooled_alike(is_own_valid)[:, None]
        block_targets = pooled_alike(own_rows(rows, is_own_valid, targets[:, None]))
        teacher = static.teacher_project(teacher_head, pooled(own_rows(rows, is_own_valid, teacher_hidden)))
        hidden = pooled(own_rows(rows, is_own_valid, student_hidden))
        if differentiate:
            student, pull_back = jax.vjp(static.student_project, student_head, hidden)
        else:
            student = static.student_project(student_head, hidden)
        block_sums, gradient = _block(
            static, weights, student, teacher, block_targets, is_valid, differentiate=differentiate
        )
        sums = jax.tree.map(jnp.add, sums, block_sums)
        if differentiate:
            head_share, hidden_rows = pull_back(gradient.astype(student.dtype))
            head_gradient = jax.tree.map(
                lambda total, share: total + share.astype(total.dtype), head_gradient, head_share
            )
            if pool:
                partial = hidden_rows.astype(jnp.float32)
                hidden_rows = jax.lax.psum_scatter(partial, pool, scatter_dimension=0, tiled=True)
            hidden_rows = hidden_rows.astype(hidden_gradient.dtype)
            hidden_gradient = hidden_gradient.at[jnp.where(is_own_valid, rows, tokens)].set(hidden_rows, mode="drop")
        return sums, hidden_gradient, head_gradient

    blocks = -(-number // n)
    if pool:
        blocks = jax.lax.pmax(blocks, pool)
    # Inside `jax.shard_map` a loop's carry must be marked from the start as differing between devices where it will.
    differ = _varying_axes((student_hidden, student_head, teacher_hidden, teacher_head, mask))
    start = (_varying(differ - set(static.vocabulary.axes), _zero_sums(static.evaluation)), None, None)
    if differentiate:
        zero_head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), student_head)
        start = (start[0], _varying(differ, jnp.zeros_like(student_hidden)), _varying(differ, zero_head))
    sums, hidden_gradient, head_gradient = jax.lax.fori_loop(0, blocks, visit, start)
    objective_sum = (
        (1.0 - weights.alpha) * sums.ce_sum + weights.alpha * sums.kd_sum + weights.z_weight * sums.log_z_sq_sum
    )
    if not differentiate:
        return objective_sum, sums, None
    head_gradient = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), head_gradient, student_head)
    return objective_sum, sums, (hidden_gradient, head_gradient)


def _varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes of the surrounding `jax.shard_map` along which any of the arrays differs."""
    return frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def _varying(axes: frozenset[str], tree: PyTree) -> PyTree:
    """The same arrays, marked as differing along these axes. The gradient of the mark is a sum over them."""

    def mark(leaf):
        missing = tuple(axes - jax.typeof(leaf).mat.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def _zero_sums(evaluation: bool) -> KDSums:
    fields = KDSums._fields if evaluation else [name for name in KDSums._fields if name not in KDSums._field_defaults]
    return KDSums(**{name: jnp.zeros((), jnp.float32) for name in fields})


class _Form(NamedTuple):
    """A truncation strategy as what the block's arithmetic depends on."""

    conditions_student: bool  # q is conditioned on K
    conditions_teacher: bool  # p is conditioned on K
    has_tail: bool  # what is outside K counts as one token


_FORMS = {
    "renormalize": _Form(conditions_student=True, conditions_teacher=True, has_tail=False),
    "other_bucket": _Form(conditions_student=False, conditions_teacher=False, has_tail=True),
    "renormalize_teacher": _Form(conditions_student=False, conditions_teacher=True, has_tail=False),
}
_NOT_TRUNCATED = _Form(conditions_student=False, conditions_teacher=False, has_tail=False)


class _Maxima(NamedTuple):
    """Per token, the largest logits of a block; subtracted before any exponential."""

    student: Float[Array, "n 1"]
    teacher: Float[Array, "n 1"]
    q: Float[Array, "n 1"]  # the student's in the set that q is conditioned on
    q_tail: Float[Array, "n 1"] | None  # the student's outside K
    shared: Float[Array, "n 1"] | None  # the student's among the tokens that both models have


class _Totals(NamedTuple):
    """Per token, sums over the vocabulary. The weights p and q are exponentials at temperature T."""

    student: Float[Array, "n 1"]  # of exponentials at T = 1
    teacher: Float[Array, "n 1"]
    p: Float[Array, "n 1"]
    p_kept: Float[Array, "n 1"]
    q: Float[Array, "n 1"]
    cross: Float[Array, "n 1"]  # over K: p times the difference of the logits over T, from their maxima
    p_tail: Float[Array, "n 1"] | None
    q_tail: Float[Array, "n 1"] | None
    shared: Float[Array, "n 1"] | None  # the student's among the tokens that both models have, at T = 1
    cross_t1: Float[Array, "n 1"] | None  # over all tokens, at T = 1


def _block(
    static, weights, student, teacher, targets, is_valid, *, differentiate
) -> tuple[KDSums, Float[Array, "n V"] | None]:
    """One block's sums and, if asked, the objective's gradient with respect to the student's logits.

    Three visits of the logits: maxima, sums, gradient. Only the last one writes an array of their size: weights are
    recomputed rather than stored, and the kept set is a comparison.
    """
    vocabulary, temperature = static.vocabulary, weights.temperature
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    size = vocabulary.size(teacher)
    shared_size = static.shared_vocabulary or size
    is_truncated = static.top_k not in (0, shared_size) or static.top_p not in (0.0, 1.0)
    form = _FORMS[static.truncation_strategy] if is_truncated else _NOT_TRUNCATED

    def is_shared(ids):
        return ids < shared_size if shared_size < size else jnp.ones_like(ids, dtype=bool)

    # To the loss a token that only one of the models has is one without mass.
    teacher = jnp.where(is_shared(vocabulary.ids(teacher)), teacher, -jnp.inf)
    if is_truncated:
        # Without negative zeros, as kept_bound asks.
        teacher = jnp.where(teacher == 0.0, 0.0, teacher)
        bound = kept_bound(
            teacher, temperature=temperature, top_k=static.top_k, top_p=static.top_p, vocabulary=vocabulary
        )

    def is_kept(ids, teacher):
        return bound.keeps(teacher, ids) if is_truncated else jnp.ones_like(teacher, dtype=bool)

    def is_in_q(ids, kept):
        return kept if form.conditions_student else is_shared(ids)

    def to_maximize(ids, student, teacher):
        kept = is_kept(ids, teacher)
        return _Maxima(
            student=student,
            teacher=teacher,
            q=jnp.where(is_in_q(ids, kept), student, -jnp.inf),
            q_tail=jnp.where(is_shared(ids) & ~kept, student, -jnp.inf) if form.has_tail else None,
            shared=jnp.where(is_shared(ids), student, -jnp.inf) if static.evaluation else None,
        )

    # A tail of no tokens has a maximum of -inf.
    maxima = vocabulary.maxima(to_maximize, student, teacher)
    maxima = jax.tree.map(lambda maximum: jnp.where(jnp.isfinite(maximum), maximum, 0.0), maxima)

    def shift(logits, maximum):
        return (logits - maximum) / temperature

    def shared_at_t1(ids, student, teacher):
        if not static.evaluation:
            return {"shared": None, "cross_t1": None}
        p = jnp.exp(teacher - maxima.teacher)
        difference = (teacher - maxima.teacher) - (student - maxima.shared)
        return {
            "shared": jnp.where(is_shared(ids), jnp.exp(student - maxima.shared), 0.0),
            "cross_t1": jnp.where(p > 0.0, p * difference, 0.0),
        }

    def to_sum(ids, student, teacher):
        kept = is_kept(ids, teacher)
        p, q = jnp.exp(shift(teacher, maxima.teacher)), jnp.exp(shift(student, maxima.q))
        difference = shift(teacher, maxima.teacher) - shift(student, maxima.q)
        return _Totals(
            student=jnp.exp(student - maxima.student),
            teacher=jnp.exp(teacher - maxima.teacher),
            p=p,
            p_kept=jnp.where(kept, p, 0.0),
            q=jnp.where(is_in_q(ids, kept), q, 0.0),
            # A weight of 0 contributes 0, also where its logarithm is -inf.
            cross=jnp.where(kept & (p > 0.0), p * difference, 0.0),
            p_tail=jnp.where(kept, 0.0, p) if form.has_tail else None,
            q_tail=jnp.where(is_shared(ids) & ~kept, jnp.exp(shift(student, maxima.q_tail)), 0.0)
            if form.has_tail
            else None,
            **shared_at_t1(ids, student, teacher),
        )

    totals = vocabulary.sums(to_sum, student, teacher)
    p_total = totals.p_kept if form.conditions_teacher else totals.p
    log_ratio = jnp.log(totals.q) - jnp.log(p_total)
    kl = (totals.cross + totals.p_kept * log_ratio) / p_total
    if form.has_tail:
        tail = totals.p_tail / totals.p
        has_tail = tail > 0.0
        log_q_tail = shift(maxima.q_tail, maxima.q) + jnp.log(totals.q_tail) - jnp.log(totals.q)
        kl += jnp.where(has_tail, tail * (jnp.log(tail) - log_q_tail), 0.0)
    log_z = maxima.student + jnp.log(totals.student)
    sums = KDSums(
        ce_sum=jnp.log(totals.student) - (vocabulary.at(student, targets) - maxima.student),
        kd_sum=temperature**2 * kl,
        log_z_sq_sum=log_z**2,
        teacher_ce_sum=jnp.log(totals.teacher) - (vocabulary.at(teacher, targets) - maxima.teacher),
        kept_mass_sum=totals.p_kept / totals.p,
        n=jnp.ones_like(kl),
    )
    if static.evaluation:

        def first_largest(ids, student, teacher):
            return (
                jnp.where(is_shared(ids) & (student == maxima.shared), -ids, -size),
                jnp.where(teacher == maxima.teacher, -ids, -size),
            )

        top_student, top_teacher = vocabulary.maxima(first_largest, student, teacher)
        sums = sums._replace(
            kl_t1_sum=totals.cross_t1 / totals.teacher + jnp.log(totals.shared) - jnp.log(totals.teacher),
            agreement_sum=(top_student == top_teacher).astype(jnp.float32),
        )
    sums = jax.tree.map(lambda per_token: jnp.sum(jnp.where(is_valid, per_token, 0.0)), sums)
    if not differentiate:
        return sums, None

    # Per token, what the visit for the gradient multiplies its exponentials by.
    hard = jnp.where(is_valid, 1.0 - weights.alpha, 0.0)
    soft = jnp.where(is_valid, weights.alpha * temperature, 0.0)
    by_student = (hard + jnp.where(is_valid, 2.0 * weights.z_weight * log_z, 0.0)) / totals.student
    by_q, by_p = soft / totals.q, soft / p_total
    ids = vocabulary.ids(student)
    kept = is_kept(ids, teacher)
    q = by_q * jnp.exp(shift(student, maxima.q))
    p = by_p * jnp.exp(shift(teacher, maxima.teacher))
    if form.has_tail:
        by_q_tail = jnp.where(has_tail, soft * tail / totals.q_tail, 0.0)
        slope = q - jnp.where(kept, p, by_q_tail * jnp.exp(shift(student, maxima.q_tail)))
    else:
        slope = q - jnp.where(kept, p, 0.0)
    slope = jnp.where(is_in_q(ids, kept), slope, 0.0)
    hard_gradient = by_student * jnp.exp(student - maxima.student) - jnp.where(ids == targets, hard, 0.0)
    return sums, hard_gradient + slope
