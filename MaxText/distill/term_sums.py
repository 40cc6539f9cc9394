"""Divergences of terms as a block of the loss asks for them: one way to take any of `terms/`, under each truncation.

# n positions of a block, V vocabulary (or one device's shard of it, or a chunk of that)

A term is of p and q, which are known once their weights are summed. So the sums of the terms are a visit of the
vocabulary more than the forward KL needs, and no array: in it both models' logits are read again, and what pulls at
the student is summed with the values, for the gradient's visit to begin with.

What is outside the kept set is one token under other_bucket. Its p and q have largest logits of their own, so that
their logarithms are right however little they are.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from MaxText.distill.divergences import (
    FORWARD_KL,
    STRATEGIES,
    Divergence,
    Logits,
    OfKeptSet,
    PerPosition,
    PerToken,
    Scale,
    Sums,
)
from MaxText.distill.terms.base import Term


class _Maxima(NamedTuple):
    q: PerPosition  # the student's among the tokens that q is a distribution over
    p_tail: PerPosition | None  # the teacher's and the student's of the tail
    q_tail: PerPosition | None


class _Weights(NamedTuple):
    q: PerPosition
    p_tail: PerPosition | None
    q_tail: PerPosition | None


class _Terms(NamedTuple):
    value: Float[Array, "n #V"]
    pull: Float[Array, "n #V"]


@dataclasses.dataclass(frozen=True)
class TermSums(OfKeptSet):
    """The sum of a term over the tokens, with one of the meanings of a truncation (`kd_loss.divergence`)."""

    term: Term

    @property
    def name(self) -> str:
        return self.term.name

    def maxima(self, logits: Logits) -> _Maxima:
        tail = self._tail_with_mass(logits)
        # Where K is all, what the teacher gives no mass is among them: a maximum that needs the teacher's logits, too,
        # is no part of the student's projection, and costs a visit.
        of_q = self._has_q(logits) if logits.is_truncated else logits.is_shared
        return _Maxima(
            q=jnp.where(of_q, logits.student, -jnp.inf),
            p_tail=None if tail is None else jnp.where(tail, logits.teacher, -jnp.inf),
            q_tail=None if tail is None else jnp.where(tail, logits.student, -jnp.inf),
        )

    def terms(self, logits: Logits, scale: Scale) -> _Weights:
        # Beside the teacher's, which are never inf: a TPU's compiler takes these sums in the product that makes those,
        # where it would visit the student's by themselves.
        has_q = self._has_q(logits) & (logits.teacher < jnp.inf)

        def weights(those: Bool[Array, "#n V"], logits: PerToken, maximum: PerPosition) -> PerToken:
            return jnp.where(those, jnp.exp(scale.log_weight(logits, maximum)), 0.0)

        tail = self._tail_with_mass(logits)
        return _Weights(
            q=weights(has_q, logits.student, scale.own.q),
            p_tail=None if tail is None else weights(tail, logits.teacher, scale.own.p_tail),
            q_tail=None if tail is None else weights(tail, logits.student, scale.own.q_tail),
        )

    def normalized_terms(self, logits: Logits, scale: Scale, sums: Sums) -> _Terms:
        return self._terms(*self._log_probs(logits, scale, sums), self._has_term(logits))

    def value(self, scale: Scale, sums: Sums) -> PerPosition:
        return self._total(scale, sums).value

    def slope(self, logits: Logits, scale: Scale, sums: Sums, weight: PerPosition) -> PerToken:
        log_q = scale.log_weight(logits.student, scale.own.q)
        log_odds = log_q - scale.log_weight(logits.teacher, scale.teacher)
        log_odds += jnp.log(self._p_total(sums)) - _log(sums.own.q)
        slope = jnp.where(self._has_term(logits), self.term.slope(log_odds), 0.0)
        by_q = weight / jnp.where(sums.own.q > 0.0, sums.own.q, 1.0)
        pull = by_q * jnp.exp(log_q) * (slope - self._total(scale, sums).pull)
        tail = self._tail_with_mass(logits)
        if tail is not None:
            # The tail's pull is shared out as the student's weights are.
            outside, q_tail = self._tail_terms(scale, sums).pull, sums.own.q_tail
            share = jnp.where(q_tail > 0.0, weight * outside / q_tail, 0.0)
            of_tail = share * jnp.exp(scale.log_weight(logits.student, scale.own.q_tail))
            pull += jnp.where(tail, of_tail, 0.0)
        return jnp.where(self._has_q(logits) & (log_q > -jnp.inf), pull, 0.0)

    def _total(self, scale: Scale, sums: Sums) -> _Terms:
        if sums.own.q_tail is None:
            return sums.normalized
        outside = self._tail_terms(scale, sums)
        return _Terms(*(of_inside + of_outside for of_inside, of_outside in zip(sums.normalized, outside, strict=True)))

    def _terms(self, log_p: Float[Array, "n #V"], log_q: Float[Array, "n #V"], counted: Bool[Array, "#n #V"]) -> _Terms:
        """0 where not counted, and where neither model has mass."""
        counted = counted & (log_q > -jnp.inf)
        of_each = (self.term.value(log_p, log_q), jnp.exp(log_q) * self.term.slope(log_q - log_p))
        return _Terms(*(jnp.where(counted, each, 0.0) for each in of_each))

    def _tail_terms(self, scale: Scale, sums: Sums) -> _Terms:
        own = sums.own
        log_p = scale.log_weight(scale.own.p_tail, scale.teacher) + jnp.log(own.p_tail) - jnp.log(sums.p)
        log_q = scale.log_weight(scale.own.q_tail, scale.own.q) + jnp.log(own.q_tail) - _log(own.q)
        return self._terms(log_p, log_q, own.q_tail > 0.0)

    def _log_probs(self, logits: Logits, scale: Scale, sums: Sums) -> tuple[PerToken, PerToken]:
        log_p = scale.log_weight(logits.teacher, scale.teacher) - jnp.log(self._p_total(sums))
        log_q = scale.log_weight(logits.student, scale.own.q) - _log(sums.own.q)
        return log_p, log_q

    def _has_q(self, logits: Logits) -> Bool[Array, "#n V"]:
        return self._with_mass(logits, self._is_in_q(logits))

    def _has_term(self, logits: Logits) -> Bool[Array, "#n V"]:
        """Whether a token has a term of its own."""
        return self._with_mass(logits, logits.is_kept if logits.is_truncated else logits.is_shared)

    def _tail_with_mass(self, logits: Logits) -> Bool[Array, "n V"] | None:
        tail = self._tail(logits)
        return None if tail is None else self._with_mass(logits, tail)

    def _with_mass(self, logits: Logits, those: Bool[Array, "#n V"]) -> Bool[Array, "#n V"]:
        return those & (logits.teacher > -jnp.inf) if self.term.is_of_teachers_support else those


def _log(total: PerPosition) -> PerPosition:
    """Finite: a total of 0 is that of weights which are all 0."""
    return jnp.log(jnp.where(total > 0.0, total, 1.0))


def divergence_of(term: Term | None, truncation_strategy: str) -> Divergence:
    """The divergence as a block asks for it; of None the forward KL.

    Raises:
        ValueError: for a truncation strategy under which the term has no meaning.
    """
    if term is None:
        return FORWARD_KL[truncation_strategy]
    term.check(truncation_strategy)
    return TermSums(*STRATEGIES[truncation_strategy], term)
