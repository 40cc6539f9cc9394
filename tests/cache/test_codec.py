"""A row as bytes: the same bits back, whatever the row; few bytes; and no flipped bit goes unseen."""

import time
import zlib

import numpy as np
import pytest
import teacher_rows

from MaxText.cache import codec, integers, quantiser, row
from MaxText.console import RunError

GENERATOR = np.random.default_rng(0)


def masked(tokens, counts):
    return tokens | {"targets_segmentation": np.where(counts, tokens["inputs_segmentation"], 0)}


def edges(vocabulary):
    """A row whose ids, inputs and targets are the first and the last token alone."""
    return teacher_rows.packed(GENERATOR, [16]) | {"inputs": np.tile([0, vocabulary - 1], 8)}


def prompt(tokens):
    """Training on completions alone: targets of the prompt are padding, and do not count."""
    counts = np.arange(len(tokens["inputs"])) >= 9
    return masked(tokens, counts) | {"targets": np.where(counts, tokens["targets"], 0)}


TOKENS = {
    "packed": teacher_rows.packed(GENERATOR, [7, 1, 12], padding=5),
    "one document": teacher_rows.packed(GENERATOR, [64]),
    "one token": teacher_rows.packed(GENERATOR, [1]),
    "no token": teacher_rows.packed(GENERATOR, []),
    "padding alone": teacher_rows.packed(GENERATOR, [], padding=9),
    "nothing counts": masked(teacher_rows.packed(GENERATOR, [9]), np.zeros(9, bool)),
    "a prompt": prompt(teacher_rows.packed(GENERATOR, [20], padding=4)),
    "every other counts": masked(teacher_rows.packed(GENERATOR, [20]), np.arange(20) % 2),
    "padding counts on": teacher_rows.packed(GENERATOR, [9], padding=9) | {"inputs_position": np.arange(18)},
    "first and last token": edges(teacher_rows.VOCABULARY),
    "anything": teacher_rows.scattered(GENERATOR, 50),
}
CASES = pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)


@CASES
@pytest.mark.parametrize("make", [teacher_rows.random_draws, teacher_rows.random_top_k])
@pytest.mark.parametrize("number", [1, 8])
def test_a_row_comes_back_to_the_bit(tokens, make, number):
    expected = make(np.random.default_rng(1), tokens, number)
    teacher_rows.assert_same(codec.decode(codec.encode(expected)), expected)


@pytest.mark.parametrize("tokens", [TOKENS["packed"], TOKENS["first and last token"]])
@pytest.mark.parametrize("vocabulary", [1, 2, 2**31])
def test_any_vocabulary_will_do(tokens, vocabulary):
    expected = teacher_rows.random_draws(np.random.default_rng(2), tokens, vocabulary=vocabulary)
    teacher_rows.assert_same(codec.decode(codec.encode(expected)), expected)


def test_all_draws_may_fall_on_one_id():
    tokens = TOKENS["packed"]
    expected = teacher_rows.drawn(np.random.default_rng(3), tokens, np.full((25, 50), 5))
    assert set(expected.teacher.counts) == {50}
    teacher_rows.assert_same(codec.decode(codec.encode(expected)), expected)


def test_counts_are_those_of_a_plain_count():
    generator = np.random.default_rng(4)
    ids = np.sort(generator.integers(0, 6, (25, 8)), axis=1)
    found = teacher_rows.drawn(generator, TOKENS["packed"], ids)
    for place, counts in enumerate(found.counts_at):
        part = slice(*found.offsets[place : place + 2])
        plain = np.unique(ids[place], return_counts=True) if counts else ([], [])
        np.testing.assert_array_equal(found.ids[part], plain[0])
        np.testing.assert_array_equal(found.teacher.counts[part], plain[1])


def test_the_same_row_gives_the_same_bytes():
    rows = [teacher_rows.random_top_k(np.random.default_rng(5), TOKENS["packed"]) for _ in range(2)]
    assert codec.encode(rows[0]) == codec.encode(rows[1])


@pytest.mark.parametrize("make", [teacher_rows.random_draws, teacher_rows.random_top_k])
def test_no_flipped_bit_and_no_lost_byte_goes_unseen(make):
    record = codec.encode(make(np.random.default_rng(6), TOKENS["packed"], 2))
    for place in range(len(record)):
        for bit in range(8):
            flipped = bytearray(record)
            flipped[place] ^= 1 << bit
            with pytest.raises(codec.Damaged, match="not those that were written"):
                codec.decode(bytes(flipped))
        with pytest.raises(codec.Damaged):
            codec.decode(record[:place])
    with pytest.raises(codec.Damaged):
        codec.decode(record + b"\0")


def test_a_record_of_another_version_is_refused_by_both_numbers():
    content = bytearray(codec.encode(teacher_rows.random_draws(GENERATOR, TOKENS["packed"]))[codec.CRC.size :])
    content[0] += 1
    with pytest.raises(codec.Damaged, match="version 2, this program reads version 1"):
        codec.decode(codec.CRC.pack(zlib.crc32(content)) + content)


def test_a_whole_number_comes_back_whatever_its_size():
    numbers = np.concatenate([[0, 1, 2**32 - 1], 2 ** GENERATOR.integers(0, 32, 500) - GENERATOR.integers(0, 2, 500)])
    np.testing.assert_array_equal(integers.unpack(*integers.pack(numbers)), numbers)
    assert integers.unpack(*integers.pack(numbers[:0])).tolist() == []


# Bytes and time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, ids, budget", [(50, 13.1, 32), (24, 7.7, 20)])
def test_draws_take_no_more_bytes_a_token_than_promised(number, ids, budget):
    generator = np.random.default_rng(7)
    drawn = teacher_rows.zipf_draws(generator, 2048, number, peak=1.0)
    size, mean = len(codec.encode(drawn)) / 2048, len(drawn.ids) / 2048
    print(f"{number} draws: {mean:.1f} ids and {size:.1f} bytes a token")
    assert mean > ids
    assert size <= budget
