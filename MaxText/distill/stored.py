"""The teacher's side from targets that were stored: some tokens of each position and their weights, no teacher.

# N tokens, n tokens of a block, K slots, V vocabulary (or one device's shard of it)

The k largest make the divergence one over K + 1 categories: the stored tokens, and all that is outside them as one.
So no array of the teacher's is as long as the vocabulary, and a divergence sees K + 1 columns where it sees V of a live
teacher, by the same rules. Where it asks for what is outside, the student's logits at the stored tokens are taken out
and -inf is put in their place (the logits are needed no more, so that they are written over): what is left is what is
outside. The visits, maxima, sums and gradient, read that alone. The gradient at the stored tokens is put into its place
at the end.

Of draws nothing is outside. Their KL is a cross-entropy with several targets: the visits read all logits, and the
gradient at the drawn tokens is lowered at the end.

A TPU reads and writes single scalars of an array slowly, sorts their places and lays the array out anew. There each
token of the vocabulary is compared with each slot, in the visits that read the logits anyway.

Where there are two parts, log-sum-exps of the whole vocabulary are added up from both. Never is one taken from another:
that would cancel.

Left out on purpose: fewer slots than were stored, which is the caller's to cut, and the agreement of both models, which
nobody can know.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from MaxText.distill.block import Asked, LossBlock, StudentBlock, finite
from MaxText.distill.divergences import Divergence, ForwardKL, Logits, PerPosition, PerToken, Scale, Sums
from MaxText.distill.kd_loss import KDSums
from MaxText.distill.truncation import Scalar
from MaxText.distill.vocabulary import Vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredTeacher:
    """What was stored of a teacher's distribution p at temperature T.

    Either draws from p, whose weights are their shares: an unbiased p, of which nothing is outside. The forward KL is
    linear in p but for p's own entropy, which is stored, so that its value and its gradient are unbiased too. Or the k
    largest p, with the mass outside them: the kept set of a truncation, of which the divergence makes what it makes of
    a live teacher's.

    ids: ascending. Unused slots come last and hold the vocabulary's size or more.
    log_weights: of the weights at temperature T, in unused slots -inf.
    log_tail: of the mass outside, -inf for none. None: the weights are draws.
    target_log_prob: log p(target) at T = 1.
    entropy: of p, in nats.
    temperature: T. Static.
    shared_vocabulary: as for `kd_loss.kd_sums`; of the others none is stored. Static.
    is_asked_at_own: whether the loss has the temperature T; at another one neither the kept mass nor the KL at T = 1 is
      told. Static.
    """

    ids: Int[Array, "N K"]
    log_weights: Float[Array, "N K"]
    log_tail: Float[Array, "N"] | None
    target_log_prob: Float[Array, "N"]
    entropy: Float[Array, "N"]
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})
    shared_vocabulary: int = dataclasses.field(default=0, metadata={"static": True})
    is_asked_at_own: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def rows(self) -> "StoredTeacher":
        """All of it has a row per token."""
        return self

    @property
    def is_drawn(self) -> bool:
        return self.log_tail is None

    def reads_outside(self, divergence: Divergence) -> bool:
        """Whether the weights outside the stored tokens matter."""
        return self.is_drawn or divergence.reads_outside

    def check(self, student_vocabulary: int, asked: Asked, temperature: Scalar) -> None:
        slots = self.ids.shape[-1]
        if not 0 <= self.shared_vocabulary <= student_vocabulary:
            raise ValueError(
                f"shared_vocabulary={self.shared_vocabulary}: expected 0 (all) to {student_vocabulary} tokens"
            )
        if self.is_drawn and not isinstance(asked.divergence, ForwardKL):
            raise ValueError(
                f"divergence={asked.divergence.name}: expected ForwardKL; what draws say of others is biased"
            )
        if not self.is_drawn and slots > student_vocabulary:
            raise ValueError(f"{slots} stored tokens: expected {student_vocabulary}, the vocabulary's size, at most")
        is_another = not isinstance(temperature, jax.core.Tracer) and temperature != self.temperature
        if is_another and self.is_asked_at_own and self.reads_outside(asked.divergence):
            raise ValueError(
                f"temperature={temperature}: expected {self.temperature}, that of the stored weights; another one is "
                "known only where both models are conditioned on the stored tokens"
            )

    def known_sums(self, student_vocabulary: int, asked: Asked) -> tuple[str, ...]:
        names = ["ce_sum", "kd_sum", "log_z_sq_sum", "teacher_ce_sum", "n"]
        if not self.is_drawn and self.is_asked_at_own:
            names.append("kept_mass_sum")
        is_whole = self.is_drawn or self.ids.shape[-1] >= (self.shared_vocabulary or student_vocabulary)
        is_at_1 = self.temperature == 1.0 and self.is_asked_at_own
        if asked.evaluation and is_whole and is_at_1 and isinstance(asked.divergence, ForwardKL):
            names.append("kl_t1_sum")
        return tuple(names)

    def slots(self, size: int) -> Int[Array, "N K"]:
        """The ids, with a vocabulary of that size; those of unused slots differ, so that no token stands in a row
        twice."""
        unused = size + jnp.arange(self.ids.shape[-1], dtype=self.ids.dtype)
        return jnp.where(self.ids < size, self.ids, unused)

    def logits_at_ids(self, logits: PerToken, vocabulary: Vocabulary) -> Float[Array, "N K"]:
        """The student's; -inf in unused slots."""
        is_used = self.ids < vocabulary.size(logits)
        return jnp.where(is_used, vocabulary.at(logits, jnp.where(is_used, self.ids, 0)), -jnp.inf)

    def replaced(self, logits: PerToken, values: Float[Array, "#n K"], vocabulary: Vocabulary) -> PerToken:
        """The logits with other values at the ids."""

        def compared(logits: PerToken) -> PerToken:
            # Behind a barrier, or each visit of what comes out would compare anew.
            return jax.lax.optimization_barrier(_put(values, self.ids, vocabulary.ids(logits), logits))

        def scalars(logits: PerToken) -> PerToken:
            return vocabulary.replaced(logits, self.slots(vocabulary.size(logits)), values)

        return _at_ids(self.ids.shape[-1], compared, scalars, logits)

    def shared(self, size: int) -> int | None:
        """How many of the first token ids both models have; None where it is all."""
        return self.shared_vocabulary if 0 < self.shared_vocabulary < size else None

    def block(self, rows: "StoredTeacher", student: StudentBlock) -> LossBlock:
        if self.reads_outside(student.asked.divergence):
            # A number, where the walk has an array: at T = 1 the weights of cross-entropy are those of the divergence,
            # and need no second exponential.
            weights = student.weights._replace(temperature=self.temperature)
            student = dataclasses.replace(student, weights=weights)
        return DrawnBlock(student, rows) if self.is_drawn else LargestBlock(student, rows)


# Slots of a position, at most, that a TPU compares with all tokens: fifty take it as long as two or three products of
# the logits' size, fifty scalars that are written as long as eight (docs/design/fit.md).
_COMPARED = 128


def _at_ids(slots: int, compared: Callable[..., Array], scalars: Callable[..., Array], *arrays: Array) -> Array:
    """What is the same: `compared` visits the vocabulary, `scalars` reads or writes single ones."""
    if slots > _COMPARED:
        return scalars(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=compared, default=scalars)


def _put(
    values: Float[Array, "#n K"], at: Int[Array, "n K"], ids: Int[Array, "1 V"], otherwise: Float[Array, "#n #V"]
) -> PerToken:
    """The values of the tokens that stand in a slot, and of the others what is there otherwise."""
    found = otherwise
    for slot in range(at.shape[-1]):
        found = jnp.where(at[:, slot : slot + 1] == ids, values[:, slot : slot + 1], found)
    return found


class _Seen(NamedTuple):
    """All that the visits before the gradient's took of draws."""

    maximum: PerPosition
    total: PerPosition  # the sum of the student's weights at T = 1, from there
    soft_maximum: PerPosition  # at T, of the shared tokens
    soft_total: PerPosition


@dataclasses.dataclass(frozen=True)
class DrawnBlock(LossBlock):
    """n tokens with the student's logits and draws from the teacher."""

    student: StudentBlock
    teacher: StoredTeacher

    @property
    def _shared(self) -> int | None:
        return self.teacher.shared(self.student.asked.vocabulary.size(self.student.logits))

    @property
    def _has_one_weight(self) -> bool:
        """Whether cross-entropy and the divergence see the same weights."""
        return self.teacher.temperature == 1.0 and self._shared is None

    @property
    def _weights(self) -> Float[Array, "n K"]:
        return jnp.exp(self.teacher.log_weights)

    def _reduced(self) -> _Seen:
        vocabulary, logits, shared = self.student.asked.vocabulary, self.student.logits, self._shared
        is_another = not self._has_one_weight

        def highest(ids: Int[Array, "1 V"], logits: PerToken) -> tuple[PerToken, PerToken | None]:
            return logits, _among(shared, ids, logits, -jnp.inf) if is_another else None

        maximum, soft_maximum = finite(vocabulary.maxima(highest, logits))

        def weights(ids: Int[Array, "1 V"], logits: PerToken) -> tuple[PerToken, PerToken | None]:
            soft = _among(shared, ids, self._soft_weight(logits, soft_maximum), 0.0) if is_another else None
            return jnp.exp(logits - maximum), soft

        total, soft_total = vocabulary.sums(weights, logits)
        return _Seen(maximum, total, *((soft_maximum, soft_total) if is_another else (maximum, total)))

    def _soft_weight(self, logits: PerToken, maximum: PerPosition) -> PerToken:
        return jnp.exp((logits - maximum) / self.teacher.temperature)

    def _totals(self, seen: _Seen) -> KDSums:
        teacher, asked, logits = self.teacher, self.student.asked, self.student.logits
        # Of all weights together, which are 1 but for rounding.
        cross = self._cross(seen.soft_maximum) / teacher.temperature
        cross -= jnp.log(seen.soft_total) * jnp.sum(self._weights, axis=-1, keepdims=True)
        # The draws know the cross term alone; the entropy is that of what they were drawn from.
        value = -cross - teacher.entropy[:, None]
        kd = teacher.temperature**2 * value
        names = teacher.known_sums(asked.vocabulary.size(logits), asked)
        per_token = KDSums(
            ce_sum=jnp.log(seen.total) - (asked.vocabulary.at(logits, self.student.targets) - seen.maximum),
            kd_sum=kd,
            log_z_sq_sum=(seen.maximum + jnp.log(seen.total)) ** 2,
            teacher_ce_sum=-teacher.target_log_prob[:, None],
            n=jnp.ones_like(value),
            kl_t1_sum=kd if "kl_t1_sum" in names else None,
        )
        return self.student.summed(per_token)

    def _cross(self, maximum: PerPosition) -> PerPosition:
        """The sum of the drawn tokens' weights times the student's logits from `maximum` on. Tokens that were not drawn
        weigh nothing, also where the student's logit is -inf."""
        teacher, vocabulary, weights = self.teacher, self.student.asked.vocabulary, self._weights

        def compared(logits: PerToken) -> PerPosition:
            def terms(ids: Int[Array, "1 V"], logits: PerToken) -> PerToken:
                found = _put(weights, teacher.ids, ids, jnp.zeros((1, 1)))
                return jnp.where(found > 0.0, found * (logits - maximum), 0.0)

            return vocabulary.sums(terms, logits)

        def scalars(logits: PerToken) -> PerPosition:
            from_maximum = teacher.logits_at_ids(logits, vocabulary) - maximum
            return jnp.sum(jnp.where(weights > 0.0, weights * from_maximum, 0.0), axis=-1, keepdims=True)

        return _at_ids(weights.shape[-1], compared, scalars, self.student.logits)

    def _gradient(self, seen: _Seen) -> PerToken:
        vocabulary, logits = self.student.asked.vocabulary, self.student.logits
        by_student, hard, soft = self.student.pulls(seen.maximum + jnp.log(seen.total), seen.total)
        by_soft = soft / seen.soft_total
        ids = vocabulary.ids(logits)
        if self._has_one_weight:
            gradient = (by_student + by_soft) * jnp.exp(logits - seen.maximum)
        else:
            softened = by_soft * self._soft_weight(logits, seen.soft_maximum)
            gradient = by_student * jnp.exp(logits - seen.maximum) + _among(self._shared, ids, softened, 0.0)
        gradient = gradient - jnp.where(ids == self.student.targets, hard, 0.0)
        weights = self._weights

        def compared(gradient: PerToken) -> PerToken:
            return gradient - soft * _put(weights, self.teacher.ids, ids, jnp.zeros((1, 1)))

        def scalars(gradient: PerToken) -> PerToken:
            return vocabulary.added(gradient, self.teacher.slots(vocabulary.size(logits)), -soft * weights)

        return _at_ids(weights.shape[-1], compared, scalars, gradient)


class _Outside(NamedTuple):
    """The student's weights of the tokens outside, or of all: their largest logit, 0 for no tokens, and their sum from
    there."""

    maximum: PerPosition
    total: PerPosition


class _Reduced(NamedTuple):
    """All that the visits before the gradient's took, and the student's logits that they were taken of."""

    outside: PerToken  # -inf at the stored tokens, if what is outside matters; else all logits
    at_ids: Float[Array, "n K"]  # -inf in unused slots
    at_target: PerPosition
    top: PerPosition  # the student's largest logit
    total: PerPosition  # the sum of the student's weights at T = 1, from there
    hard: _Outside  # at T = 1
    soft: _Outside | None  # at T, of the shared tokens; None where they do not matter
    columns: Logits
    scale: Scale
    sums: Sums

    @property
    def log_z(self) -> PerPosition:
        return self.top + jnp.log(self.total)


@dataclasses.dataclass(frozen=True)
class LargestBlock(LossBlock):
    """n tokens with the student's logits and the teacher's k largest."""

    student: StudentBlock
    teacher: StoredTeacher

    @property
    def _size(self) -> int:
        return self.student.asked.vocabulary.size(self.student.logits)

    @property
    def _shared(self) -> int | None:
        return self.teacher.shared(self._size)

    @property
    def _is_parted(self) -> bool:
        """Whether what is outside matters."""
        return self.teacher.reads_outside(self.student.asked.divergence)

    def _reduced(self) -> _Reduced:
        logits, vocabulary = self.student.logits, self.student.asked.vocabulary
        at_ids = self.teacher.logits_at_ids(logits, vocabulary)
        at_target = vocabulary.at(logits, self.student.targets)
        if self._is_parted:
            # Behind a barrier, or a compiler may read the logits after it has written over them, from a copy.
            logits, at_ids, at_target = jax.lax.optimization_barrier((logits, at_ids, at_target))
            nothing = jnp.full((1, self.teacher.ids.shape[-1]), -jnp.inf, logits.dtype)
            logits = self.teacher.replaced(logits, nothing, vocabulary)
        outside = logits
        hard, soft = self._outside(outside)
        top, total = hard
        if self._is_parted:
            highest = jnp.where(hard.total > 0.0, hard.maximum, -jnp.inf)
            top = finite(jnp.maximum(highest, jnp.max(at_ids, axis=-1, keepdims=True)))
            total = _from(top, hard) + jnp.sum(jnp.exp(at_ids - top), axis=-1, keepdims=True)
        columns = self._columns(at_ids - top, soft, top)
        return _Reduced(outside, at_ids, at_target, top, total, hard, soft, columns, *self._seen(columns))

    def _outside(self, outside: PerToken) -> tuple[_Outside, _Outside | None]:
        """At T = 1 all that is outside, at T the shared tokens among it."""
        vocabulary, shared, temperature = self.student.asked.vocabulary, self._shared, self.student.weights.temperature
        is_another = self._is_parted and not self._has_one_weight

        def highest(ids: Int[Array, "1 V"], logits: PerToken) -> tuple[PerToken, PerToken | None]:
            return logits, _among(shared, ids, logits, -jnp.inf) if is_another else None

        maximum, soft_maximum = finite(vocabulary.maxima(highest, outside))

        def weights(ids: Int[Array, "1 V"], logits: PerToken) -> tuple[PerToken, PerToken | None]:
            soft = _among(shared, ids, jnp.exp((logits - soft_maximum) / temperature), 0.0) if is_another else None
            return jnp.exp(logits - maximum), soft

        total, soft_total = vocabulary.sums(weights, outside)
        hard = _Outside(maximum, total)
        if not self._is_parted:
            return hard, None
        return hard, _Outside(soft_maximum, soft_total) if is_another else hard

    @property
    def _has_one_weight(self) -> bool:
        """Whether cross-entropy and the divergence see the same weights outside."""
        return self.teacher.temperature == 1.0 and self._shared is None

    def _columns(self, at_ids: Float[Array, "n K"], soft: _Outside | None, top: PerPosition) -> Logits:
        """K + 1 columns: both models' logits at the stored tokens and of all others together; the student's from `top`,
        because a logit of 1e4 has no decimals to lose."""
        if soft is None:
            student_outside = jnp.full_like(top, -jnp.inf)
        else:
            student_outside = (soft.maximum - top) + self.student.weights.temperature * jnp.log(soft.total)
        assert self.teacher.log_tail is not None
        log_weights = jnp.concatenate([self.teacher.log_weights, self.teacher.log_tail[:, None]], axis=-1)
        student = jnp.concatenate([at_ids, student_outside], axis=-1)
        return Logits(
            student=student,
            teacher=self.teacher.temperature * log_weights,
            is_shared=jnp.ones((1, student.shape[-1]), bool),
            is_kept=jnp.pad(self.teacher.ids < self._size, ((0, 0), (0, 1))),
            is_truncated=True,
        )

    def _seen(self, columns: Logits) -> tuple[Scale, Sums]:
        """What the divergence asks of the columns."""
        divergence = self.student.asked.divergence

        def reduced(reduce: Callable[..., Array], terms: PyTree[Float[Array, "n #K"]]) -> PyTree[PerPosition]:
            return jax.tree.map(lambda term: reduce(term, axis=-1, keepdims=True), terms)

        maxima = reduced(jnp.max, (columns.student, columns.teacher, divergence.maxima(columns)))
        student, teacher, own = finite(maxima)
        scale = Scale(student, teacher, own, self.student.weights.temperature)
        p = jnp.exp(scale.log_weight(columns.teacher, scale.teacher))
        terms = Sums(p=p, p_kept=jnp.where(columns.is_kept, p, 0.0), own=divergence.terms(columns, scale))
        sums = reduced(jnp.sum, terms)
        return scale, sums._replace(normalized=reduced(jnp.sum, divergence.normalized_terms(columns, scale, sums)))

    def _totals(self, reduced: _Reduced) -> KDSums:
        value = self.student.asked.divergence.value(reduced.scale, reduced.sums)
        assert self.teacher.log_tail is not None
        kd = self.student.weights.temperature**2 * value
        asked = self.student.asked
        per_token = KDSums(
            ce_sum=jnp.log(reduced.total) - (reduced.at_target - reduced.top),
            kd_sum=kd,
            log_z_sq_sum=reduced.log_z**2,
            teacher_ce_sum=-self.teacher.target_log_prob[:, None],
            n=jnp.ones_like(value),
            kept_mass_sum=-jnp.expm1(self.teacher.log_tail[:, None]) if self.teacher.is_asked_at_own else None,
            kl_t1_sum=kd if "kl_t1_sum" in self.teacher.known_sums(self._size, asked) else None,
        )
        return self.student.summed(per_token)

    def _gradient(self, reduced: _Reduced) -> PerToken:
        vocabulary, targets = self.student.asked.vocabulary, self.student.targets
        by_student, hard, soft = self.student.pulls(reduced.log_z, reduced.total)
        slope = self.student.asked.divergence.slope(reduced.columns, reduced.scale, reduced.sums, soft)
        ids = vocabulary.ids(reduced.outside)
        gradient = self._outside_gradient(reduced, by_student, slope[:, -1:], ids)
        gradient = gradient - jnp.where(ids == targets, hard, 0.0)
        at_ids = by_student * jnp.exp(reduced.at_ids - reduced.top) + slope[:, :-1]
        at_ids = at_ids - jnp.where(self.teacher.ids == targets, hard, 0.0)
        return self.teacher.replaced(gradient, at_ids, vocabulary)

    def _outside_gradient(
        self, reduced: _Reduced, by_student: PerPosition, slope: PerPosition, ids: Int[Array, "1 V"]
    ) -> PerToken:
        """Of the tokens outside the slope is shared out as their weights at T are."""
        hard, soft, outside = reduced.hard, reduced.soft, reduced.outside
        # Where nothing is outside, neither a factor nor a share has a meaning, and none is needed.
        by_hard = jnp.where(hard.total > 0.0, by_student * jnp.exp(hard.maximum - reduced.top), 0.0)
        if soft is None:
            return by_hard * jnp.exp(outside - hard.maximum)
        by_soft = jnp.where(soft.total > 0.0, slope / soft.total, 0.0)
        if self._has_one_weight:
            return (by_hard + by_soft) * jnp.exp(outside - hard.maximum)
        weights = jnp.exp((outside - soft.maximum) / self.student.weights.temperature)
        return by_hard * jnp.exp(outside - hard.maximum) + _among(self._shared, ids, by_soft * weights, 0.0)


def _from(top: PerPosition, part: _Outside) -> PerPosition:
    """The part's sum of weights at T = 1, from `top` on."""
    return jnp.where(part.total > 0.0, part.total * jnp.exp(part.maximum - top), 0.0)


def _among(shared: int | None, ids: Int[Array, "1 V"], values: PerToken, otherwise: float) -> PerToken:
    """The values of the tokens that both models have."""
    return values if shared is None else jnp.where(ids < shared, values, otherwise)
