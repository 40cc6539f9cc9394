"""The arrays of a row beside its inputs, as what of them is not foreseen.

Targets are the inputs a place further, positions count up within a segment, targets have the segments of their inputs.
Where that holds nothing is stored but that it does; where it does not, the values are, so that any arrays come back.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from MaxText.cache.integers import Integers

WORD = 2**32  # numbers here are those of int32 modulo this, as unsigned ones

Tokens = dict[str, NDArray[np.int32]]


def unforeseen(tokens: Tokens) -> Integers:
    """All of a row's arrays but its inputs."""
    inputs, targets, at_input, at_target, segments, of_targets = (unsigned(array) for array in tokens.values())
    pairs = [
        (segments, np.zeros_like(segments)),
        (of_targets, segments),
        (steps(at_input), steps(counting_up(segments))),
        (at_target, at_input),
        (targets, one_further(inputs)),
    ]
    return np.concatenate([exceptions(array, foreseen) for array, foreseen in pairs])


def restored(numbers: Integers, inputs: Integers) -> list[NDArray[np.int32]]:
    """The row's arrays, in the order of `unforeseen`'s."""
    stored = Stored(numbers)
    segments = stored.array(np.zeros_like(inputs))
    of_targets = stored.array(segments)
    at_input = np.cumsum(stored.array(steps(counting_up(segments)))) % WORD
    at_target = stored.array(at_input)
    targets = stored.array(one_further(inputs))
    return [signed(array) for array in (inputs, targets, at_input, at_target, segments, of_targets)]


class Stored:
    """Arrays, one after the other, as the exceptions from what is foreseen."""

    def __init__(self, numbers: Integers):
        self.numbers = numbers
        self.place = 0

    def take(self, count: int) -> Integers:
        self.place += count
        return self.numbers[self.place - count : self.place]

    def repeated(self) -> Integers:
        count = int(self.take(1)[0])
        lengths, values = self.take(count), self.take(count)
        return np.repeat(values, lengths)

    def array(self, foreseen: Integers) -> Integers:
        if self.numbers[self.place] == 1 and self.numbers[self.place + 2] == 0:  # all is as it is foreseen
            self.take(4)
            return foreseen
        differs = self.repeated().astype(bool)
        found = foreseen.copy()
        found[differs] = self.repeated()
        return found


def exceptions(array: Integers, foreseen: Integers) -> Integers:
    differs = array != foreseen
    return np.concatenate([runs(differs), runs(array[differs])])


def runs(values: NDArray[Any]) -> Integers:
    """Equal values after each other: how many runs, their lengths, their values."""
    begins = np.flatnonzero(np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]]))
    lengths = np.diff(begins, append=len(values))
    return np.concatenate([[len(begins)], lengths, values[begins]]).astype(np.int64)


def one_further(inputs: Integers) -> Integers:
    return np.concatenate([inputs[1:], np.zeros(min(1, len(inputs)), np.int64)])


def counting_up(segments: Integers) -> Integers:
    """Positions from 0 within each segment; 0 where there is none."""
    places = np.arange(len(segments))
    begins = np.concatenate([np.ones(min(1, len(segments)), bool), segments[1:] != segments[:-1]])
    start = np.maximum.accumulate(np.where(begins, places, 0))
    return np.where(segments != 0, places - start, 0)


def steps(array: Integers) -> Integers:
    """From each place to the next: padding that counts up, and padding that does not, are both one run of these."""
    return np.diff(array, prepend=0) % WORD


def unsigned(array: NDArray[np.int32]) -> Integers:
    return array.astype(np.int64) % WORD


def signed(array: Integers) -> NDArray[np.int32]:
    return array.astype(np.uint32).view(np.int32)
