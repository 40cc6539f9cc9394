"""The total variation distance."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from MaxText.distill.terms.base import Term


@dataclasses.dataclass(frozen=True)
class TotalVariation(Term):
    """|p - q| / 2, whose sum is the largest difference that the two have about any set of tokens.

    Its slope jumps where p = q, and is taken to be 0 there.

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (arXiv:2307.15190).
    """

    name = "tvd"

    def value(self, log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)) / 2.0

    def slope(self, log_odds: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.sign(log_odds) / 2.0
