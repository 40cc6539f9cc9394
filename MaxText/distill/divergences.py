"""Divergences of a student from its teacher, as a block of the loss asks for them: the value, and the slope.

# n positions of a block, V vocabulary (or one device's shard of it, or a chunk of that)

A divergence shares the visits of the vocabulary with all else that a block takes from it. In the first it names what it
needs the largest values of, in the second what it needs the sums of. From these it gives its value per position and,
where the loss is differentiated, in a last visit its slope at each token. Here are these questions, and the forward
KL's answers; term_sums.py answers for all that is a sum of terms of p and q, which is what a new divergence is.

Left out on purpose: the factor T^2 and any weight, which are the block's, and the kept set, which is the teacher's
side's.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from MaxText.distill.truncation import Scalar

PerPosition = Float[Array, "n 1"]
PerToken = Float[Array, "n V"]


class Logits(NamedTuple):
    """Both models' raw float32 logits at n positions, of all tokens or of some of them."""

    student: PerToken
    teacher: PerToken  # -inf for tokens without mass, those among them that the models do not share
    is_shared: Bool[Array, "1 V"]
    is_kept: Bool[Array, "n V"]  # membership in K
    is_truncated: bool  # whether K may be less than all that is shared; static


class Scale(NamedTuple):
    """What weights are taken from: per position the largest logits, 0 where there are none, and the temperature."""

    student: PerPosition
    teacher: PerPosition
    own: Any  # what Divergence.maxima asked for
    temperature: Scalar

    def log_weight(self, logits: Float[Array, "n #V"], maximum: PerPosition) -> Float[Array, "n #V"]:
        """The logarithm of a weight at temperature T, 0 for a logit at the maximum.

        Subtracted before it is scaled: a logit of 1e4 has no decimals to lose. Scaled by a product: with a division at
        each token a compiler for TPUs writes the gradient instead of computing it in the products that read it.
        """
        return (logits - maximum) * (1.0 / self.temperature)


class Sums(NamedTuple):
    """Per position, sums of weights over the vocabulary."""

    p: PerPosition  # the teacher's at temperature T
    p_kept: PerPosition  # those of them in K
    own: Any  # what Divergence.terms asked for
    normalized: Any = None  # what Divergence.normalized_terms asked for


class Divergence(abc.ABC):
    """How far the student's distribution at temperature T is from the teacher's, per position, in nats."""

    @property
    def name(self) -> str:
        """For people."""
        return type(self).__name__

    @property
    def reads_outside(self) -> bool:
        """Whether under a truncation it depends on weights outside K."""
        return True

    @abc.abstractmethod
    def maxima(self, logits: Logits) -> PyTree[PerToken]:
        """Arrays whose largest values over the vocabulary are wanted."""

    @abc.abstractmethod
    def terms(self, logits: Logits, scale: Scale) -> PyTree[PerToken]:
        """Arrays whose sums over the vocabulary are wanted."""

    def normalized_terms(self, logits: Logits, scale: Scale, sums: Sums) -> PyTree[PerToken] | None:
        """Likewise, where terms need sums that are known: logarithms of p + q. It costs a visit; None costs nothing."""
        return None

    @abc.abstractmethod
    def value(self, scale: Scale, sums: Sums) -> PerPosition:
        """The divergence."""

    @abc.abstractmethod
    def slope(self, logits: Logits, scale: Scale, sums: Sums, weight: PerPosition) -> PerToken:
        """`weight` times T times the derivative of the value with respect to the student's logits.

        The weight is in here to be multiplied into what is per position, before there is an array of [n, V].
        """


@dataclasses.dataclass(frozen=True)
class OfKeptSet(Divergence):
    """A divergence with one of the meanings of a truncation, as `kd_loss.kl_divergence` defines them.

    conditions_student: q is conditioned on K.
    conditions_teacher: p is conditioned on K.
    has_tail: what is outside K counts as one token.

    Where nothing is truncated they make no difference.
    """

    conditions_student: bool
    conditions_teacher: bool
    has_tail: bool

    @property
    def reads_outside(self) -> bool:
        return self.has_tail or not (self.conditions_student and self.conditions_teacher)

    def _is_in_q(self, logits: Logits) -> Bool[Array, "#n V"]:
        return logits.is_kept if self.conditions_student and logits.is_truncated else logits.is_shared

    def _tail(self, logits: Logits) -> Bool[Array, "n V"] | None:
        """The tokens outside K; None where they have no term of their own."""
        return logits.is_shared & ~logits.is_kept if self.has_tail and logits.is_truncated else None

    def _p_total(self, sums: Sums) -> PerPosition:
        return sums.p_kept if self.conditions_teacher else sums.p


# Name -> conditions_student, conditions_teacher, has_tail.
STRATEGIES = {
    "renormalize": (True, True, False),
    "other_bucket": (False, False, True),
    "renormalize_teacher": (False, True, False),
}


class _KLScale(NamedTuple):
    q: PerPosition  # the student's in the set that q is conditioned on
    q_tail: PerPosition | None  # the student's outside K


class _KLSums(NamedTuple):
    q: PerPosition
    cross: PerPosition  # over K: p times the difference of the log weights
    p_tail: PerPosition | None
    q_tail: PerPosition | None


class ForwardKL(OfKeptSet):
    """KL(teacher || student)."""

    def maxima(self, logits: Logits) -> _KLScale:
        tail = self._tail(logits)
        return _KLScale(
            q=jnp.where(self._is_in_q(logits), logits.student, -jnp.inf),
            q_tail=None if tail is None else jnp.where(tail, logits.student, -jnp.inf),
        )

    def terms(self, logits: Logits, scale: Scale) -> _KLSums:
        log_p = scale.log_weight(logits.teacher, scale.teacher)
        log_q = scale.log_weight(logits.student, scale.own.q)
        p, tail = jnp.exp(log_p), self._tail(logits)
        p_tail = q_tail = None
        if tail is not None:
            p_tail = jnp.where(logits.is_kept, 0.0, p)
            q_tail = jnp.where(tail, jnp.exp(scale.log_weight(logits.student, scale.own.q_tail)), 0.0)
        return _KLSums(
            q=jnp.where(self._is_in_q(logits), jnp.exp(log_q), 0.0),
            # A weight of 0 contributes 0, also where its logarithm is -inf.
            cross=jnp.where(logits.is_kept & (p > 0.0), p * (log_p - log_q), 0.0),
            p_tail=p_tail,
            q_tail=q_tail,
        )

    def value(self, scale: Scale, sums: Sums) -> PerPosition:
        p_total = self._p_total(sums)
        kl = (sums.own.cross + sums.p_kept * (jnp.log(sums.own.q) - jnp.log(p_total))) / p_total
        if sums.own.p_tail is None:
            return kl
        tail = sums.own.p_tail / sums.p
        log_q_tail = scale.log_weight(scale.own.q_tail, scale.own.q) + jnp.log(sums.own.q_tail) - jnp.log(sums.own.q)
        return kl + jnp.where(tail > 0.0, tail * (jnp.log(tail) - log_q_tail), 0.0)

    def slope(self, logits: Logits, scale: Scale, sums: Sums, weight: PerPosition) -> PerToken:
        q = weight / sums.own.q * jnp.exp(scale.log_weight(logits.student, scale.own.q))
        p = weight / self._p_total(sums) * jnp.exp(scale.log_weight(logits.teacher, scale.teacher))
        p_outside: PerToken | float = 0.0
        if sums.own.p_tail is not None:
            tail = sums.own.p_tail / sums.p
            share = jnp.where(tail > 0.0, weight * tail / sums.own.q_tail, 0.0)
            p_outside = share * jnp.exp(scale.log_weight(logits.student, scale.own.q_tail))
        return jnp.where(self._is_in_q(logits), q - jnp.where(logits.is_kept, p, p_outside), 0.0)


FORWARD_KL = {name: ForwardKL(*meaning) for name, meaning in STRATEGIES.items()}


class Nothing(Divergence):
    """0, whatever the teacher: of positions that are not taught."""

    @property
    def reads_outside(self) -> bool:
        return False

    def maxima(self, logits: Logits) -> tuple[()]:
        return ()

    def terms(self, logits: Logits, scale: Scale) -> tuple[()]:
        return ()

    def value(self, scale: Scale, sums: Sums) -> PerPosition:
        return jnp.zeros_like(sums.p)

    def slope(self, logits: Logits, scale: Scale, sums: Sums, weight: PerPosition) -> PerToken:
        return jnp.zeros_like(logits.student)


NOTHING = Nothing()
