"""Laws of the search for a bound by counting: how many visits of the vocabulary it takes."""

import jax.numpy as jnp
import numpy as np
import pytest

from MaxText.distill import search
from MaxText.distill.vocabulary import Vocabulary


@pytest.mark.parametrize(("bits", "most"), [(16, 7), (32, 12)])
def test_a_search_takes_at_most_the_visits_that_it_is_said_to(bits, most, monkeypatch):
    """Of numbers of every size, between which the bound's bits tell nothing of the others'."""
    visits = []

    def counted(condition, body, state):
        visits.append(0)
        while condition(state):
            state = body(state)
            visits[-1] += 1
        return state

    monkeypatch.setattr(search.jax.lax, "while_loop", counted)
    plain = np.random.default_rng(0).normal(size=(1, 64))
    mixed = np.concatenate([plain[:, :32] * 1e-30, plain[:, 32:48] * 1e36, plain[:, 48:]], axis=-1)
    logits, goal = jnp.asarray(mixed, jnp.bfloat16 if bits == 16 else jnp.float32), jnp.full((1, 1), 30.0)
    bound, _ = search.crossing(logits, jnp.ones_like, goal, Vocabulary(()))
    assert int(jnp.sum(logits >= bound)) >= 30
    assert search.most_visits(bits) == most and most - 1 <= max(visits) <= most


@pytest.mark.parametrize("vocabulary", [96, 100, 32, 20])
def test_a_part_is_the_same_by_a_visit_as_by_a_slice(vocabulary):
    size, length = 32, min(32, vocabulary)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, vocabulary)), jnp.bfloat16)
    start = jnp.minimum(jnp.arange(8)[:, None] % -(-vocabulary // size) * size, max(0, vocabulary - size))
    expected = search.part_by_slice(length, logits, start)
    np.testing.assert_array_equal(search.part_by_visit(size, length, logits, start), expected)
