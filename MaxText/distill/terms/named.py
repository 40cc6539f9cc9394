"""Divergences by their names."""

from collections.abc import Callable

import jax.numpy as jnp

from MaxText.distill.terms.base import Term
from MaxText.distill.terms.jensen_shannon import JensenShannon
from MaxText.distill.terms.reverse_kl import ReverseKL
from MaxText.distill.terms.skew_kl import SkewKL
from MaxText.distill.terms.skew_reverse_kl import SkewReverseKL
from MaxText.distill.terms.total_variation import TotalVariation

# From here on 1 / skew, which is how steep it can be, is a float32. Below, it is the forward KL in every digit.
_LEAST_SKEW = float(jnp.finfo(jnp.float32).tiny)

# Name -> (jsd_beta, skew) -> the term. None is the forward KL's, whose sums need no normalised p and q, and so no visit
# of their own (divergences.ForwardKL).
TERMS: dict[str, Callable[[float, float], Term | None]] = {
    "forward_kl": lambda jsd_beta, skew: None,
    "reverse_kl": lambda jsd_beta, skew: ReverseKL(),
    "jsd": lambda jsd_beta, skew: JensenShannon(jsd_beta),
    "skew_kl": lambda jsd_beta, skew: SkewKL(skew) if skew >= _LEAST_SKEW else None,
    "skew_reverse_kl": lambda jsd_beta, skew: SkewReverseKL(skew) if skew else ReverseKL(),
    "tvd": lambda jsd_beta, skew: TotalVariation(),
}
DIVERGENCES = tuple(TERMS)


def term_named(name: str, *, jsd_beta: float, skew: float) -> Term | None:
    """The term of a divergence; None for the forward KL.

    Args:
        name: one of DIVERGENCES.
        jsd_beta: of jsd, in (0, 1).
        skew: of skew_kl and skew_reverse_kl, in [0, 1); with 0 they are the forward and the reverse KL.

    Raises:
        ValueError: for an argument without meaning, which it names.
    """
    if name not in TERMS:
        raise ValueError(f"divergence={name!r}: expected one of {', '.join(DIVERGENCES)}")
    if not 0.0 < jsd_beta < 1.0:
        raise ValueError(f"jsd_beta={jsd_beta}: expected a number between 0 and 1, both excluded")
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew={skew}: expected a number from 0 to below 1")
    return TERMS[name](jsd_beta, skew)
