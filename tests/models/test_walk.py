"""Laws of the planner: a block stays under its ceiling, is never starved, and little is walked over in vain."""

import itertools

import pytest

from MaxText.chips import CHIPS
from MaxText.models.walk import MIB, Heads, balanced, plan

V5E = CHIPS["TPU v5 lite"]
# Vocabulary, student's and teacher's width; bytes of three arrays of logits.
FLAGSHIP = Heads(151936, 1024, 2560, 6)
HEADS = (FLAGSHIP, Heads(128256, 2048, 4096, 6), Heads(32768, 512, 0, 12), Heads(262144, 0, 2560, 6))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("chip", [*CHIPS.values(), None], ids=lambda chip: chip.name if chip else "unknown")
def test_a_block_holds_no_more_than_its_ceiling(heads, chip):
    for tokens, pool, mib in itertools.product((100, 8192, 10_240), (1, 16), (64, 256, 4096)):
        walk = plan(heads, tokens, pool, chip, mib * MIB)
        assert walk.block <= 8 or walk.block * heads.vocabulary * heads.logit_bytes <= mib * MIB
        assert walk.block <= tokens and (walk.rounds - 1) * walk.block < tokens <= walk.rounds * walk.block


@pytest.mark.parametrize("most", [8, 100, 128, 589, 1178, 2356])
def test_the_last_block_is_nearly_full(most):
    for tokens in (1024, 4096, 8192, 9216, 10_240, 131_072):
        block = balanced(tokens, most)
        assert block <= most and -(-tokens // block) * block <= 1.07 * tokens


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_block_is_so_large_that_products_take_longer_than_the_traffic_of_the_heads(heads, chip):
    walk = plan(heads, 8192, 1, chip, 0)
    assert walk.rounds * heads.vocabulary * heads.bytes_per_block / chip.bandwidth < 0.6 * walk.flops / chip.flops


def test_a_larger_ceiling_than_a_chip_needs_makes_no_larger_block():
    wide, wider = (plan(FLAGSHIP, 131_072, 1, V5E, mib * MIB).block for mib in (8192, 16_384))
    assert wide == wider < 131_072


def test_flops_are_those_of_both_projections_and_the_gradients():
    for pool in (1, 16):
        assert plan(FLAGSHIP, 8192, pool, V5E, 0).flops == 2 * 8192 * 151936 * (3 * 1024 + 2560)


@pytest.mark.parametrize("chip", [V5E, None], ids=["v5e", "unknown"])
def test_few_tokens_are_gathered_and_many_are_not(chip):
    assert plan(FLAGSHIP, 1024, 16, chip, 0).pool == 16
    assert plan(FLAGSHIP, 8192, 256, chip, 0).pool == 1


def test_a_row_more_on_each_chip_does_not_turn_the_flagship_to_gathered_heads():
    walks = [plan(FLAGSHIP, rows * 2048, 16, V5E, 0) for rows in (4, 5)]
    assert [walk.pool for walk in walks] == [16, 16]
    assert walks[1].seconds(V5E) < 1.3 * walks[0].seconds(V5E)
