"""KL(student || teacher)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from MaxText.distill.terms.base import Term


@dataclasses.dataclass(frozen=True)
class ReverseKL(Term):
    """q log(q / p). It is infinite where the student has mass and the teacher has none.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv:2306.08543), section 2, there
    of whole answers that the student samples; here of each next token.
    """

    name = "reverse_kl"
    is_of_teachers_support = True

    def value(self, log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.exp(log_q) * (log_q - log_p)

    def slope(self, log_odds: Float[Array, "..."]) -> Float[Array, "..."]:
        return log_odds  # and 1, a constant
