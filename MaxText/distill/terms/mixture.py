"""Mixtures of both models' distributions, in logarithms: m = a p + b q with a + b = 1.

By the log-odds u that a token of the mixture is the student's, log(p / m) = -log a - softplus(u) and log(q / m) =
-log b - softplus(-u): right to the last digits for any share above 0, and wherever p or q underflows.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_ratios(
    log_odds: Float[Array, "..."], *, teachers: float, students: float
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """log(p / m) and log(q / m).

    Args:
        log_odds: log(q / p); inf where the teacher has no mass: log(p / m) is then -inf.
        teachers, students: a and b. Both are asked for, because 1 - a would lose a b of 1e-20.
    """
    log_a, log_b = math.log(teachers), math.log(students)
    of_student, of_teacher = softplus_of_both_signs(log_odds + (log_b - log_a))
    return -log_a - of_student, -log_b - of_teacher


@jax.custom_jvp
def softplus_of_both_signs(u: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """log(1 + exp(u)) and log(1 + exp(-u)), which have the second of their parts in common."""
    rest = jnp.log1p(jnp.exp(-jnp.abs(u)))
    return jnp.maximum(u, 0.0) + rest, jnp.maximum(-u, 0.0) + rest


@softplus_of_both_signs.defjvp
def _slopes(
    primals: tuple[Float[Array, "..."]], tangents: tuple[Float[Array, "..."]]
) -> tuple[tuple[Float[Array, "..."], Float[Array, "..."]], tuple[Float[Array, "..."], Float[Array, "..."]]]:
    """Of both parts at once: a compiler that computes u twice may take it for 0 in one and for 1e-9 in the other."""
    plus, minus = softplus_of_both_signs(*primals)
    (tangent,) = tangents
    return (plus, minus), (jnp.exp(-minus) * tangent, -jnp.exp(-plus) * tangent)
