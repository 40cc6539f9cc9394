"""The skew KL divergence: the teacher from a mixture of both."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from MaxText.distill.terms import mixture
from MaxText.distill.terms.base import Term


@dataclasses.dataclass(frozen=True)
class SkewKL(Term):
    """p log(p / m), with m = skew p + (1 - skew) q. With a skew of 0 it would be the forward KL.

    Attributes:
        skew: in (0, 1).

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv:2402.03898),
    section 3.1.
    """

    skew: float
    name = "skew_kl"
    is_of_teachers_tokens = True

    def value(self, log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
        p = jnp.exp(log_p)
        return jnp.where(p > 0.0, p * self._log_p_to_m(log_q - log_p), 0.0)

    def slope(self, log_odds: Float[Array, "..."]) -> Float[Array, "..."]:
        return (self.skew - 1.0) * jnp.exp(self._log_p_to_m(log_odds))

    def _log_p_to_m(self, log_odds: Float[Array, "..."]) -> Float[Array, "..."]:
        return mixture.log_ratios(log_odds, teachers=self.skew, students=1.0 - self.skew)[0]
