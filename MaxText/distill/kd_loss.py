"""The distillation loss in its plain form, from dense logits: the reference that faster forms are proven against.

# B batch, L positions, V vocabulary

Everything is float32 whatever comes in: softmax arithmetic in bfloat16 turns a KL of 1.96 into 6.03. The maximum is
subtracted before the division by the temperature, and every log-sum-exp keeps its maximum apart (`_LogSum`): added
back, it would cost a logit of 1e4 its third decimal.

No log(p + eps) and no clamp: they bend the gradient, and under other_bucket they destroy it just when the student's
tail has collapsed and most needs it. What would be 0 * inf is masked before the operation and again after it, because
the gradient of a discarded branch is computed all the same.

Left out on purpose: a sum over the sequence of anything but valid positions, and any division by their number. Sums and
counts are added over blocks, microbatches, devices and hosts, and divided once, by the caller.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from MaxText.distill.terms.base import Term
from MaxText.distill.terms.jensen_shannon import JensenShannon
from MaxText.distill.terms.reverse_kl import ReverseKL
from MaxText.distill.truncation import Scalar, kept_set

Kept = Bool[Array, "*batch V"] | None  # membership in K; None: every token

# What an evaluation sums besides the forward KL, over the whole vocabulary at T = 1.
TERMS_AT_T1: dict[str, Term] = {"reverse_kl_t1_sum": ReverseKL(), "jsd_t1_sum": JensenShannon(0.5)}
OF_AN_EVALUATION = ("kl_t1_sum", *TERMS_AT_T1, "agreement_sum")  # of KDSums


class KDSums(NamedTuple):
    """Sums over valid positions, in nats, and their count; float32 scalars. Add them up, then divide by n once.

    None is what cannot be known of the teacher at hand.

    ce_sum          -log softmax(student)[target]
    kd_sum          T^2 KL(teacher || student) at temperature T, or another divergence, under the truncation
    log_z_sq_sum    (log sum exp of the student's logits)^2; the z-loss is a weight times this
    teacher_ce_sum  -log softmax(teacher)[target]
    n               the number of valid positions
    kept_mass_sum   the teacher's mass at temperature T inside the kept set
    kl_t1_sum       KL(teacher || student) over the whole vocabulary at T = 1. Evaluation only, else None
    reverse_kl_t1_sum  KL(student || teacher), likewise
    jsd_t1_sum      Jensen-Shannon's divergence with a beta of 1/2, likewise
    agreement_sum   positions where both models' largest logit is the same token's. Evaluation only, else None
    """

    ce_sum: Float[Array, ""]
    kd_sum: Float[Array, ""]
    log_z_sq_sum: Float[Array, ""]
    teacher_ce_sum: Float[Array, ""]
    n: Float[Array, ""]
    kept_mass_sum: Float[Array, ""] | None = None
    kl_t1_sum: Float[Array, ""] | None = None
    reverse_kl_t1_sum: Float[Array, ""] | None = None
    jsd_t1_sum: Float[Array, ""] | None = None
    agreement_sum: Float[Array, ""] | None = None


class _LogSum(NamedTuple):
    """log sum exp(logits / T) over a set of tokens, as maximum / T + log_sum. Over an empty set log_sum is -inf."""

    maximum: Float[Array, "*batch 1"]
    log_sum: Float[Array, "*batch 1"]


def _log_sum(logits: Float[Array, "*batch V"], kept: Kept, temperature: Scalar) -> _LogSum:
    """The log-sum-exp over `kept` (None: over all tokens), with a finite gradient also where the set is empty."""
    inside = True if kept is None else kept
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf, where=inside))
    maximum = jnp.where(jnp.isfinite(maximum), maximum, 0.0)
    # Tokens outside the set may lie far above its maximum: masked before the exponential, they cannot overflow it.
    weights = jnp.where(inside, jnp.exp((jnp.where(inside, logits, maximum) - maximum) / temperature), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0.0
    return _LogSum(maximum, jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total))))


def _log_prob(logits: Float[Array, "*batch #V"], over: _LogSum, temperature: Scalar) -> Float[Array, "*batch #V"]:
    """log softmax(logits / T), conditioned on the set that `over` was summed over."""
    return (logits - over.maximum) / temperature - over.log_sum


def _log_mass(part: _LogSum, whole: _LogSum, temperature: Scalar) -> Float[Array, "*batch 1"]:
    """log of the mass that the set of `part` has in the set of `whole`; -inf for none."""
    return (part.maximum - whole.maximum) / temperature + part.log_sum - whole.log_sum


def _divergence(log_p: Float[Array, "*batch V"], log_q: Float[Array, "*batch V"], kept: Kept) -> Float[Array, "*batch"]:
    """sum over `kept` of p (log p - log q), where p = 0 contributes 0, whatever the logarithms are.

    One mask is enough for a finite gradient here: what reaches log q through a term that is masked out is -p times 0.
    """
    p = jnp.exp(log_p)
    counted = p > 0.0 if kept is None else kept & (p > 0.0)
    return jnp.sum(jnp.where(counted, p * (log_p - log_q), 0.0), axis=-1)


def _kl_renormalize(
    student: Float[Array, "*batch V"], teacher: Float[Array, "*batch V"], kept: Kept, temperature: Scalar
) -> Float[Array, "*batch"]:
    log_p = _log_prob(teacher, _log_sum(teacher, kept, temperature), temperature)
    # The student's maximum is that over the kept set, too. It may be thousands below the overall one.
    log_q = _log_prob(student, _log_sum(student, kept, temperature), temperature)
    return _divergence(log_p, log_q, kept)


def _kl_renormalize_teacher(
    student: Float[Array, "*batch V"], teacher: Float[Array, "*batch V"], kept: Kept, temperature: Scalar
) -> Float[Array, "*batch"]:
    log_p = _log_prob(teacher, _log_sum(teacher, kept, temperature), temperature)
    log_q = _log_prob(student, _log_sum(student, None, temperature), temperature)
    return _divergence(log_p, log_q, kept)


def _kl_other_bucket(
    student: Float[Array, "*batch V"], teacher: Float[Array, "*batch V"], kept: Kept, temperature: Scalar
) -> Float[Array, "*batch"]:
    if kept is None:
        return _kl_renormalize(student, teacher, kept, temperature)
    teacher_all = _log_sum(teacher, None, temperature)
    student_all = _log_sum(student, None, temperature)
    inside = _divergence(
        _log_prob(teacher, teacher_all, temperature), _log_prob(student, student_all, temperature), kept
    )
    # 1 - sum over K would cancel: a student's tail of 1e-9 would read as 0, or as less.
    log_p_tail = _log_mass(_log_sum(teacher, ~kept, temperature), teacher_all, temperature)
    log_q_tail = _log_mass(_log_sum(student, ~kept, temperature), student_all, temperature)
    return inside + _divergence(log_p_tail, log_q_tail, None)


_KL_BY_STRATEGY: dict[str, Callable[..., Float[Array, "*batch"]]] = {
    "renormalize": _kl_renormalize,
    "other_bucket": _kl_other_bucket,
    "renormalize_teacher": _kl_renormalize_teacher,
}
TRUNCATION_STRATEGIES = tuple(_KL_BY_STRATEGY)


def check_vocabularies(student: int, teacher: int, shared: int = 0) -> None:
    """Raises ValueError where logits end in vocabularies that are not one, or that do not have so many tokens."""
    if student != teacher:
        raise ValueError(f"student and teacher logits end in {student} and {teacher} tokens: expected one vocabulary")
    if not 0 <= shared <= teacher:
        raise ValueError(f"shared_vocabulary={shared}: expected 0 (all) to {teacher} tokens")


def check_temperature(temperature: Scalar) -> None:
    """Raises ValueError for a temperature that is none. A traced one is taken on trust."""
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number above 0")


def check_strategy(truncation_strategy: str) -> None:
    if truncation_strategy not in TRUNCATION_STRATEGIES:
        raise ValueError(
            f"truncation_strategy={truncation_strategy!r}: expected one of {', '.join(TRUNCATION_STRATEGIES)}"
        )


def kl_divergence(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    *,
    temperature: Scalar = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    truncation_strategy: str = "renormalize",
) -> Float[Array, "*batch"]:
    """KL(teacher || student) at temperature T, per position, in nats, without the factor T^2.

    With p = softmax(teacher / T), q = softmax(student / T), K the teacher's kept set (`truncation.kept_set`), and P, Q
    the masses of p and q outside K:

        renormalize          sum over K of p(i|K) log(p(i|K) / q(i|K))
        other_bucket         sum over K of p_i log(p_i / q_i)  +  P log(P / Q), where P = 0 contributes 0
        renormalize_teacher  sum over K of p(i|K) log(p(i|K) / q_i)

    Without truncation the three are the same. The gradient with respect to the student's logits, times T, is

        renormalize          q(i|K) - p(i|K) in K, exactly 0 outside
        other_bucket         q_i - p_i in K, q_i (1 - P / Q) outside
        renormalize_teacher  q_i - p(i|K) in K, q_i outside

    Under renormalize the mass that the student puts outside K is seen by nothing in this term: pair it with
    cross-entropy. Between equal models renormalize_teacher is not 0 but -log of the kept mass.

    Args:
        student_logits: raw, at temperature 1, any float type. Finite; -inf only where the teacher has -inf as well, as
            for the padding of a vocabulary.
        teacher_logits: likewise; -inf marks tokens of mass 0. No gradient flows to them: they go through stop_gradient.
        temperature: T > 0. May be traced.
        top_k: keep the k largest; 0 is off. Static.
        top_p: keep the nucleus of this mass; 0.0 is off. Static.
        truncation_strategy: one of TRUNCATION_STRATEGIES. Static.

    Returns:
        float32, one number per position; finite in value and gradient for finite logits up to 1e4.

    Raises:
        ValueError: for an argument without meaning, which it names.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2.
    """
    check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    check_temperature(temperature)
    check_strategy(truncation_strategy)
    student = student_logits.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    kept = kept_set(teacher, temperature=temperature, top_k=top_k, top_p=top_p)
    return _KL_BY_STRATEGY[truncation_strategy](student, teacher, kept, temperature)


def divergence(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    term: Term,
    *,
    temperature: Scalar = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    truncation_strategy: str = "renormalize",
) -> Float[Array, "*batch"]:
    """The sum of a term f(p, q) at temperature T, per position, in nats, without the factor T^2.

    With p, q, K, P and Q as for `kl_divergence`:

        renormalize          sum over K of f(p(i|K), q(i|K))
        other_bucket         sum over K of f(p_i, q_i)  +  f(P, Q)
        renormalize_teacher  sum over K of f(p(i|K), q_i), for terms that are 0 where p is

    Without truncation they are the sum over all tokens. A term that is infinite where p is 0 and q is not (the reverse
    KL's) leaves out the tokens to which the teacher gives no mass at all, a logit of -inf: q is conditioned on the
    others, in K and outside, and no gradient reaches these. Where both models' logits are -inf a token is in no term.

    Args:
        student_logits, teacher_logits, temperature, top_k, top_p, truncation_strategy: as for `kl_divergence`.
        term: one of `terms`. Static.

    Returns:
        float32, one number per position; finite in value and gradient for finite logits up to 1e4.

    Raises:
        ValueError: for an argument without meaning, which it names.
    """
    check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    check_temperature(temperature)
    check_strategy(truncation_strategy)
    term.check(truncation_strategy)
    student = student_logits.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    kept = kept_set(teacher, temperature=temperature, top_k=top_k, top_p=top_p)
    has_mass = teacher > -jnp.inf if term.is_of_teachers_support else jnp.ones_like(teacher, dtype=bool)
    inside, outside = (has_mass, None) if kept is None else (kept & has_mass, ~kept & has_mass)
    teacher_all = _log_sum(teacher, kept if truncation_strategy != "other_bucket" else None, temperature)
    student_all = _log_sum(student, inside if truncation_strategy == "renormalize" else has_mass, temperature)
    log_p, log_q = _log_prob(teacher, teacher_all, temperature), _log_prob(student, student_all, temperature)
    found = _term_sum(term, log_p, log_q, inside)
    if outside is None or truncation_strategy != "other_bucket":
        return found
    log_p_tail = _log_mass(_log_sum(teacher, outside, temperature), teacher_all, temperature)
    log_q_tail = _log_mass(_log_sum(student, outside, temperature), student_all, temperature)
    return found + _term_sum(term, log_p_tail, log_q_tail, None)


def _term_sum(
    term: Term, log_p: Float[Array, "*batch V"], log_q: Float[Array, "*batch V"], counted: Kept
) -> Float[Array, "*batch"]:
    """The sum over what is counted (None: all) and has mass in the student."""
    has_mass = log_q > -jnp.inf
    counted = has_mass if counted is None else counted & has_mass
    log_p, log_q = (jnp.where(counted, x, 0.0) for x in (log_p, log_q))
    return jnp.sum(jnp.where(counted, term.value(log_p, log_q), 0.0), axis=-1)


def kept_mass(
    teacher_logits: Float[Array, "*batch V"],
    *,
    temperature: Scalar = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
) -> Float[Array, "*batch"]:
    """The teacher's mass, at temperature T, inside its kept set, per position; 1 without truncation.

    Args:
        teacher_logits, temperature, top_k, top_p: as for `kl_divergence`.

    Raises:
        ValueError: by `truncation.check_truncation`.
    """
    teacher = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    kept = kept_set(teacher, temperature=temperature, top_k=top_k, top_p=top_p)
    if kept is None:
        return jnp.ones(teacher.shape[:-1], jnp.float32)
    inside, whole = _log_sum(teacher, kept, temperature), _log_sum(teacher, None, temperature)
    return jnp.exp(_log_mass(inside, whole, temperature))[..., 0]


def cross_entropy_and_log_z(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """-log softmax(logits)[target] at T = 1, per position, in nats, and log z, the log-sum-exp of the logits.

    Args:
        logits: raw, any float type.
        targets: token ids in [0, V).

    Returns:
        The cross-entropy, and log z, whose square is what a z-loss is made of. Both float32.
    """
    logits = logits.astype(jnp.float32)
    over = _log_sum(logits, None, 1.0)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return -_log_prob(at_target, over, 1.0)[..., 0], (over.maximum + over.log_sum)[..., 0]


def cross_entropy(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target] at T = 1, per position, in nats: `cross_entropy_and_log_z` without log z."""
    return cross_entropy_and_log_z(logits, targets)[0]


def kd_sums(
    student_logits: Float[Array, "B L V"],
    teacher_logits: Float[Array, "B L V"],
    targets: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    *,
    temperature: Scalar = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    truncation_strategy: str = "renormalize",
    term: Term | None = None,
    shared_vocabulary: int = 0,
    evaluation: bool = False,
) -> KDSums:
    """Every sum over valid positions that a distillation step, or an evaluation, is made of, from dense logits.

        loss = ((1 - alpha) ce_sum + alpha kd_sum + z_weight log_z_sq_sum) / n

    Args:
        student_logits, teacher_logits: raw; differentiable with respect to the student's.
        targets: token ids; read at valid positions only.
        mask: True at valid positions. The others contribute exactly 0 to values and gradients, whatever their logits
            are, infinities and NaN included.
        temperature, top_k, top_p, truncation_strategy: as for `kl_divergence`.
        term: of the divergence, as for `divergence`; None is the forward KL.
        shared_vocabulary: how many of the first token ids both models have; 0 is all. The others are only in the
            student's cross-entropy and z-loss: each term that the teacher is in leaves them out of both softmaxes. As
            a target such a token makes teacher_ce_sum infinite.
        evaluation: also compute what only evaluations need. Static.

    Returns:
        KDSums, to be added up and divided by n after the last reduction.

    Raises:
        ValueError: for an argument without meaning, which it names.
    """
    check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1], shared_vocabulary)
    truncation: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    # Replaced before any arithmetic: a NaN that is computed and then masked comes back through the gradient.
    student = jnp.where(mask[..., None], student_logits.astype(jnp.float32), 0.0)
    teacher = jnp.where(mask[..., None], jax.lax.stop_gradient(teacher_logits.astype(jnp.float32)), 0.0)
    targets = jnp.where(mask, targets, 0)

    def total(per_position: Float[Array, "B L"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(mask, per_position, 0.0), dtype=jnp.float32)

    ce, log_z = cross_entropy_and_log_z(student, targets)
    shared = shared_vocabulary or student.shape[-1]
    teacher_ce = cross_entropy(jnp.where(jnp.arange(teacher.shape[-1]) < shared, teacher, -jnp.inf), targets)
    student, teacher = student[..., :shared], teacher[..., :shared]
    truncated = truncation | {"truncation_strategy": truncation_strategy}
    if term is None:
        kd = kl_divergence(student, teacher, **truncated)
    else:
        kd = divergence(student, teacher, term, **truncated)
    sums = KDSums(
        ce_sum=total(ce),
        kd_sum=temperature**2 * total(kd),
        log_z_sq_sum=total(log_z**2),
        teacher_ce_sum=total(teacher_ce),
        kept_mass_sum=total(kept_mass(teacher, **truncation)),
        n=total(jnp.ones_like(ce)),
    )
    if not evaluation:
        return sums
    return sums._replace(
        kl_t1_sum=total(kl_divergence(student, teacher)),
        agreement_sum=total(jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1)),
        **{name: total(divergence(student, teacher, term)) for name, term in TERMS_AT_T1.items()},
    )
