"""Whole numbers in few bits, when small ones are frequent: how many bits a number has, and the bits.

The number of bits is a byte per number, deflated: it has some twenty values, of very different frequency. The bits
below the highest follow each other without gaps, for they are close to evenly distributed and nothing would shorten
them. Together that is within a few percent of the entropy of gaps between ids. Both ways are array operations over all
numbers at once. Left out on purpose: arithmetic coding, whose decoder is a loop over numbers.
"""

import itertools
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

# Bytes after the last, so that a number's bits can be read as part of a word of 8 bytes.
MARGIN = 8

# Of a number of 0 to 32 bits, how many are stored, what they may be, and the highest one, which is not stored.
WIDTHS = np.maximum(np.arange(33), 1) - 1
LOW = (1 << WIDTHS).astype(np.uint64) - np.uint64(1)
HIGHEST = np.where(np.arange(33) > 0, 1 << WIDTHS, 0).astype(np.uint64)


def pack(numbers: Integers) -> tuple[bytes, bytes]:
    """Numbers of 0 to 2^32 - 1 -> their sizes in bits, deflated, and the bits below the highest."""
    sizes = bit_lengths(numbers)
    widths = np.maximum(sizes, 1) - 1
    starts = np.cumsum(widths) - widths
    total = int(widths.sum())
    # A number's bits lie in a word of 32 bits and the next. No two numbers share one, so their sum is all of them, and
    # exact in the float64 that bincount adds in.
    bits = (numbers & (1 << widths) - 1) << (starts & 31)
    words = np.bincount(starts >> 5, bits & 2**32 - 1, total // 32 + 2)
    words += np.bincount((starts >> 5) + 1, bits >> 32, total // 32 + 2)[: len(words)]
    return deflate(sizes.astype(np.uint8).tobytes()), words.astype("<u4").tobytes()[: -(-total // 8)]


def unpack(packed: Sequence[tuple[bytes, bytes]]) -> list[Integers]:
    """The lists of numbers that `pack` made these of; all at once, for a short list takes as long as a long one."""
    sizes = [inflate(each) for each, _ in packed]
    lengths = np.frombuffer(b"".join(sizes), np.uint8)
    buffer = b"".join([bits for _, bits in packed]) + bytes(MARGIN)
    widths = WIDTHS[lengths]
    starts = np.cumsum(widths) - widths
    ends = list(itertools.accumulate(map(len, sizes), initial=0))
    at = 0  # the byte at which a list begins
    for first, last, (_, bits) in zip(ends, ends[1:], packed, strict=False):
        if first < last:
            starts[first:last] += 8 * at - starts[first]
        at += len(bits)
    words = np.ndarray((at + 1,), "<u8", buffer, strides=(1,))  # the word that begins at each byte
    found = words[starts >> 3] >> (starts & 7).view(np.uint64)
    found &= LOW[lengths]
    found |= HIGHEST[lengths]
    return [found[first:last].view(np.int64) for first, last in itertools.pairwise(ends)]


def bit_lengths(numbers: Integers) -> Integers:
    """How many bits each number has; 0 has none."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)


def deflate(content: bytes) -> bytes:
    """Deflates what has frequencies and runs, but no repeated strings: a search for those costs time and finds none."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return packer.compress(content) + packer.flush()


def inflate(content: bytes) -> bytes:
    return zlib.decompress(content, -zlib.MAX_WBITS)
