"""The generalised Jensen-Shannon divergence."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from MaxText.distill.terms import mixture
from MaxText.distill.terms.base import Term


@dataclasses.dataclass(frozen=True)
class JensenShannon(Term):
    """beta p log(p / m) + (1 - beta) q log(q / m), with m = beta p + (1 - beta) q.

    Its sum is beta KL(p || m) + (1 - beta) KL(q || m). Divided by beta it goes to KL(p || q) as beta goes to 0, divided
    by 1 - beta to KL(q || p) as beta goes to 1.

    Attributes:
        beta: in (0, 1).

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD, arXiv:2306.13649), section 2.
    """

    beta: float
    name = "jsd"

    def value(self, log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
        log_p_to_m, log_q_to_m = self._log_ratios(log_q - log_p)
        p = jnp.exp(log_p)
        of_teacher = jnp.where(p > 0.0, p * log_p_to_m, 0.0)
        return self.beta * of_teacher + (1.0 - self.beta) * jnp.exp(log_q) * log_q_to_m

    def slope(self, log_odds: Float[Array, "..."]) -> Float[Array, "..."]:
        _, log_q_to_m = self._log_ratios(log_odds)
        return (1.0 - self.beta) * log_q_to_m

    def _log_ratios(self, log_odds: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return mixture.log_ratios(log_odds, teachers=self.beta, students=1.0 - self.beta)
