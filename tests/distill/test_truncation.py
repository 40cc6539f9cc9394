"""The laws of the teacher's kept set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from MaxText.distill import search, vocabulary
from MaxText.distill.truncation import counted_bound, kept_bound, kept_set, selected_bound
from MaxText.distill.vocabulary import Vocabulary

TEMPERATURES = (0.5, 1.0, 2.0, 3.0)


WAYS = (selected_bound, counted_bound)  # of a CPU, of accelerators


@functools.partial(jax.jit, static_argnames=("way", "top_k", "top_p"))
def kept_by_bound(logits, temperature, *, way=kept_bound, top_k=0, top_p=0.0):
    bound = way(logits, temperature=temperature, top_k=top_k, top_p=top_p, vocabulary=Vocabulary())
    return bound.keeps(logits, Vocabulary().ids(logits))


@pytest.mark.parametrize("top_k", range(1, 25))
def test_top_k_keeps_the_k_largest_logits(top_k):
    _, teacher = reference.logits_of_every_scale(top_k, 200, 24)
    kept = kept_set(jnp.asarray(teacher), temperature=1.0, top_k=top_k, top_p=0.0)
    if top_k == 24:
        assert kept is None
    else:
        np.testing.assert_array_equal(kept, reference.kept_set(teacher, temperature=1.0, top_k=top_k))


@pytest.mark.parametrize("top_p", (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999))
def test_top_p_keeps_the_shortest_prefix_that_reaches_the_mass(top_p):
    _, teacher = reference.logits_of_every_scale(7, 1000, 24)
    for temperature in TEMPERATURES:
        kept = np.asarray(kept_set(jnp.asarray(teacher), temperature=temperature, top_k=0, top_p=top_p))
        assert reference.is_nucleus(kept, teacher, temperature=temperature, top_p=top_p).all()


def test_top_p_is_right_over_a_large_vocabulary():
    _, teacher = reference.logits_of_every_scale(8, 16, 50_000, largest=30.0)
    for top_p in (0.3, 0.95, 0.999):
        kept = np.asarray(kept_set(jnp.asarray(teacher), temperature=1.0, top_k=0, top_p=top_p))
        assert reference.is_nucleus(kept, teacher, temperature=1.0, top_p=top_p).all()


def test_the_token_that_crosses_is_kept():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.125, 0.125]))
    assert kept_set(logits, temperature=1.0, top_k=0, top_p=0.5).tolist() == [True, False, False, False]
    assert kept_set(logits, temperature=1.0, top_k=0, top_p=0.51).tolist() == [True, True, False, False]


def test_ties_go_to_the_lower_token_id():
    logits = jnp.asarray([1.0, 3.0, 2.0, 2.0, -0.0, 2.0, 0.0])
    assert np.flatnonzero(kept_set(logits, temperature=1.0, top_k=2, top_p=0.0)).tolist() == [1, 2]
    assert np.flatnonzero(kept_set(logits, temperature=1.0, top_k=3, top_p=0.0)).tolist() == [1, 2, 3]
    assert np.flatnonzero(kept_set(logits, temperature=1.0, top_k=6, top_p=0.0)).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.flatnonzero(kept_set(jnp.zeros(8), temperature=1.0, top_k=0, top_p=0.5)).tolist() == [0, 1, 2, 3]


def test_logits_that_soften_to_equal_probabilities_keep_their_order():
    # Both logits of the pair lie 20 below the largest, where float32 cannot tell them apart any more.
    logits = jnp.asarray([20.0, 1.0e-7, 2.0e-7], jnp.float32)
    assert jnp.unique(jnp.exp(logits - 20.0)).size == 2
    assert kept_set(logits, temperature=1.0, top_k=2, top_p=0.0).tolist() == [True, False, True]


def test_bfloat16_logits_are_ordered_as_their_float32_values():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 300)), jnp.bfloat16)
    widened = np.asarray(logits.astype(jnp.float32))
    for keep in ({"top_k": 40, "top_p": 0.0}, {"top_k": 0, "top_p": 0.6}):
        kept = np.asarray(kept_set(logits, temperature=2.0, **keep))
        np.testing.assert_array_equal(kept, reference.kept_set(widened, temperature=2.0, **keep))


def test_tokens_that_the_teacher_does_not_have_are_kept_last():
    logits = jnp.asarray([-jnp.inf, 1.0, -jnp.inf, 2.0, -jnp.inf, 0.0])
    assert np.flatnonzero(kept_set(logits, temperature=1.0, top_k=2, top_p=0.0)).tolist() == [1, 3]
    assert np.flatnonzero(kept_set(logits, temperature=1.0, top_k=4, top_p=0.0)).tolist() == [0, 1, 3, 5]
    for top_p in (0.999, float(np.nextafter(1.0, 0.0))):
        assert np.flatnonzero(kept_set(logits, temperature=1.0, top_k=0, top_p=top_p)).tolist() == [1, 3, 5]


def test_nothing_is_truncated_where_both_are_off_or_keep_all():
    logits = jnp.asarray([-jnp.inf, 1.0, 2.0])
    for top_k, top_p in ((0, 0.0), (0, 1.0), (3, 0.0)):
        assert kept_set(logits, temperature=1.0, top_k=top_k, top_p=top_p) is None


def logits_with_ties(positions, vocabulary):
    """From all equal to all different, some of them -inf."""
    rng = np.random.default_rng(9)
    levels = 2.0 ** np.linspace(0, 12, positions)[:, None]
    logits = np.round(rng.standard_normal((positions, vocabulary)) * levels) / levels + 0.0
    return np.where(rng.uniform(size=logits.shape) < 0.1, -np.inf, logits).astype(np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_k", (1, 2, 30, 700, 1999))
def test_the_bound_of_top_k_is_the_kept_set(top_k, way):
    _, teacher = reference.logits_of_every_scale(10, 40, 2000)
    for logits in (teacher, logits_with_ties(40, 2000), -np.ones((40, 2000), np.float32)):
        kept = kept_by_bound(logits, 1.0, way=way, top_k=top_k)
        np.testing.assert_array_equal(kept, reference.kept_set(logits, temperature=1.0, top_k=top_k))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_p", (0.01, 0.3, 0.9, 0.999))
def test_the_bound_of_top_p_is_the_kept_set(top_p, way, monkeypatch):
    # Five chunks, the first one shorter: what a large vocabulary gets.
    monkeypatch.setattr(vocabulary, "CHUNK_VALUES", 40 * 400)
    _, teacher = reference.logits_of_every_scale(11, 40, 1900)
    for logits in (teacher, logits_with_ties(40, 1900)):
        for temperature in TEMPERATURES:
            kept = np.asarray(kept_by_bound(logits, temperature, way=way, top_p=top_p))
            assert reference.is_nucleus(kept, logits, temperature=temperature, top_p=top_p).all()
            assert not kept[np.isinf(logits)].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", (1e-6, 1.0, 1e3))
@pytest.mark.parametrize("scale", (1e-30, 1e-3, 1.0, 1e4))
def test_the_bound_of_top_p_is_right_where_float32_ends(scale, temperature, way):
    rng = np.random.default_rng(12)
    alike, ties = np.full((1, 3000), scale), scale * rng.integers(0, 2, (1, 3000))
    nearly_alike = scale * (1 + 1e-6 * rng.standard_normal((1, 3000)))
    logits = np.concatenate([alike, -alike, ties, -ties + 0.0, nearly_alike]).astype(np.float32)
    for top_p in (1e-9, 0.5, 0.9, float(np.nextafter(1.0, 0.0))):
        kept = np.asarray(kept_by_bound(logits, temperature, way=way, top_p=top_p))
        assert reference.is_nucleus(kept, logits, temperature=temperature, top_p=top_p).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_nucleus_that_ends_among_ties_keeps_those_of_the_lowest_ids(way):
    # 599 equal tokens of mass 1 / 600 beside one of mass 1: 0.7501 of the whole needs the first 300 of them.
    logits = np.full((2, 1000), -np.inf, np.float32)
    logits[:, 1:1000:2] = -np.log(600.0)
    logits[:, 0:200:2] = -np.log(600.0)
    logits[:, 999] = 0.0
    kept = np.asarray(kept_by_bound(logits, 1.0, way=way, top_p=0.7501))
    tied = np.flatnonzero(logits[0] == logits[0, 0])
    assert np.flatnonzero(kept[0]).tolist() == [*tied[:300], 999]
    np.testing.assert_array_equal(kept[1], kept[0])


def test_the_key_of_a_logit_keeps_order_and_value():
    logits = jnp.asarray([-jnp.inf, -3e38, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1.0000001, 3e38, jnp.inf], jnp.float32)
    keys = search.ordered_keys(logits)
    assert (keys[1:] > keys[:-1]).all()
    np.testing.assert_array_equal(search.logit_of_key(keys), logits)


@pytest.mark.parametrize("way", WAYS)
def test_the_bound_of_bfloat16_logits_is_that_of_their_float32_values(way):
    _, teacher = reference.logits_of_every_scale(13, 40, 2000)
    logits = jnp.asarray(np.concatenate([teacher, logits_with_ties(40, 2000)]), jnp.bfloat16)
    widened = np.asarray(logits.astype(jnp.float32))
    for top_k in (1, 30, 1999):
        kept = kept_by_bound(logits, 1.0, way=way, top_k=top_k)
        np.testing.assert_array_equal(kept, reference.kept_set(widened, temperature=1.0, top_k=top_k))
    kept = np.asarray(kept_by_bound(logits, 1.0, way=way, top_p=0.9))
    assert reference.is_nucleus(kept, widened, temperature=1.0, top_p=0.9).all()


def test_a_bfloat16_logit_is_found_again_by_the_upper_half_of_its_key():
    logits = jnp.asarray([-jnp.inf, -3e38, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 3e38], jnp.bfloat16)
    np.testing.assert_array_equal(search.logit_of_key(search.ordered_keys(logits, 16), 16), logits)


@pytest.mark.parametrize(
    ("top_k", "top_p", "named"),
    (
        (-1, 0.0, "top_k=-1"),
        (4, 0.0, "top_k=4"),
        (0, -0.1, "top_p=-0.1"),
        (0, 1.1, "top_p=1.1"),
        (2, 0.5, "top_k=2 and"),
    ),
)
def test_a_truncation_without_meaning_is_an_error_that_names_it(top_k, top_p, named):
    with pytest.raises(ValueError, match=named):
        kept_set(jnp.zeros((2, 3)), temperature=1.0, top_k=top_k, top_p=top_p)
