"""The teacher's side of a block: what the loss learns of the teacher, however that is come by.

# N tokens, n tokens of a block, E teacher's width, V vocabulary (or one device's shard of it)

The walk knows that there are rows, one per token, and hands those of a block back; what they hold it does not know.
What comes of them are logits and the kept set. Left out on purpose: any gradient.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from MaxText.distill.kd_loss import check_vocabularies
from MaxText.distill.projection import Projection
from MaxText.distill.truncation import KeptBound, Scalar, check_truncation, kept_bound
from MaxText.distill.vocabulary import Vocabulary


class TeacherBlock(NamedTuple):
    """What the teacher says of a block's tokens.

    logits: raw, float32; -inf for tokens without mass, those among them that the models do not share.
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


class TeacherSide(Protocol):
    """A pytree of arrays; those in `rows` have a row per token, the others are the same for all tokens."""

    @property
    def rows(self) -> PyTree[Float[Array, "N ..."]]: ...

    def check(self, student_vocabulary: int, vocabulary: Vocabulary) -> None:
        """Raises ValueError, naming the argument, where this teaches no student with a vocabulary of that size."""

    def block(self, rows: PyTree[Float[Array, "n ..."]], temperature: Scalar, vocabulary: Vocabulary) -> TeacherBlock:
        """What the teacher says of the tokens that these are the rows of; on each device of its shard of `vocabulary`.

        The temperature is that of the loss; a kept set by mass depends on it.
        """


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

    def check(self, student_vocabulary: int, vocabulary: Vocabulary) -> None:
        size = self.model.vocabulary_size(vocabulary)
        check_vocabularies(student_vocabulary, size, self.shared_vocabulary)
        check_truncation(self.shared_vocabulary or size, top_k=self.top_k, top_p=self.top_p)

    def block(self, rows: Float[Array, "n E"], temperature: Scalar, vocabulary: Vocabulary) -> TeacherBlock:
        logits = self.model.project(self.model.head, rows).astype(jnp.float32)
        size = vocabulary.size(logits)
        shared = self.shared_vocabulary if 0 < self.shared_vocabulary < size else None
        if shared is not None:
            # To the loss a token that only one of the models has is one without mass.
            logits = jnp.where(vocabulary.ids(logits) < shared, logits, -jnp.inf)
        if self.top_k in (0, shared or size) and self.top_p in (0.0, 1.0):
            return TeacherBlock(logits, None, shared)
        logits = jnp.where(logits == 0.0, 0.0, logits)  # without negative zeros, as kept_bound asks
        bound = kept_bound(logits, temperature=temperature, top_k=self.top_k, top_p=self.top_p, vocabulary=vocabulary)
        return TeacherBlock(logits, bound, shared)
