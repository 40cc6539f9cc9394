"""A row as bytes, and back, to the bit.

A record is its CRC, a header, and sections of known lengths. docs/design/cache.md has the numbers behind the choices:

- A row's ids are numbered by how frequent they are in the row, and the ids of a position are stored as the gaps between
  these numbers. A row draws on few of the vocabulary's ids, and often on few of these.
- Counts add up to the draws, so a position's last is left out. Log-probabilities are stored from the lowest of their
  position upwards.
- Of targets, positions and segments only what is not foreseen is stored (frame.py).

Everything is an array operation over the whole row. A record says by itself how it is to be read.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from MaxText.cache import frame, quantiser
from MaxText.cache.integers import Integers, bit_lengths, deflate, inflate, pack, unpack
from MaxText.cache.row import TOKENS, Draws, Row, TopK, offsets_of

VERSION = 1
MODES = ("sample", "top_k")
# Of everything after it, the version first.
CRC = struct.Struct("<I")
# Version, mode, draws or k, sections.
HEADER = struct.Struct("<BBII")


class Damaged(ValueError):
    """A record that is not as it was written."""


# Encoding -----------------------------------------------------------------------------------------------------------


def encode(row: Row) -> bytes:
    """The record of a row; decode(encode(row)) has the same bits, but for log-probabilities: see quantiser.py."""
    tokens = {name: getattr(row, name) for name in TOKENS}
    sizes = np.diff(row.offsets)[row.counts_at]
    table, frequency, numbers = numbered(np.concatenate([frame.unsigned(row.inputs), frame.unsigned(row.ids)]))
    inputs, ids = np.split(numbers, [len(row.inputs)])
    parts = [
        frame.unforeseen(tokens),
        gaps(table, np.array([len(table)])),
        frequency,
        inputs,
        gaps(in_order(ids, sizes), sizes),
        *stored_teacher(row.teacher, sizes, row.counts_at),
    ]
    sections = [section for part in parts for section in pack(part)]
    for halves in (row.target_log_prob, row.entropy):
        planes = (
            halves[row.counts_at].view(np.uint8).reshape(-1, 2).T
        )  # sign and exponent apart from what has no pattern
        sections += [deflate(plane.tobytes()) for plane in planes]
    mode = MODES.index("sample" if isinstance(row.teacher, Draws) else "top_k")
    lengths = np.array([len(section) for section in sections], "<u4").tobytes()
    content = b"".join([HEADER.pack(VERSION, mode, row.teacher.number, len(sections)), lengths, *sections])
    return CRC.pack(zlib.crc32(content)) + content


def numbered(ids: Integers) -> tuple[Integers, Integers, Integers]:
    """Which ids there are, ascending; the bits of how often each is there; and each id's number by frequency."""
    table, place, occurrences = np.unique(ids, return_inverse=True, return_counts=True)
    frequency = bit_lengths(occurrences)
    number = np.empty(len(table), np.int64)
    number[by_frequency(frequency)] = np.arange(len(table))
    return table, frequency, number[place]


def by_frequency(frequency: Integers) -> Integers:
    """Places in the table: the frequent first, of equal ones the lower id."""
    return np.argsort(-frequency, kind="stable")


def gaps(ascending: Integers, sizes: Integers) -> Integers:
    """How many numbers are left out before each, in ascending lists after each other."""
    first = firsts(sizes)
    found = np.diff(ascending, prepend=0) - 1
    found[first] = ascending[first]
    return found


def stored_teacher(teacher: Draws | TopK, sizes: Integers, counted: NDArray[np.bool_]) -> list[Integers]:
    if isinstance(teacher, Draws):
        return [sizes, np.delete(teacher.counts.astype(np.int64), lasts(sizes)) - 1]
    codes = quantiser.codes(teacher.log_probs).astype(np.int64).reshape(len(sizes), teacher.number)
    lowest = codes.max(axis=1)
    tail = quantiser.codes(teacher.log_tail[counted]).astype(np.int64)
    return [(lowest[:, None] - codes).reshape(-1), lowest, tail]


def in_order(numbers: Integers, sizes: Integers) -> Integers:
    """Lists after each other, each sorted."""
    if len(sizes) and (sizes == sizes[0]).all():  # mode top_k: several times as fast
        return np.sort(numbers.reshape(len(sizes), sizes[0]), axis=1).reshape(-1)
    beyond = int(numbers.max(initial=0)) + 1
    at = np.repeat(np.arange(len(sizes)) * beyond, sizes)  # keeps the numbers of a list together
    kind = np.uint32 if len(sizes) * beyond <= 2**32 else np.int64  # the narrower are sorted in half the time
    return np.sort((at + numbers).astype(kind)).astype(np.int64) - at


def firsts(sizes: Integers) -> Integers:
    """Where each list begins, of lists after each other of which none is empty."""
    return np.cumsum(sizes) - sizes if sizes.sum() else sizes[:0]


def lasts(sizes: Integers) -> Integers:
    return np.cumsum(sizes) - 1


# Decoding -----------------------------------------------------------------------------------------------------------


def decode(record: bytes) -> Row:
    """The row of a record.

    Raises:
      Damaged: the record is not as it was written, or of another version.
    """
    mode, number, sections = opened(record)
    *packed, prob_low, prob_high, entropy_low, entropy_high = sections
    structure, table, frequency, inputs, ids, *teacher = unpack(list(zip(packed[0::2], packed[1::2], strict=True)))
    table = np.cumsum(table + 1) - 1
    by_number = table[by_frequency(frequency)]
    tokens = dict(zip(TOKENS, frame.restored(structure, by_number[inputs]), strict=True))
    counted = tokens["targets_segmentation"] != 0
    sizes = teacher[0] if mode == "sample" else np.full(counted.sum(), number)
    return Row(
        **tokens,
        offsets=offsets_of(counted, sizes),
        ids=frame.signed(in_order(by_number[ascending(ids, sizes)], sizes)),
        teacher=draws(teacher, number) if mode == "sample" else top_k(teacher, number, counted),
        target_log_prob=halves(prob_low, prob_high, counted),
        entropy=halves(entropy_low, entropy_high, counted),
    )


def opened(record: bytes) -> tuple[str, int, list[bytes]]:
    """A record's mode, its number and its sections."""
    start = CRC.size + HEADER.size
    if len(record) < start or CRC.unpack_from(record)[0] != zlib.crc32(memoryview(record)[CRC.size :]):
        raise Damaged("its bytes are not those that were written")
    version, mode, number, count = HEADER.unpack_from(record, CRC.size)
    if version != VERSION:
        raise Damaged(f"its format is version {version}, this program reads version {VERSION}")
    lengths = np.frombuffer(record, "<u4", count, start)
    ends = start + lengths.nbytes + np.cumsum(lengths, dtype=np.int64)
    sections = [record[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    return MODES[mode], number, sections


def ascending(gaps: Integers, sizes: Integers) -> Integers:
    """The lists that `gaps` were taken of."""
    found = np.cumsum(gaps + 1)
    first = firsts(sizes)
    before = found[first] - gaps[first] - 1
    return found - np.repeat(before, sizes) - 1 if len(found) else found


def draws(stored: list[Integers], number: int) -> Draws:
    sizes, counts = stored
    found = np.zeros(sizes.sum(), np.int64)
    last = lasts(sizes)
    others = np.ones(len(found), bool)
    others[last] = False
    found[others] = counts + 1
    before = np.concatenate([[0], np.cumsum(found)[last]])
    found[last] = number - np.diff(before)
    return Draws(found.astype(np.int32), number)


def top_k(stored: list[Integers], number: int, counted: NDArray[np.bool_]) -> TopK:
    above, lowest, of_tail = stored
    tail = np.zeros(len(counted), np.float32)
    tail[counted] = quantiser.log_probs(of_tail.astype(np.uint16))
    codes = np.repeat(lowest, number) - above
    return TopK(quantiser.log_probs(codes.astype(np.uint16)), tail, number)


def halves(low: bytes, high: bytes, counted: NDArray[np.bool_]) -> NDArray[np.float16]:
    planes = [np.frombuffer(inflate(plane), np.uint8) for plane in (low, high)]
    found = np.zeros(len(counted), np.float16)
    found[counted] = np.stack(planes, axis=1).reshape(-1).view("<f2")
    return found
