"""The teacher's kept set: the tokens of each position that the distillation loss looks at.

# n positions of a block, V vocabulary (or one device's shard of it)

The order of tokens is that of the raw float32 logits, highest first, equal logits by lower token id. Softened and
rounded probabilities would not do: they have ties that the logits do not have.

Left out on purpose: top-k and top-p at once (the loss calls that an error), and any choice by the student's logits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from MaxText.distill import search
from MaxText.distill.vocabulary import Vocabulary

Scalar = float | Float[Array, ""]


def check_truncation(vocabulary: int, *, top_k: int, top_p: float) -> None:
    """Raises ValueError, naming the argument, its value and what is allowed, for a truncation that has no meaning."""
    if not 0 <= top_k <= vocabulary:
        raise ValueError(f"top_k={top_k}: expected 0 (off) to the vocabulary's size, {vocabulary}")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p={top_p}: expected a mass in [0, 1], where 0 is off and 1 keeps every token")
    if top_k > 0 and top_p > 0.0:
        raise ValueError(f"top_k={top_k} and top_p={top_p}: expected one truncation at most; set the other to 0")


def kept_set(
    teacher_logits: Float[Array, "*batch V"], *, temperature: Scalar, top_k: int, top_p: float
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


class KeptBound(NamedTuple):
    """The kept set as its last member: its logit and its token id. Membership needs no sort, scatter or buffer."""

    logit: Float[Array, "n 1"]
    token: Int[Array, "n 1"]

    def keeps(self, logits: Float[Array, "n V"], ids: Int[Array, "1 V"]) -> Bool[Array, "n V"]:
        return (logits > self.logit) | ((logits == self.logit) & (ids <= self.token))


def kept_bound(
    logits: Float[Array, "n V"],
    *,
    temperature: Scalar,
    top_k: int,
    top_p: float,
    vocabulary: Vocabulary,
) -> KeptBound | None:
    """`kept_set` without a sort of the vocabulary, or None where K is the whole vocabulary.

    Accelerators look for the bound by counting (search.py): a few visits of the vocabulary, whatever k is. CPUs are
    faster with `lax.top_k`, once for top_k. For top_p they halve the range of logits in which the nucleus ends until 64
    tokens are left in it at most, and put those in order; where equal logits keep them from that, they bisect bits.

    Args:
        logits: float32 or bfloat16.
        temperature, top_k, top_p: as for `kept_set`.
        vocabulary: how the last axis is laid out.
    """
    if top_k in (0, vocabulary.size(logits)) and top_p in (0.0, 1.0):
        return None

    def by(bound: Callable[..., KeptBound]) -> Callable[[Float[Array, "n V"]], KeptBound]:
        return functools.partial(bound, temperature=temperature, top_k=top_k, top_p=top_p, vocabulary=vocabulary)

    return jax.lax.platform_dependent(logits, cpu=by(selected_bound), default=by(counted_bound))


def counted_bound(
    logits: Float[Array, "n V"], *, temperature: Scalar, top_k: int, top_p: float, vocabulary: Vocabulary
) -> KeptBound:
    """The bound by counting, for a truncation that is one."""
    maximum = vocabulary.maxima(lambda _, logits: logits, logits)

    def weight(logits: Float[Array, "n #V"]) -> Float[Array, "n #V"]:
        return jnp.ones_like(logits) if top_k else jnp.exp((logits - maximum) / temperature)

    total = vocabulary.sums(lambda _, logits: weight(logits), logits)
    goal = jnp.full_like(total, top_k) if top_k else top_p * total
    logit, above = search.crossing(logits, weight, goal, vocabulary)
    # Of equal logits at the bound as many as are needed. Sums in two orders round differently: one at least.
    needed = jnp.maximum(jnp.ceil((goal - above) / weight(logit)), 1.0)
    return KeptBound(logit, search.nth_equal(logits, logit, needed, vocabulary))


def selected_bound(
    logits: Float[Array, "n V"], *, temperature: Scalar, top_k: int, top_p: float, vocabulary: Vocabulary
) -> KeptBound:
    """The bound by selection, for a truncation that is one."""
    logits = logits.astype(jnp.float32)
    logits = jnp.where(logits == 0.0, 0.0, logits)  # without negative zeros, which lax.top_k orders lower
    if top_k:
        values, ids = vocabulary.top_k(logits, top_k)
        return KeptBound(values[:, -1:], ids[:, -1:])
    return _top_p_bound(logits, temperature, top_p, vocabulary)


# Tokens that one selection puts in order at the end. Selecting more costs more than the visits that it saves.
_CANDIDATES = 64
# After so many halvings more tokens than candidates mostly means equal logits (bfloat16 has many).
_MOST_HALVINGS = 14


Weight = Callable[[Float[Array, "n #V"]], Float[Array, "n #V"]]  # of logits, from their largest


class _Bracket(NamedTuple):
    """Where the nucleus ends: the tokens above `low` weigh the goal or more, those above `high` less."""

    low: Float[Array, "n 1"]
    high: Float[Array, "n 1"]
    count_above_low: Float[Array, "n 1"]
    count_above_high: Float[Array, "n 1"]
    mass_above_high: Float[Array, "n 1"]

    @property
    def tokens(self) -> Float[Array, "n 1"]:
        return self.count_above_low - self.count_above_high


def _top_p_bound(logits: Float[Array, "n V"], temperature: Scalar, top_p: float, vocabulary: Vocabulary) -> KeptBound:
    maximum, negated_minimum = vocabulary.maxima(lambda _, logits: (logits, -logits), logits)

    def weight(logits: Float[Array, "n #V"]) -> Float[Array, "n #V"]:
        return jnp.exp((logits - maximum) / temperature)

    size = vocabulary.size(logits)
    total = vocabulary.sums(lambda _, logits: weight(logits), logits)
    goal = top_p * total
    # Even if every token weighed (1 - top_p) total / size they would only just reach what lies outside the nucleus. One
    # nat below that, no rounding matters.
    low = maximum + temperature * (jnp.log((1.0 - top_p) * total / size) - 1.0)
    low = jnp.maximum(
        low, -negated_minimum - (maximum + negated_minimum) - temperature / 1024
    )  # where logits are nearly all alike
    none = jnp.zeros_like(total)
    bracket = _halved(_Bracket(low, maximum, none + size, none, none), logits, weight, goal, vocabulary)

    below = jnp.where(logits <= bracket.high, logits, -jnp.inf)
    values, ids = vocabulary.top_k(below, min(_CANDIDATES, size))
    crossed = bracket.mass_above_high + jnp.cumsum(weight(values), axis=-1) >= goal
    # Sums in two orders round differently: where the candidates are all that the bracket holds, the last one crosses.
    are_all = (bracket.tokens >= 1) & (bracket.tokens <= values.shape[-1])
    crossed |= are_all & (jnp.arange(values.shape[-1]) >= bracket.tokens - 1)
    last = jnp.argmax(crossed, axis=-1, keepdims=True)
    found = KeptBound(jnp.take_along_axis(values, last, axis=-1), jnp.take_along_axis(ids, last, axis=-1))
    is_found = crossed[:, -1:]

    def by_key() -> KeptBound:
        bound = _bisected_bound(logits, weight, goal, is_found, bracket, vocabulary)
        return jax.tree.map(lambda found, bisected: jnp.where(is_found, found, bisected), found, bound)

    return jax.lax.cond(jnp.all(is_found), lambda: found, by_key)


def _halved(
    bracket: _Bracket, logits: Float[Array, "n V"], weight: Weight, goal: Float[Array, "n 1"], vocabulary: Vocabulary
) -> _Bracket:
    """The bracket, halved until no position has more tokens in it than candidates."""

    def is_wide(bracket: _Bracket) -> Bool[Array, "n 1"]:
        return bracket.tokens > _CANDIDATES

    def halve(state: tuple[Int[Array, ""], _Bracket]) -> tuple[Int[Array, ""], _Bracket]:
        number, bracket = state
        middle = bracket.low + (bracket.high - bracket.low) / 2

        def mass_and_count(_: Array, logits: Array) -> tuple[Array, Array]:
            above = logits > middle
            return jnp.where(above, weight(logits), 0.0), jnp.where(above, 1.0, 0.0)

        mass, count = vocabulary.sums(mass_and_count, logits)
        # The positions that are done stay as they are: what they have in their bracket has been counted.
        upper, lower = is_wide(bracket) & (mass >= goal), is_wide(bracket) & (mass < goal)
        return number + 1, _Bracket(
            low=jnp.where(upper, middle, bracket.low),
            high=jnp.where(lower, middle, bracket.high),
            count_above_low=jnp.where(upper, count, bracket.count_above_low),
            count_above_high=jnp.where(lower, count, bracket.count_above_high),
            mass_above_high=jnp.where(lower, mass, bracket.mass_above_high),
        )

    def goes_on(state: tuple[Int[Array, ""], _Bracket]) -> Bool[Array, ""]:
        number, bracket = state
        return (number < _MOST_HALVINGS) & jnp.any(is_wide(bracket))

    return jax.lax.while_loop(goes_on, halve, (jnp.int32(0), bracket))[1]


def _bisected_bound(
    logits: Float[Array, "n V"],
    weight: Weight,
    goal: Float[Array, "n 1"],
    is_settled: Bool[Array, "n 1"],
    bracket: _Bracket,
    vocabulary: Vocabulary,
) -> KeptBound:
    """The bound of the shortest prefix that weighs at least `goal`, which ends in the bracket.

    Positions that are settled are not searched; what they get has no meaning.
    """

    def in_loop(logits: Array, bound: Array) -> Array:
        """The same logits. Without it compilers move the keys and weights in front of the loop, and store them."""
        return jax.lax.optimization_barrier((logits, bound))[0]

    def reaches(key: Array) -> Bool[Array, "n 1"]:
        """Whether the tokens from this key upwards weigh enough."""

        def mass(_: Array, logits: Array) -> Array:
            return jnp.where(search.ordered_keys(logits) >= key, weight(logits), 0.0)

        return vocabulary.sums(mass, in_loop(logits, key)) >= goal

    def both_ends(_: Array, logits: Array) -> tuple[Array, Array]:
        inside = (logits > bracket.low) & (logits <= bracket.high)
        return jnp.where(inside, logits, -jnp.inf), jnp.where(inside, -logits, -jnp.inf)

    # The smallest and the largest logit of the bracket: the same one where only equal logits are left in it. Where a
    # temperature far below the logits' own rounding has left none, all below `high` are searched.
    largest, negated_smallest = vocabulary.maxima(both_ends, logits)
    is_empty = jnp.isneginf(largest)
    above = search.ordered_keys(jnp.where(is_empty, bracket.high, largest)) + 1
    low = jnp.where(is_empty, jnp.zeros_like(above), search.ordered_keys(-negated_smallest))
    crossing = search.logit_of_key(_largest(reaches, jnp.where(is_settled, above - 1, low), above))

    def mass_and_ties(_: Array, logits: Array) -> tuple[Array, Array]:
        return jnp.where(logits > crossing, weight(logits), 0.0), jnp.where(logits == crossing, 1.0, 0.0)

    mass_above, ties = vocabulary.sums(mass_and_ties, logits)
    ties_needed = jnp.ceil((goal - mass_above) / weight(crossing))

    def token_of_last_tie() -> Int[Array, "n 1"]:
        def lacks(token: Int[Array, "n 1"]) -> Bool[Array, "n 1"]:
            """Whether the ties below this token are too few: the largest such token is the last tie that is needed."""

            def ties_below(ids: Array, logits: Array) -> Array:
                return jnp.where((logits == crossing) & (ids < token), 1.0, 0.0)

            return vocabulary.sums(ties_below, in_loop(logits, token)) < ties_needed

        low = jnp.zeros_like(above, dtype=jnp.int32)
        return _largest(lacks, low, low + jnp.where(is_settled, 1, vocabulary.size(logits)))

    every_token = jnp.full_like(above, vocabulary.size(logits), dtype=jnp.int32)
    leaves_ties_out = jnp.any(~is_settled & (ties_needed < ties))
    return KeptBound(crossing, jax.lax.cond(leaves_ties_out, token_of_last_tie, lambda: every_token))


def _largest(holds: Callable[[Array], Bool[Array, "n 1"]], low: Array, high: Array) -> Array:
    """The largest integer in [low, high) at which `holds`: true at low, and once false, false ever after; per row."""

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        found = holds(middle)
        return jnp.where(found, middle, low), jnp.where(found, high, middle)

    return jax.lax.while_loop(lambda bounds: jnp.any(bounds[1] - bounds[0] > 1), halve, (low, high))[0]
