"""The teacher's kept set: the tokens of each position that the distillation loss looks at.

# V vocabulary

The order of tokens is that of the raw float32 logits, highest first, equal logits by lower token id. Softened and
rounded probabilities would not do: they have ties that the logits do not have.

Left out on purpose: top-k and top-p at once (the loss calls that an error), and any choice by the student's logits.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def check_truncation(vocabulary: int, *, top_k: int, top_p: float) -> None:
    """Raises ValueError, naming the argument, its value and what is allowed, for a truncation that has no meaning."""
    if not 0 <= top_k <= vocabulary:
        raise ValueError(f"top_k={top_k}: expected 0 (off) to the vocabulary's size, {vocabulary}")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p={top_p}: expected a mass in [0, 1], where 0 is off and 1 keeps every token")
    if top_k > 0 and top_p > 0.0:
        raise ValueError(f"top_k={top_k} and top_p={top_p}: expected one truncation at most; set the other to 0")


def kept_set(
    teacher_logits: Float[Array, "*batch V"], *, temperature: float | Float[Array, ""], top_k: int, top_p: float
) -> Bool[Array, "*batch V"] | None:
    """Membership of each token in the teacher's kept set K, per position, or None where K is the whole vocabulary.

        top_k   the k largest logits
        top_p   the shortest prefix of p = softmax(teacher / T), sorted downwards, whose sum is at least top_p;
                the token that crosses is kept

    Ties go to the lower token id. The logits are ordered by one sort of the vocabulary: this is the plain form.

    Args:
        teacher_logits: raw, at temperature 1; any float type. -inf marks tokens that the teacher does not have: their
            mass is 0, so top_p < 1 never keeps them, top_k does only where it runs out of others.
        temperature: T > 0. It moves the nucleus of top_p and leaves top_k alone.
        top_k: 0 is off, V keeps every token. Static.
        top_p: 0.0 is off, 1.0 keeps every token. Static.

    Raises:
        ValueError: by `check_truncation`.

    Source: top-p is the nucleus of Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), section 3.1.
    """
    vocabulary = teacher_logits.shape[-1]
    check_truncation(vocabulary, top_k=top_k, top_p=top_p)
    if top_k in (0, vocabulary) and top_p in (0.0, 1.0):
        return None

    logits = teacher_logits.astype(jnp.float32)
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
    rank = jnp.argsort(order, axis=-1)
    if top_k:
        return rank < top_k

    weights = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    prefix_sums = jnp.cumsum(jnp.take_along_axis(weights, order, axis=-1), axis=-1)
    # Measured against the last prefix sum, not another sum of the same numbers: the two round differently, and a top_p
    # near 1 must be reached within the finite logits.
    crossed = prefix_sums >= top_p * prefix_sums[..., -1:]
    return rank <= jnp.argmax(crossed, axis=-1, keepdims=True)
