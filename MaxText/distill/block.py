"""One block of the loss: its sums, and the objective's gradient with respect to the student's logits.

# n tokens of a block, V vocabulary (or one device's shard of it, or a chunk of that)

What any block is asked, and the block of a teacher whose logits are at hand. Three visits of the logits: maxima, sums,
gradient. Only the last one writes an array of their size: weights are recomputed rather than stored, and the kept set
is a comparison.

With s = softmax(z) of the student's logits z, log_z their log-sum-exp and y the target's one-hot vector, the gradient
with respect to z at a valid token is

    (1 - alpha) (s - y)  +  2 z_weight log_z s  +  alpha T slope

where the slope is the divergence's.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from MaxText.distill.divergences import Divergence, Logits, PerPosition, PerToken, Scale, Sums
from MaxText.distill.kd_loss import TERMS_AT_T1, KDSums
from MaxText.distill.term_sums import divergence_of
from MaxText.distill.truncation import KeptBound, Scalar
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


class Asked(NamedTuple):
    """What is asked of every block; static.

    evaluation: also take the sums that only evaluations need, where the teacher's side knows them.
    """

    divergence: Divergence
    vocabulary: Vocabulary
    evaluation: bool


class Pulls(NamedTuple):
    """Per token, what the gradient's visit multiplies its exponentials by; 0 for tokens that do not count."""

    by_student: PerPosition  # the student's weights at T = 1
    hard: PerPosition  # the target's one-hot vector
    soft: PerPosition  # the divergence's slope


@dataclasses.dataclass(frozen=True)
class StudentBlock:
    """n tokens with the student's logits, raw, and what is asked of them."""

    logits: PerToken
    targets: Int[Array, "n 1"]
    is_valid: Bool[Array, "n 1"]
    weights: Weights
    asked: Asked

    def pulls(self, log_z: PerPosition, total: PerPosition) -> Pulls:
        """`total` is the sum of the student's weights at T = 1, `log_z` the log-sum-exp that they belong to."""
        alpha, temperature, z_weight = self.weights
        hard = jnp.where(self.is_valid, 1.0 - alpha, 0.0)
        log_z_pull = jnp.where(self.is_valid, 2.0 * z_weight * log_z, 0.0)
        return Pulls((hard + log_z_pull) / total, hard, jnp.where(self.is_valid, alpha * temperature, 0.0))

    def summed(self, per_token: KDSums) -> KDSums:
        """Over the valid tokens."""
        return jax.tree.map(lambda values: jnp.sum(jnp.where(self.is_valid, values, 0.0)), per_token)


class LossBlock(abc.ABC):
    """n tokens with all that is known of both models: what the visits of the logits take, and what that comes to."""

    def sums(self) -> KDSums:
        return self._totals(self._reduced())

    def sums_and_gradient(self) -> tuple[KDSums, PerToken]:
        reduced = self._reduced()
        return self._totals(reduced), self._gradient(reduced)

    @abc.abstractmethod
    def _reduced(self) -> Any:
        """All that the visits before the gradient's take."""

    @abc.abstractmethod
    def _totals(self, reduced: Any) -> KDSums:
        """Over the valid tokens."""

    @abc.abstractmethod
    def _gradient(self, reduced: Any) -> PerToken:
        """With respect to the student's logits, in the last visit."""


class TeacherLogits(NamedTuple):
    """What a teacher that runs beside the student says of a block's tokens.

    logits: raw; -inf for tokens without mass, those among them that the models do not share.
    bound: of the kept set K; None where K is all that is shared.
    shared: how many of the first token ids both models have; None where it is all.
    """

    logits: Float[Array, "n V"]
    bound: KeptBound | None
    shared: int | None

    def is_shared(self, ids: Int[Array, "1 V"]) -> Bool[Array, "1 V"]:
        return jnp.ones_like(ids, dtype=bool) if self.shared is None else ids < self.shared

    def is_kept(self, ids: Int[Array, "1 V"], logits: Float[Array, "n V"]) -> Bool[Array, "n V"]:
        """Membership in K, for some of the tokens and their logits in `logits`."""
        return jnp.ones_like(logits, dtype=bool) if self.bound is None else self.bound.keeps(logits, ids)


# What an evaluation sums besides the forward KL, at T = 1, where nothing is truncated.
_AT_T1 = {name: divergence_of(term, "renormalize") for name, term in TERMS_AT_T1.items()}


class _AtT1(NamedTuple):
    """What an evaluation sums besides, at T = 1, as arrays of tokens and as sums over them."""

    shared: Float[Array, "n #V"]  # the student's weights, among the tokens that both models have
    cross: Float[Array, "n #V"]  # p times the difference of the log weights


class _Reduced(NamedTuple):
    """All that the visits before the gradient's took."""

    scale: Scale
    student_total: PerPosition  # the sum of weights at T = 1
    teacher_total: PerPosition
    sums: Sums
    shared_maximum: PerPosition | None  # the student's, among the tokens that both models have; for an evaluation
    at_t1: _AtT1 | None
    others_at_t1: dict[str, tuple[Scale, Sums]]  # by name, of _AT_T1


@dataclasses.dataclass(frozen=True)
class LiveBlock(LossBlock):
    """n tokens with both models' logits."""

    student: StudentBlock
    teacher: TeacherLogits

    @property
    def _both(self) -> tuple[PerToken, PerToken]:
        return self.student.logits, self.teacher.logits

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
        return reduce(lambda *chunk: terms(self._logits(*chunk)), *self._both)

    def _reduced(self) -> _Reduced:
        divergence, vocabulary, _ = self.student.asked
        scale, shared_maximum, scales_at_t1 = self._maxima()

        def terms(logits: Logits) -> tuple[PerToken, PerToken, Sums, _AtT1 | None, dict[str, PyTree[PerToken]]]:
            p = jnp.exp(scale.log_weight(logits.teacher, scale.teacher))
            return (
                jnp.exp(logits.student - scale.student),
                jnp.exp(logits.teacher - scale.teacher),
                Sums(p=p, p_kept=jnp.where(logits.is_kept, p, 0.0), own=divergence.terms(logits, scale)),
                None if shared_maximum is None else _terms_at_t1(logits, scale, shared_maximum),
                {name: _AT_T1[name].terms(_whole(logits), at_t1) for name, at_t1 in scales_at_t1.items()},
            )

        student_total, teacher_total, sums, at_t1, others = self._visit(vocabulary.sums, terms)
        sums_at_t1 = {name: Sums(p=teacher_total, p_kept=teacher_total, own=own) for name, own in others.items()}

        def normalized_terms(logits: Logits) -> tuple[PyTree[PerToken] | None, dict[str, PyTree[PerToken]]]:
            return divergence.normalized_terms(logits, scale, sums), {
                name: _AT_T1[name].normalized_terms(_whole(logits), at_t1, sums_at_t1[name])
                for name, at_t1 in scales_at_t1.items()
            }

        normalized, others = self._visit(vocabulary.sums, normalized_terms)
        others_at_t1 = {
            name: (at_t1, sums_at_t1[name]._replace(normalized=others[name])) for name, at_t1 in scales_at_t1.items()
        }
        sums = sums._replace(normalized=normalized)
        return _Reduced(scale, student_total, teacher_total, sums, shared_maximum, at_t1, others_at_t1)

    def _maxima(self) -> tuple[Scale, PerPosition | None, dict[str, Scale]]:
        """Of the divergence and, for an evaluation, of the student among the shared tokens and of the others."""
        divergence, vocabulary, evaluation = self.student.asked
        others = _AT_T1 if evaluation else {}

        def terms(logits: Logits) -> tuple[PerToken, PerToken, PyTree[PerToken], PerToken | None, dict[str, Any]]:
            shared = jnp.where(logits.is_shared, logits.student, -jnp.inf) if evaluation else None
            at_t1 = {name: other.maxima(_whole(logits)) for name, other in others.items()}
            return logits.student, logits.teacher, divergence.maxima(logits), shared, at_t1

        student, teacher, own, shared, at_t1 = finite(self._visit(vocabulary.maxima, terms))
        scale = Scale(student, teacher, own, self.student.weights.temperature)
        return scale, shared, {name: Scale(student, teacher, of_other, 1.0) for name, of_other in at_t1.items()}

    def _totals(self, reduced: _Reduced) -> KDSums:
        divergence, vocabulary, _ = self.student.asked
        scale, sums, at_t1 = reduced.scale, reduced.sums, reduced.at_t1
        value = divergence.value(scale, sums)
        at_target, teacher_at_target = (vocabulary.at(logits, self.student.targets) for logits in self._both)
        per_token = KDSums(
            ce_sum=jnp.log(reduced.student_total) - (at_target - scale.student),
            kd_sum=self.student.weights.temperature**2 * value,
            log_z_sq_sum=_log_z(reduced) ** 2,
            teacher_ce_sum=jnp.log(reduced.teacher_total) - (teacher_at_target - scale.teacher),
            n=jnp.ones_like(value),
            kept_mass_sum=sums.p_kept / sums.p,
        )
        if reduced.shared_maximum is not None and at_t1 is not None:
            total = reduced.teacher_total
            per_token = per_token._replace(
                kl_t1_sum=at_t1.cross / total + jnp.log(at_t1.shared) - jnp.log(total),
                agreement_sum=self._agreement(scale, reduced.shared_maximum),
                **{name: _AT_T1[name].value(*of_other) for name, of_other in reduced.others_at_t1.items()},
            )
        return self.student.summed(per_token)

    def _agreement(self, scale: Scale, shared_maximum: PerPosition) -> PerPosition:
        """1 where both models' largest logit is the same token's; of equal ones the lower id's."""
        vocabulary = self.student.asked.vocabulary
        size = vocabulary.size(self.student.logits)

        def first_largest(ids: Int[Array, "1 V"], student: PerToken, teacher: PerToken) -> tuple[Array, Array]:
            return (
                jnp.where(self.teacher.is_shared(ids) & (student == shared_maximum), -ids, -size),
                jnp.where(teacher == scale.teacher, -ids, -size),
            )

        student, teacher = vocabulary.maxima(first_largest, *self._both)
        return (student == teacher).astype(jnp.float32)

    def _gradient(self, reduced: _Reduced) -> PerToken:
        divergence, vocabulary, _ = self.student.asked
        by_student, hard, soft = self.student.pulls(_log_z(reduced), reduced.student_total)
        ids = vocabulary.ids(self.student.logits)
        both = (logits.astype(jnp.float32) for logits in self._both)
        slope = divergence.slope(self._logits(ids, *both), reduced.scale, reduced.sums, soft)
        student = by_student * jnp.exp(self.student.logits - reduced.scale.student)  # float32, as the scale is
        return student - jnp.where(ids == self.student.targets, hard, 0.0) + slope


def finite(maxima: PyTree[PerPosition]) -> PyTree[PerPosition]:
    """The maxima, 0 for a set of no tokens, whose maximum is -inf."""
    return jax.tree.map(lambda maximum: jnp.where(jnp.isfinite(maximum), maximum, 0.0), maxima)


def _log_z(reduced: _Reduced) -> PerPosition:
    return reduced.scale.student + jnp.log(reduced.student_total)


def _whole(logits: Logits) -> Logits:
    """Without the truncation."""
    return logits._replace(is_truncated=False)


def _terms_at_t1(logits: Logits, scale: Scale, shared_maximum: PerPosition) -> _AtT1:
    p = jnp.exp(logits.teacher - scale.teacher)
    difference = (logits.teacher - scale.teacher) - (logits.student - shared_maximum)
    return _AtT1(
        shared=jnp.where(logits.is_shared, jnp.exp(logits.student - shared_maximum), 0.0),
        cross=jnp.where(p > 0.0, p * difference, 0.0),
    )
