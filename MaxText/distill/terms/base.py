"""A term of a divergence: what a token adds to it, and how that pulls at the student.

# any shape: tokens, or categories that stand for several

With p of the teacher and q of the student a divergence is D = sum of f(p, q), and as q is a softmax its derivative with
respect to the student's scaled logit of a token is

    q (f' - sum of q f')        f' = df/dq

f is q times a function of q / p, as any f-divergence's is, so that f' is a function of q / p alone: `slope` gives it
from the logarithm, and nothing is divided by a q that has underflowed. A constant in f' changes nothing, and may be
left out.
"""

import abc

from jaxtyping import Array, Float


class Term(abc.ABC):
    """f(p, q) in nats, whose sum over tokens is at least 0, and 0 where p = q."""

    name: str  # of the divergence, as kd_divergence has it

    # Whether f is 0 where p is 0, whatever q is: then the sum need not go beyond the tokens that the teacher keeps.
    is_of_teachers_tokens = False
    # Whether f is infinite where p is 0 and q is not: the tokens without mass (a logit of -inf) are then left out of
    # both softmaxes, as those are that the models do not share.
    is_of_teachers_support = False

    def check(self, truncation_strategy: str) -> None:
        """Raises ValueError for a truncation strategy under which the sum has no meaning."""
        if truncation_strategy == "renormalize_teacher" and not self.is_of_teachers_tokens:
            raise ValueError(
                f"truncation_strategy=renormalize_teacher: {self.name} has terms of the student outside the kept set, "
                "where that strategy leaves the teacher no mass; expected renormalize or other_bucket"
            )

    @abc.abstractmethod
    def value(self, log_p: Float[Array, "..."], log_q: Float[Array, "..."]) -> Float[Array, "..."]:
        """f, differentiable with respect to log_q.

        Args:
            log_p: -inf for no mass, unless is_of_teachers_support.
            log_q: finite.
        """

    @abc.abstractmethod
    def slope(self, log_odds: Float[Array, "..."]) -> Float[Array, "..."]:
        """df/dq, but for a constant.

        Args:
            log_odds: log(q / p); inf where the teacher has no mass, unless is_of_teachers_support.
        """
