"""One block of the loss: its sums, and the objective's gradient with respect to the student's logits.

# n tokens of a block, V vocabulary (or one device's shard of it, or a chunk of that)

Three visits of the logits: maxima, sums, gradient. Only the last one writes an array of their size: weights are
recomputed rather than stored, and the kept set is a comparison.

With s = softmax(z) of the student's logits z, log_z their log-sum-exp and y the target's one-hot vector, the gradient
with respect to z at a valid token is

    (1 - alpha) (s - y)  +  2 z_weight log_z s  +  alpha T slope

where the slope is the divergence's.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from MaxText.distill.divergences import Divergence, Logits, PerPosition, PerToken, Scale, Sums
from MaxText.distill.kd_loss import KDSums
from MaxText.distill.teacher_side import TeacherBlock
from MaxText.distill.truncation import Scalar
from MaxText.distill.vocabulary import Vocabulary


class Weights(NamedTuple):
    """What may change from step to step without a new compilation.

    alpha: weight of the divergence; 1 - alpha is that of cross-entropy.
    temperature: T > 0.
    z_weight: weight of the squared log-sum-exp of the student's logits.
    """

    alpha: Scalar
    temperature: Scalar
    z_weight: Scalar = 0.0


class _AtT1(NamedTuple):
    """What an evaluation sums besides, at T = 1, as arrays of tokens and as sums over them."""

    shared: Float[Array, "n #V"]  # the student's weights, among the tokens that both models have
    cross: Float[Array, "n #V"]  # p times the difference of the log weights


class _Reduced(NamedTuple):
    """All that the visits before the gradient's took."""

    scale: Scale
    sums: Sums
    shared_maximum: PerPosition | None  # the student's, among the tokens that both models have; for an evaluation
    at_t1: _AtT1 | None


@dataclasses.dataclass(frozen=True)
class Block:
    """n tokens with both models' logits, and what is asked of them.

    evaluation: also take kl_t1_sum and agreement_sum.
    """

    student: PerToken
    teacher: TeacherBlock
    targets: Int[Array, "n 1"]
    is_valid: Bool[Array, "n 1"]
    weights: Weights
    divergence: Divergence
    vocabulary: Vocabulary
    evaluation: bool

    def sums(self) -> KDSums:
        return self._totals(self._reduced())

    def sums_and_gradient(self) -> tuple[KDSums, PerToken]:
        reduced = self._reduced()
        return self._totals(reduced), self._gradient(reduced.scale, reduced.sums)

    def _logits(self, ids: Int[Array, "1 V"], student: PerToken, teacher: PerToken) -> Logits:
        return Logits(
            student=student,
            teacher=teacher,
            is_shared=self.teacher.is_shared(ids),
            is_kept=self.teacher.is_kept(ids, teacher),
            is_truncated=self.teacher.bound is not None,
        )

    def _visit(
        self, reduce: Callable[..., PyTree[PerPosition]], terms: Callable[[Logits], PyTree[PerToken]]
    ) -> PyTree[PerPosition]:
        """`reduce` is one of the vocabulary's; it goes over all tokens, maybe chunk by chunk."""
        return reduce(lambda *chunk: terms(self._logits(*chunk)), self.student, self.teacher.logits)

    def _reduced(self) -> _Reduced:
        scale, shared_maximum = self._maxima()

        def terms(logits: Logits) -> tuple[Sums, _AtT1 | None]:
            p = jnp.exp(scale.log_weight(logits.teacher, scale.teacher))
            shared = Sums(
                student=jnp.exp(logits.student - scale.student),
                teacher=jnp.exp(logits.teacher - scale.teacher),
                p=p,
                p_kept=jnp.where(logits.is_kept, p, 0.0),
                own=self.divergence.terms(logits, scale),
            )
            return shared, None if shared_maximum is None else _terms_at_t1(logits, scale, shared_maximum)

        sums, at_t1 = self._visit(self.vocabulary.sums, terms)
        normalized = self._visit(
            self.vocabulary.sums, lambda logits: self.divergence.normalized_terms(logits, scale, sums)
        )
        return _Reduced(scale, sums._replace(normalized=normalized), shared_maximum, at_t1)

    def _maxima(self) -> tuple[Scale, PerPosition | None]:
        def terms(logits: Logits) -> tuple[PerToken, PerToken, PyTree[PerToken], PerToken | None]:
            shared = jnp.where(logits.is_shared, logits.student, -jnp.inf) if self.evaluation else None
            return logits.student, logits.teacher, self.divergence.maxima(logits), shared

        maxima = self._visit(self.vocabulary.maxima, terms)
        # A set of no tokens has a maximum of -inf.
        maxima = jax.tree.map(lambda maximum: jnp.where(jnp.isfinite(maximum), maximum, 0.0), maxima)
        student, teacher, own, shared = maxima
        return Scale(student, teacher, own, self.weights.temperature), shared

    def _totals(self, reduced: _Reduced) -> KDSums:
        """Summed over the valid tokens."""
        scale, sums, shared_maximum, at_t1 = reduced
        value = self.divergence.value(scale, sums)
        at_target, teacher_at_target = (
            self.vocabulary.at(logits, self.targets) for logits in (self.student, self.teacher.logits)
        )
        per_token = KDSums(
            ce_sum=jnp.log(sums.student) - (at_target - scale.student),
            kd_sum=self.weights.temperature**2 * value,
            log_z_sq_sum=_log_z(scale, sums) ** 2,
            teacher_ce_sum=jnp.log(sums.teacher) - (teacher_at_target - scale.teacher),
            kept_mass_sum=sums.p_kept / sums.p,
            n=jnp.ones_like(value),
        )
        if shared_maximum is not None and at_t1 is not None:
            per_token = per_token._replace(
                kl_t1_sum=at_t1.cross / sums.teacher + jnp.log(at_t1.shared) - jnp.log(sums.teacher),
                agreement_sum=self._agreement(scale, shared_maximum),
            )
        return jax.tree.map(lambda values: jnp.sum(jnp.where(self.is_valid, values, 0.0)), per_token)

    def _agreement(self, scale: Scale, shared_maximum: PerPosition) -> PerPosition:
        """1 where both models' largest logit is the same token's; of equal ones the lower id's."""
        size = self.vocabulary.size(self.student)

        def first_largest(ids: Int[Array, "1 V"], student: PerToken, teacher: PerToken) -> tuple[Array, Array]:
            return (
                jnp.where(self.teacher.is_shared(ids) & (student == shared_maximum), -ids, -size),
                jnp.where(teacher == scale.teacher, -ids, -size),
            )

        student, teacher = self.vocabulary.maxima(first_largest, self.student, self.teacher.logits)
        return (student == teacher).astype(jnp.float32)

    def _gradient(self, scale: Scale, sums: Sums) -> PerToken:
        alpha, temperature, z_weight = self.weights
        # Per token, what the visit multiplies its exponentials by.
        hard = jnp.where(self.is_valid, 1.0 - alpha, 0.0)
        soft = jnp.where(self.is_valid, alpha * temperature, 0.0)
        log_z_pull = jnp.where(self.is_valid, 2.0 * z_weight * _log_z(scale, sums), 0.0)
        by_student = (hard + log_z_pull) / sums.student
        ids = self.vocabulary.ids(self.student)
        slope = self.divergence.slope(self._logits(ids, self.student, self.teacher.logits), scale, sums, soft)
        return by_student * jnp.exp(self.student - scale.student) - jnp.where(ids == self.targets, hard, 0.0) + slope


def _log_z(scale: Scale, sums: Sums) -> PerPosition:
    return scale.student + jnp.log(sums.student)


def _terms_at_t1(logits: Logits, scale: Scale, shared_maximum: PerPosition) -> _AtT1:
    p = jnp.exp(logits.teacher - scale.teacher)
    difference = (logits.teacher - scale.teacher) - (logits.student - shared_maximum)
    return _AtT1(
        shared=jnp.where(logits.is_shared, jnp.exp(logits.student - shared_maximum), 0.0),
        cross=jnp.where(p > 0.0, p * difference, 0.0),
    )
