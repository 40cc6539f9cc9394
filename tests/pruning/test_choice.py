"""Laws of what is kept, by numbers alone."""

import itertools

import numpy as np
import pytest

from MaxText.pruning import choice
from MaxText.pruning.choice import Kept, Scored
from MaxText.pruning.structure import CYCLES, Structure

SIZES = {"layers": 3, "emb": 5, "heads": 4, "kv_heads": 2, "mlp": 7, "experts": 2, "group": 3}


def scored(seed: int) -> Scored:
    draw = np.random.default_rng(seed).standard_normal
    modules = [(layer, "self_attention") for layer in range(4)]
    return Scored(draw(4), draw(8), *({module: draw(size) for module in modules} for size in (12, 10, 4)))


@pytest.mark.parametrize("name", choice.WAYS)
@pytest.mark.parametrize(("total", "number"), [(1, 1), (7, 1), (7, 2), (7, 5), (30, 12), (30, 29), (30, 30)])
def test_any_way_keeps_so_many_each_once_and_in_their_order(name, total, number):
    kept = choice.WAYS[name](np.random.default_rng(0).standard_normal(total), number)
    assert len(kept) == number and kept == sorted(set(kept)) and set(kept) <= set(range(total))


def test_evenly_spaced_has_both_ends_and_gaps_that_differ_by_one():
    kept = choice.uniform(np.zeros(30), 12)
    assert (kept[0], kept[-1]) == (0, 29) and set(np.diff(kept)) == {2, 3}


def test_the_best_are_those_of_the_largest_scores_and_of_equal_ones_the_first():
    assert choice.best(np.array([1.0, 3.0, 2.0, 3.0, 1.0]), 3) == [1, 2, 3]
    assert choice.best(np.zeros(5), 3) == [0, 1, 2]


@pytest.mark.parametrize("way", [choice.best, choice.first, choice.uniform])
def test_query_heads_go_with_their_keys_as_many_for_each(way):
    kept = choice.choose(scored(0), way, [False] * 4, [False] * 3, SIZES)
    assert kept.heads.keys() == kept.kv_heads.keys() == {(layer, "self_attention") for layer in kept.layers}
    for module, heads in kept.heads.items():
        assert heads == sorted(set(heads)) and len(heads) == 4
        assert [head // 3 for head in heads] == np.repeat(kept.kv_heads[module], 2).tolist()


def test_groups_are_kept_by_what_all_their_heads_are_worth():
    attention = (0, "self_attention")
    parts = Scored(np.zeros(1), np.zeros(1), {attention: np.array([9.0, 0, 0, 4, 4, 4, 3, 3, 4])}, {}, {})
    kept = choice.choose(parts, choice.best, [False], [False], SIZES | {"emb": 1})
    assert (kept.kv_heads[attention], kept.heads[attention]) == ([1, 2], [3, 4, 6, 8])


@pytest.mark.parametrize("seed", range(5))
def test_layers_of_two_kinds_are_the_best_of_all_that_are_legal(seed):
    whole, part = (Structure("gemma3", layers, 1).kinds for layers in (14, 8))
    scores = np.random.default_rng(seed).standard_normal(14)
    legal = [kept for kept in itertools.combinations(range(14), 8) if [whole[layer] for layer in kept] == part]
    assert len(legal) == 273
    best = max(legal, key=lambda kept: scores[list(kept)].sum())
    assert tuple(choice.layers(scores, choice.best, whole, part)) == best


@pytest.mark.parametrize("way", [choice.first, choice.uniform])
def test_layers_of_two_kinds_are_near_to_what_the_way_would_take(way):
    whole, part = (Structure("gemma3", layers, 1).kinds for layers in (24, 12))
    kept = choice.layers(np.zeros(24), way, whole, part)
    assert [whole[layer] for layer in kept] == part and kept == sorted(set(kept))
    assert max(abs(np.array(kept) - way(np.zeros(24), 12))) <= 2 * CYCLES["gemma3"] * (way is choice.uniform)


def test_what_is_kept_is_the_same_after_it_was_written_and_read():
    kept = choice.choose(scored(1), choice.best, [False] * 4, [False] * 3, SIZES)
    assert Kept.from_json(kept.to_json()) == kept
