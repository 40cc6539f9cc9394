"""The bound of a kept set by counting: no sort, no selection, whatever k is and however many logits are equal.

# n positions of a block, V vocabulary (or one device's shard of it), C chunks of S tokens

The tokens from a logit upwards weigh more the lower it is. So the logit at which their weight reaches a goal is found
by weighing at several logits in one visit of the vocabulary, and again between the two where the goal lies. Logits are
searched by their bits: float32 has 32 of them, bfloat16 16, and equal ones are one place. What is equal at the bound is
counted chunk by chunk, and then within one chunk.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from MaxText.distill.vocabulary import Vocabulary

# Of logits, what each of them counts for.
Weight = Callable[[Float[Array, "n #V"]], Float[Array, "n #V"]]

_WAYS = 8  # parts that a visit makes of a bracket; so many sums cost what the logits cost to be read
_PARTS = 32  # of a vocabulary; the first level of counting
_CHUNK = 128  # tokens, the second level; the width of an accelerator's registers
TYPICAL_VISITS = 5  # of the vocabulary, until the bound is found


class _Bracket(NamedTuple):
    """Where the bound is: the tokens from `low` upwards reach the goal, those from `high` upwards do not."""

    low: UInt32[Array, "n 1"]
    high: UInt32[Array, "n 1"]
    above: Float[Array, "n 1"]  # what the tokens from `high` upwards weigh


def crossing(
    logits: Float[Array, "n V"], weight: Weight, goal: Float[Array, "n 1"], vocabulary: Vocabulary
) -> tuple[Float[Array, "n 1"], Float[Array, "n 1"]]:
    """The largest logit from which upwards the tokens weigh at least `goal`, and what those above it weigh.

    Args:
        logits: float32, or bfloat16, which has fewer values to search.
        weight: at least 0, and never more for a lower logit.
        goal: above 0, and no more than all tokens weigh together.
        vocabulary: how the last axis is laid out.
    """

    shift = 16 if logits.dtype == jnp.bfloat16 else 0

    def ends(_: Array, logits: Float[Array, "n #V"]) -> tuple[Array, Array]:
        return logits, jnp.where(logits > -jnp.inf, -logits, -jnp.inf)

    highest, negated_lowest = vocabulary.maxima(ends, logits)
    lowest = jnp.minimum(-negated_lowest, highest)  # of the finite ones

    def terms(keys: list[UInt32[Array, "n 1"]], _: Array, logits: Float[Array, "n #V"]) -> list[Array]:
        each = weight(logits)
        return [jnp.where(logits >= logit_of_key(key, shift), each, 0.0) for key in keys]

    def narrower(state: tuple[_Bracket, list[UInt32[Array, "n 1"]]]) -> tuple[_Bracket, list[UInt32[Array, "n 1"]]]:
        """The part of the bracket in which the bound is, of those that ascending keys make, and keys that part it."""
        bracket, keys = state
        for key, mass in zip(keys, vocabulary.sums(functools.partial(terms, keys), logits), strict=True):
            reaches = mass >= goal
            is_first_not_to = ~reaches & (key < bracket.high)
            bracket = _Bracket(
                low=jnp.where(reaches, jnp.maximum(bracket.low, key), bracket.low),
                high=jnp.where(is_first_not_to, key, bracket.high),
                above=jnp.where(is_first_not_to, mass, bracket.above),
            )
        width, rest = jnp.divmod(bracket.high - bracket.low, _WAYS)
        return bracket, [bracket.low + width * j + rest * j // _WAYS for j in range(1, _WAYS)]

    def is_wide(state: tuple[_Bracket, list[UInt32[Array, "n 1"]]]) -> Bool[Array, ""]:
        return jnp.any(state[0].high - state[0].low > 1)

    none = jnp.zeros_like(highest)
    whole = _Bracket(ordered_keys(none - jnp.inf, shift), ordered_keys(highest, shift) + 1, none)
    # By value first: most of the keys between two logits of either sign belong to logits next to 0.
    evenly = [lowest + (highest - lowest) * (j / (_WAYS - 1)) for j in range(_WAYS - 1)]
    start = whole, [ordered_keys(logit, shift) for logit in evenly]
    bracket, _ = jax.lax.while_loop(is_wide, narrower, start)
    return logit_of_key(bracket.low, shift), bracket.above


def most_visits(bits: int) -> int:
    """Of the vocabulary, until the bound of logits of so many bits is found: one by value, the others by bits."""
    return 1 + -(-bits // (_WAYS.bit_length() - 1))


def nth_equal(
    logits: Float[Array, "n V"], value: Float[Array, "n 1"], number: Float[Array, "n 1"], vocabulary: Vocabulary
) -> Int[Array, "n 1"]:
    """The token id of the `number`-th logit, from 1, that is equal to the value; of the last one, if they are fewer.

    Only a part of the logits is laid out anew, by chunks: on a TPU that of all of them would cost more than they do.
    """
    size = -(-logits.shape[-1] // (_PARTS * _CHUNK)) * _CHUNK
    parts = [logits[:, start : start + size] for start in range(0, logits.shape[-1], size)]
    counts = jnp.stack([jnp.sum(part == value, axis=-1, dtype=jnp.int32) for part in parts], axis=-1)
    shards = vocabulary.shards(jnp.sum(counts, axis=-1, keepdims=True))
    shard_ends = jnp.cumsum(shards, axis=-1)
    number = jnp.minimum(number, shard_ends[:, -1:]).astype(jnp.int32)
    shard = _first_reaching(shard_ends, number)
    place, number = _part_of(counts, number - vocabulary.own_shard(shard_ends - shards))
    # The last part begins early enough to be as long as the others; what it repeats is not looked at.
    start = jnp.minimum(place * size, max(0, logits.shape[-1] - size))
    length = min(size, logits.shape[-1])
    by_visit = functools.partial(part_by_visit, size, length)
    by_slice = functools.partial(part_by_slice, length)
    part = jax.lax.platform_dependent(logits, start, tpu=by_visit, default=by_slice)
    ids = start + jnp.arange(part.shape[-1], dtype=jnp.int32)
    is_equal = jnp.pad((part == value) & (ids >= place * size), ((0, 0), (0, -part.shape[-1] % _CHUNK)))
    chunks = is_equal.astype(jnp.int32).reshape(logits.shape[0], -1, _CHUNK)
    chunk, number = _part_of(jnp.sum(chunks, axis=-1), number)
    within, _ = _part_of(jnp.take_along_axis(chunks, chunk[..., None], axis=1)[:, 0], number)
    return vocabulary.of_shard(shard, vocabulary.first(logits) + start + chunk * _CHUNK + within)


def part_by_slice(length: int, logits: Float[Array, "n V"], start: Int[Array, "n 1"]) -> Float[Array, "n S"]:
    """So many of each position's logits, from `start` on."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=length)
    return jax.vmap(cut)(logits, start[:, 0])


def part_by_visit(size: int, length: int, logits: Float[Array, "n V"], start: Int[Array, "n 1"]) -> Float[Array, "n S"]:
    """The same for starts that are multiples of `size`, or that of the last part. A slice of each position is a loop
    over positions to TPUs, which takes some 35 times as long as this visit of all logits."""
    part = logits[:, :length]
    for multiple in range(size, logits.shape[-1], size):
        begin = min(multiple, logits.shape[-1] - length)
        part = jnp.where(start == begin, logits[:, begin : begin + length], part)
    return part


def _part_of(counts: Int[Array, "n P"], number: Int[Array, "n 1"]) -> tuple[Int[Array, "n 1"], Int[Array, "n 1"]]:
    """Of parts in a row that count so many each, the one that the number is in, and its number there."""
    ends = jnp.cumsum(counts, axis=-1)
    place = jnp.minimum(_first_reaching(ends, number), counts.shape[-1] - 1)
    return place, number - jnp.take_along_axis(ends - counts, place, axis=-1)


def _first_reaching(ends: Int[Array, "n P"], number: Int[Array, "n 1"]) -> Int[Array, "n 1"]:
    """Of parts in a row the first that ends at the number or beyond."""
    return jnp.sum(ends < number, axis=-1, keepdims=True, dtype=jnp.int32)


def ordered_keys(logits: Float[Array, "n V"], shift: int = 0) -> UInt32[Array, "n V"]:
    """Unsigned integers in the order of the logits, without the lowest `shift` bits. Signed ones would overflow when
    they are halved."""
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits) >> shift


def logit_of_key(keys: UInt32[Array, "n 1"], shift: int = 0) -> Float[Array, "n 1"]:
    """The logit that has this key, and no bits among the lowest `shift`."""
    sign = jnp.uint32(1 << 31)
    keys = keys << shift
    return jax.lax.bitcast_convert_type(jnp.where(keys >= sign, keys ^ sign, ~(keys | (1 << shift) - 1)), jnp.float32)
