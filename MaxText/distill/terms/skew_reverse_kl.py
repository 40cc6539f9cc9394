"""The skew reverse KL divergence: the student from a mixture of both."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from MaxText.distill.terms import mixture
from MaxText.distill.terms.base import Term


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Term):
    """q log(q / m), with m = (1 - skew) p + skew q. With a skew of 0 it would be the reverse KL.

    Attributes:
        skew: in (0, 1).

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv:2402.03898),
    section 3.1.
    """

    skew: float
    name = "skew_reverse_kl"

    def value(self, log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.exp(log_q) * self._log_q_to_m(log_q - log_p)

    def slope(self, log_odds: Float[Array, "..."]) -> Float[Array, "..."]:
        log_q_to_m = self._log_q_to_m(log_odds)
        return log_q_to_m - jnp.exp(math.log(self.skew) + log_q_to_m)

    def _log_q_to_m(self, log_odds: Float[Array, "..."]) -> Float[Array, "..."]:
        return mixture.log_ratios(log_odds, teachers=1.0 - self.skew, students=self.skew)[1]
