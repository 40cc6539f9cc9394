"""A model as the loss takes it: hidden states, and what makes logits of them.

# N tokens, n tokens of a block, D width, V vocabulary (or one device's shard of it)
"""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, PyTree

from MaxText.distill.vocabulary import Vocabulary

Project = Callable[[PyTree, Float[Array, "n D"]], Float[Array, "n V"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """Hidden states of every token, and a head.

    hidden: what `project` takes, one row per token; any float type.
    head: the parameters of `project`.
    project: (head, hidden) -> logits of any float type: matrix, soft cap, scale. Static: pass one and the same function
        at each call, or the caller's jit compiles again.
    """

    hidden: Float[Array, "N D"]
    head: PyTree
    project: Project = dataclasses.field(metadata={"static": True})

    def vocabulary_size(self, vocabulary: Vocabulary) -> int:
        """Tokens of the whole vocabulary, of which `project` may give one device's shard."""
        return vocabulary.size(jax.eval_shape(self.project, self.head, self.hidden[:1]))
