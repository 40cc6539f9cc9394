"""The teacher's side of a block: what the loss learns of the teacher, however that is come by.

# N tokens, n tokens of a block, E teacher's width, V vocabulary (or one device's shard of it)

The walk knows that there are rows, one per token, and hands those of a block back with the student's logits; what they
hold it does not know. What comes of them is the block's loss. A teacher that runs beside the student is in here, what
was stored of one is in stored.py. Left out on purpose: any gradient.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from MaxText.distill.block import Asked, LiveBlock, LossBlock, StudentBlock, TeacherLogits
from MaxText.distill.kd_loss import OF_AN_EVALUATION, KDSums, check_vocabularies
from MaxText.distill.projection import Projection
from MaxText.distill.truncation import Scalar, check_truncation, kept_bound
from MaxText.distill.vocabulary import Vocabulary


class TeacherSide(Protocol):
    """A pytree of arrays; those in `rows` have a row per token, the others are the same for all tokens."""

    @property
    def rows(self) -> PyTree[Array]: ...

    def check(self, student_vocabulary: int, asked: Asked, temperature: Scalar) -> None:
        """Raises ValueError, naming the argument, where this teaches no student with a vocabulary of that size, or not
        by what is asked."""

    def known_sums(self, student_vocabulary: int, asked: Asked) -> tuple[str, ...]:
        """The names of those of KDSums that a block gives; the others are None."""

    def block(self, rows: PyTree[Array], student: StudentBlock) -> LossBlock:
        """The loss of the tokens that these are the rows of; on each device with its shard of the vocabulary."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LiveTeacher:
    """A teacher that runs beside the student, and is projected block by block.

    model: its hidden states and head.
    top_k, top_p: as for `truncation.kept_set`. Static.
    shared_vocabulary: as for `kd_loss.kd_sums`. Static.
    """

    model: Projection
    top_k: int = dataclasses.field(default=0, metadata={"static": True})
    top_p: float = dataclasses.field(default=0.0, metadata={"static": True})
    shared_vocabulary: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def rows(self) -> Float[Array, "N E"]:
        return self.model.hidden

    def check(self, student_vocabulary: int, asked: Asked, temperature: Scalar) -> None:
        size = self.model.vocabulary_size(asked.vocabulary)
        check_vocabularies(student_vocabulary, size, self.shared_vocabulary)
        check_truncation(self.shared_vocabulary or size, top_k=self.top_k, top_p=self.top_p)

    def known_sums(self, student_vocabulary: int, asked: Asked) -> tuple[str, ...]:
        return tuple(name for name in KDSums._fields if asked.evaluation or name not in OF_AN_EVALUATION)

    def block(self, rows: Float[Array, "n E"], student: StudentBlock) -> LiveBlock:
        return LiveBlock(student, self.logits(rows, student.weights.temperature, student.asked.vocabulary))

    def logits(self, rows: Float[Array, "n E"], temperature: Scalar, vocabulary: Vocabulary) -> TeacherLogits:
        """A kept set by mass depends on the temperature."""
        logits = shared_logits(self.model, rows, self.shared_vocabulary, vocabulary)
        size = vocabulary.size(logits)
        shared = self.shared_vocabulary if 0 < self.shared_vocabulary < size else None
        if self.top_k in (0, shared or size) and self.top_p in (0.0, 1.0):
            return TeacherLogits(logits, None, shared)
        bound = kept_bound(logits, temperature=temperature, top_k=self.top_k, top_p=self.top_p, vocabulary=vocabulary)
        return TeacherLogits(logits, bound, shared)


def shared_logits(
    model: Projection, rows: Float[Array, "n E"], shared_vocabulary: int, vocabulary: Vocabulary
) -> Float[Array, "n V"]:
    """Raw; -inf for tokens that the models do not share."""
    logits = model.project(model.head, rows)
    if 0 < shared_vocabulary < vocabulary.size(logits):
        # To the loss a token that only one of the models has is one without mass.
        logits = jnp.where(vocabulary.ids(logits) < shared_vocabulary, logits, -jnp.inf)
    return logits
