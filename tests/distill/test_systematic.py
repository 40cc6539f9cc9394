"""The laws of systematic draws: unbiased, evenly spread, and the same wherever the vocabulary lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_blockwise import in_four_devices

from MaxText.distill import systematic
from MaxText.distill.systematic import systematic_draws
from MaxText.distill.vocabulary import Vocabulary

V, DRAWS = 1000, 50


def peaked_logits(positions):
    return jnp.asarray(3.0 * np.random.default_rng(0).standard_normal((positions, V)), jnp.float32)


@functools.partial(jax.jit, static_argnames=("draws", "vocab_axes"))
def drawn(logits, offsets, temperature=1.0, *, draws=DRAWS, vocab_axes=()):
    vocabulary = Vocabulary(vocab_axes)
    maximum = vocabulary.maxima(lambda _, logits: logits, logits)
    return systematic_draws(logits, offsets, maximum, draws=draws, temperature=temperature, vocabulary=vocabulary).ids


def counts(ids):
    return np.stack([np.bincount(row, minlength=V) for row in np.asarray(ids)])


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_the_mean_count_over_all_offsets_is_draws_times_probability(temperature):
    offsets = (jnp.arange(1024, dtype=jnp.float32)[:, None] + 0.5) / 1024
    logits = peaked_logits(1)
    mean = counts(drawn(jnp.broadcast_to(logits, (1024, V)), offsets, temperature)).mean(axis=0)
    expected = DRAWS * reference.softmax(np.asarray(logits), temperature)[0]
    # A token's count changes at two offsets at most, and the grid of offsets is as fine as this.
    np.testing.assert_allclose(mean, expected, atol=1.2 / 1024)


def test_each_count_is_within_one_of_draws_times_probability_and_ids_ascend():
    logits = peaked_logits(200)
    offsets = jnp.asarray(np.random.default_rng(1).random((200, 1)), jnp.float32)
    ids = np.asarray(drawn(logits, offsets))
    assert ids.dtype == np.int32 and (np.diff(ids, axis=-1) >= 0).all()
    expected = DRAWS * reference.softmax(np.asarray(logits), 1.0)
    assert np.abs(counts(ids) - expected).max() < 1 + 1e-4


def test_draws_are_the_points_of_the_cumulative_distribution():
    logits = peaked_logits(200)
    offsets = np.random.default_rng(1).random((200, 1)).astype(np.float32)
    cumulative = np.cumsum(reference.softmax(np.asarray(logits), 1.0), axis=-1)
    points = (offsets + np.arange(DRAWS)) / DRAWS
    ids = np.asarray(drawn(logits, jnp.asarray(offsets)))
    # The cumulative sum of float32 has an error of a few 1e-6, which is what the draws' interval may be off by.
    before = np.take_along_axis(np.pad(cumulative, ((0, 0), (1, 0))), ids, axis=-1)
    assert (points > before - 5e-6).all() and (points < np.take_along_axis(cumulative, ids, axis=-1) + 5e-6).all()


@pytest.mark.parametrize("vocabulary", (1, 130, 5000))
def test_a_cpu_draws_what_an_accelerator_does(vocabulary, monkeypatch):
    monkeypatch.setattr(systematic, "_ROW_VALUES", 12 * vocabulary)  # 64 are five times 12, and 4
    rng = np.random.default_rng(vocabulary)
    # Masses of 0 and 1, whose sums are exact in any order; chunks without mass among them.
    logits = np.where(rng.random((64, vocabulary)) < 0.02, 0.0, -np.inf)
    logits[:, rng.integers(vocabulary)] = 0.0
    arguments = jnp.asarray(logits, jnp.float32), jnp.asarray(rng.random((64, 1)), jnp.float32), jnp.zeros((64, 1))

    def terms(logits, weights):
        return {"weights": weights, "tokens": jnp.where(weights > 0.0, logits + 1.0, 0.0)}

    settings = {"draws": DRAWS, "temperature": 1.0, "vocabulary": Vocabulary()}
    elsewhere = systematic._drawn(*settings.values(), terms, 128, False, *arguments)
    here = systematic_draws(*arguments, terms, **settings)
    jax.tree.map(np.testing.assert_array_equal, here, elsewhere)
    number = (logits == 0.0).sum(axis=-1, keepdims=True)
    for found in (here.total, here.sums["weights"], here.sums["tokens"]):
        np.testing.assert_array_equal(found, number)


@pytest.mark.parametrize("vocabulary", (1, 100, 128, 129, 1000))
@pytest.mark.parametrize("offset", (0.0, 1.0 - 2**-24))
def test_tokens_without_mass_are_never_drawn_whatever_the_rounding(vocabulary, offset):
    rng = np.random.default_rng(vocabulary)
    logits = np.where(rng.random((300, vocabulary)) < 0.7, -np.inf, 5.0 * rng.standard_normal((300, vocabulary)))
    logits[:, rng.integers(vocabulary)] = 1e4 * rng.standard_normal(300)
    logits[::3, vocabulary // 2 :] = -np.inf
    logits[::3, 0] = 0.0
    ids = np.asarray(drawn(jnp.asarray(logits, jnp.float32), jnp.full((300, 1), offset, jnp.float32)))
    assert (ids >= 0).all() and (ids < vocabulary).all()
    assert (reference.softmax(logits, 1.0)[np.arange(300)[:, None], ids] > 0).all()


def test_a_point_at_the_end_of_a_tokens_interval_is_not_given_to_its_neighbour_without_mass():
    rng = np.random.default_rng(0)
    positions, vocabulary = 20_000, 512
    logits = rng.standard_normal((positions, vocabulary)).astype(np.float32)
    logits = np.where(rng.random(logits.shape) < 0.7, -np.inf, logits)
    logits[:, 0] = 0.0
    p = reference.softmax(logits, 1.0)
    # The ends of intervals, and some of the nearest floats: sums in two orders put them on either side.
    ends = np.cumsum(p, axis=-1)[np.arange(positions), rng.integers(vocabulary, size=positions)]
    offsets = np.minimum(ends * (1 + rng.integers(-3, 4, positions) * 2.0**-24), 1 - 2**-24).astype(np.float32)
    ids = np.asarray(drawn(jnp.asarray(logits), jnp.asarray(offsets)[:, None], draws=1))
    assert (p[np.arange(positions), ids[:, 0]] > 0).all()


def test_no_array_is_as_long_as_draws_times_vocabulary():
    n, vocabulary = 64, 32_768
    shapes = jax.ShapeDtypeStruct((n, vocabulary), jnp.float32), jax.ShapeDtypeStruct((n, 1), jnp.float32)
    program = drawn.lower(*shapes).compile()
    # The draws' chunks of 128 tokens, a few times, and one array of the vocabulary's size.
    assert program.memory_analysis().temp_size_in_bytes <= 4 * (n * vocabulary + 5 * n * DRAWS * 128)
    assert " sort(" not in program.as_text()


def check_sharded_draws():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    logits = jnp.concatenate([peaked_logits(40), jnp.full((40, 1000), -jnp.inf), peaked_logits(40)], axis=-1)
    logits = logits.at[:5, :1500].set(-jnp.inf)  # of whole shards nothing has mass
    offsets = jnp.asarray(np.random.default_rng(1).random((40, 1)), jnp.float32)
    expected = drawn(logits, offsets)
    for axes in (("tensor",), ("data", "tensor")):
        draw = jax.shard_map(
            functools.partial(drawn, vocab_axes=axes),
            mesh=mesh,
            in_specs=(P(None, axes), P()),
            out_specs=P(),
        )
        got = draw(logits, offsets)
        # Sums in another order: a point that lies within their rounding of a token's end may go to its neighbour.
        assert np.mean(np.asarray(got) != np.asarray(expected)) <= 1e-3
        assert (reference.softmax(np.asarray(logits), 1.0)[np.arange(40)[:, None], np.asarray(got)] > 0).all()


def test_draws_from_a_sharded_vocabulary_are_those_from_the_whole_one():
    in_four_devices(check_sharded_draws)
