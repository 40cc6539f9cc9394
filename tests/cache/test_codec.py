"""A row as bytes: the same bits back, whatever the row; few bytes; and no flipped bit goes unseen."""

import time
import zlib

import numpy as np
import pytest
import teacher_rows

from MaxText.cache import codec, frame, integers, quantiser, row
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
    ids = generator.integers(0, 6, (25, 8))
    found = teacher_rows.drawn(generator, TOKENS["packed"], ids)
    for place, counts in enumerate(found.counts_at):
        part = slice(*found.offsets[place : place + 2])
        plain = np.unique(ids[place], return_counts=True) if counts else ([], [])
        np.testing.assert_array_equal(found.ids[part], plain[0])
        np.testing.assert_array_equal(found.teacher.counts[part], plain[1])


@pytest.mark.parametrize("ids", [[3, 2], [2, 2]])
def test_the_most_likely_ids_ascend(ids):
    with pytest.raises(ValueError, match="do not ascend"):
        row.of_top_k(TOKENS["one token"], np.array([ids]), np.zeros((1, 2)), *np.zeros((3, 1)))


def test_the_same_row_gives_the_same_bytes():
    rows = [teacher_rows.random_top_k(np.random.default_rng(5), TOKENS["packed"]) for _ in range(2)]
    assert codec.encode(rows[0]) == codec.encode(rows[1])


@pytest.mark.parametrize("make", [teacher_rows.random_draws, teacher_rows.random_top_k])
def test_no_flipped_bit_and_no_lost_byte_goes_unseen(make):
    record = codec.encode(make(np.random.default_rng(6), TOKENS["packed"], 2))
    for place in range(len(record)):
        for bit in (0, 3, 7):
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
    lists = [numbers[:0], numbers, numbers[:0], numbers[:7], numbers[:1], numbers[7:], numbers[:0]]
    for found, expected in zip(integers.unpack([integers.pack(each) for each in lists]), lists, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_is_foreseen_costs_nothing():
    """A document more is the length and the number of a segment; a token more is nothing."""

    def stored(*documents, **changed):
        return len(frame.unforeseen(teacher_rows.packed(GENERATOR, [*documents], padding=6) | changed))

    assert stored(9, 9, 9) == stored(9, 9) + 2 == stored(9) + 4
    assert stored(9, 9) == stored(90, 400)
    assert stored(9, inputs_position=np.arange(15)) == stored(90, inputs_position=np.arange(96)) < stored(9) + 20


# Bytes and time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, power, ids, budget", [(50, 2.05, 13.1, 32), (24, 2.15, 7.7, 20)])
def test_draws_take_no_more_bytes_a_token_than_promised(number, power, ids, budget):
    drawn = teacher_rows.zipf_draws(np.random.default_rng(7), 1024, number, power)
    size, mean = len(codec.encode(drawn)) / 1024, len(drawn.ids) / 1024
    print(f"{number} draws: {mean:.1f} ids and {size:.1f} bytes a token")
    assert mean >= ids
    assert size <= budget


def test_64_log_probabilities_take_no_more_bytes_a_token_than_promised():
    size = len(codec.encode(teacher_rows.zipf_top_k(np.random.default_rng(8), 1024, 64))) / 1024
    print(f"top-k 64: {size:.1f} bytes a token")
    assert size <= 160


def test_decoding_is_faster_than_a_step():
    """200,000 tokens a second and core, counted in the process's own time: the machine has others."""
    record = codec.encode(teacher_rows.zipf_draws(np.random.default_rng(9), 1024, 50, 2.05))
    seconds = []
    for _ in range(10):
        start = time.process_time()
        row.to_batch_arrays(codec.decode(record), 50, teacher_rows.VOCABULARY)
        seconds.append(time.process_time() - start)
    print(f"{1024 / min(seconds):,.0f} tokens a second")
    assert 1024 / min(seconds) > 200_000


# Log-probabilities --------------------------------------------------------------------------------------------------


def test_a_log_probability_is_stored_to_the_stated_bound():
    values = -np.random.default_rng(10).exponential(20, 10_000).astype(np.float32)
    values = np.append(values[values > quantiser.LOWEST], np.float32([0, quantiser.LOWEST]))
    assert np.abs(quantiser.rounded(values).astype(np.float64) - values).max() <= quantiser.BOUND < 0.004


def test_what_is_stored_once_is_stored_again_as_it_is():
    codes = np.arange(2**16, dtype=np.uint16)
    np.testing.assert_array_equal(quantiser.codes(quantiser.log_probs(codes)), codes)


def test_what_float32_gives_no_probability_is_nothing():
    values = np.float32([-np.inf, -1e30, quantiser.LOWEST - 1])
    np.testing.assert_array_equal(quantiser.rounded(values), np.float32([-np.inf] * 3))
    assert np.exp(np.float32(quantiser.LOWEST)) == 0


def test_what_is_rounded_to_more_than_one_is_one():
    assert quantiser.rounded(np.float32([1e-6, 2 * quantiser.STEP])).tolist() == [0, 0]


@pytest.mark.parametrize("place", ["log_probs", "log_tail", "target_log_prob", "entropy"])
def test_what_is_no_number_is_not_stored(place):
    tokens, numbers = TOKENS["one document"], dict.fromkeys(("log_tail", "target_log_prob", "entropy"), np.zeros(64))
    arrays = numbers | {"log_probs": np.zeros((64, 1))}
    arrays[place] = np.full_like(arrays[place], np.nan)
    with pytest.raises(RunError, match="not numbers"):
        row.of_top_k(tokens, np.zeros((64, 1), int), **arrays)


# What a batch has ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [teacher_rows.random_draws, teacher_rows.random_top_k])
def test_a_batch_has_each_position_s_targets_and_nothing_in_other_slots(make):
    stored = make(np.random.default_rng(11), TOKENS["a prompt"], 8, 12)
    arrays = row.to_batch_arrays(stored, 8, 12)
    for place in range(24):
        part = slice(*stored.offsets[place : place + 2])
        used = stored.offsets[place + 1] - stored.offsets[place]
        assert arrays["teacher_ids"][place].tolist() == [*stored.ids[part].tolist(), *[12] * (8 - used)]
        weights = np.append(stored.weights[part], np.zeros(8 - used))
        np.testing.assert_allclose(np.exp(arrays["teacher_log_weights"][place]), weights, rtol=1e-6)
    for name in ("teacher_target_log_prob", "teacher_entropy"):
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name] != 0, stored.counts_at)
    if isinstance(stored.teacher, row.TopK):
        np.testing.assert_array_equal(arrays["teacher_log_tail"] > -np.inf, stored.counts_at)
    for name in row.TOKENS:
        np.testing.assert_array_equal(arrays[name], TOKENS["a prompt"][name])


def test_the_weights_of_a_position_add_up_to_one():
    drawn = row.to_batch_arrays(teacher_rows.random_draws(GENERATOR, TOKENS["one document"], 50, 60), 50, 60)
    np.testing.assert_allclose(np.exp(drawn["teacher_log_weights"]).sum(axis=1), 1, rtol=1e-6)
    likely = row.to_batch_arrays(teacher_rows.random_top_k(GENERATOR, TOKENS["one document"], 50, 60), 50, 60)
    total = np.exp(likely["teacher_log_weights"]).sum(axis=1) + np.exp(likely["teacher_log_tail"])
    np.testing.assert_allclose(total, 1, atol=quantiser.BOUND)


def test_fewer_slots_than_stored_keep_the_most_likely_and_put_the_others_in_the_tail():
    stored = teacher_rows.random_top_k(np.random.default_rng(12), TOKENS["packed"], 16, 40)
    whole, part = (row.to_batch_arrays(stored, slots, 40) for slots in (16, 5))
    for place in np.flatnonzero(stored.counts_at):
        log_probs = whole["teacher_log_weights"][place]
        kept = np.sort(np.lexsort((np.arange(16), -log_probs))[:5])
        np.testing.assert_array_equal(part["teacher_ids"][place], whole["teacher_ids"][place][kept])
        np.testing.assert_array_equal(part["teacher_log_weights"][place], log_probs[kept])
        outside = np.exp(np.append(np.delete(log_probs, kept), whole["teacher_log_tail"][place])).sum()
        np.testing.assert_allclose(np.exp(part["teacher_log_tail"][place]), outside, rtol=1e-5)


def test_of_equally_likely_ids_the_lower_are_kept():
    tokens = TOKENS["one token"]
    equal = np.log(np.full((1, 4), 0.25))
    stored = row.of_top_k(tokens, np.array([[2, 3, 5, 7]]), equal, np.array([-np.inf]), np.zeros(1), np.zeros(1))
    assert row.to_batch_arrays(stored, 3, 9)["teacher_ids"].tolist() == [[2, 3, 5]]


def test_draws_that_do_not_fit_are_not_left_out():
    with pytest.raises(ValueError, match="8 ids at a position, and 7 slots"):
        row.to_batch_arrays(teacher_rows.random_draws(np.random.default_rng(13), TOKENS["one document"]), 7, 9)
