"""The laws of stored targets: they teach as the teacher does that they were taken from, and cost less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_blockwise import assert_equal, in_four_devices
from test_divergences import JensenShannon, ReverseKL

from MaxText.distill import vocabulary
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens, blockwise_kd
from MaxText.distill.divergences import FORWARD_KL
from MaxText.distill.kd_loss import TRUNCATION_STRATEGIES
from MaxText.distill.projection import Projection
from MaxText.distill.stored import StoredTeacher
from MaxText.distill.teacher_side import LiveTeacher

N, D, V, K = 19, 12, 64, 8
SHARED = 50
ALPHA, Z_WEIGHT = 0.7, 1e-2


def project(head, hidden):
    return hidden @ head


def problem(tokens=N):
    """Hidden states and heads of both models, and the tokens, the first ones' targets inside and outside of K."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    teacher_hidden, teacher_head = normal(tokens, D), normal(D, V, scale=0.8)
    order = np.argsort(-np.asarray(teacher_hidden @ teacher_head)[:, :SHARED], axis=-1)
    targets = np.where(np.arange(tokens) % 2, order[:, 2], order[:, -3])
    mask = jnp.asarray(rng.uniform(size=tokens) < 0.8)
    return normal(tokens, D), normal(D, V, scale=0.5), teacher_hidden, teacher_head, Tokens(jnp.asarray(targets), mask)


def stored_top_k(logits, targets, *, k, temperature, slots=None, shared=0):
    """The k largest of a teacher's logits [N, V] as a cache has them, by float64 NumPy."""
    logits = np.asarray(logits, np.float64)
    size = logits.shape[-1]
    logits = np.where(np.arange(size) < (shared or size), logits, -np.inf)
    ids = np.sort(reference.order_of(logits)[:, :k], axis=-1)
    log_p = reference.log_softmax(logits, temperature)
    outside = log_p.copy()
    np.put_along_axis(outside, ids, -np.inf, axis=-1)
    unused = ((0, 0), (0, (slots or k) - k))
    at_target = np.take_along_axis(reference.log_softmax(logits, 1.0), np.asarray(targets)[:, None], -1)[:, 0]
    return StoredTeacher(
        ids=jnp.asarray(np.pad(ids, unused, constant_values=size), jnp.int32),
        log_weights=jnp.asarray(
            np.pad(np.take_along_axis(log_p, ids, -1), unused, constant_values=-np.inf), jnp.float32
        ),
        log_tail=jnp.asarray(reference.log_sum_exp(outside)[:, 0], jnp.float32),
        target_log_prob=jnp.asarray(at_target, jnp.float32),
        entropy=jnp.asarray(entropy(log_p), jnp.float32),
        temperature=temperature,
        shared_vocabulary=shared,
    )


def entropy(log_p):
    return -reference.divergence(log_p, np.zeros_like(log_p))


def walked(teacher, tokens, strategy="renormalize", temperature=1.0, block_size=8, **settings):
    """(objective, sums), gradients of the student's hidden states and head."""
    divergence = FORWARD_KL[strategy] if isinstance(strategy, str) else strategy
    weights = Weights(ALPHA, temperature, Z_WEIGHT)

    def loss(hidden, head):
        student = Projection(hidden, head, project)
        return blockwise_kd(
            student, teacher, tokens, weights, divergence=divergence, block_size=block_size, **settings
        )

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_teaches_as(got, expected, tolerance=1e-5):
    """The same objective, sums and gradients; of the sums those that stored targets know."""
    (objective, sums), gradients = got
    (expected_objective, expected_sums), expected_gradients = expected
    expected_sums = jax.tree.map(
        lambda mine, live: None if mine is None else live, sums, expected_sums, is_leaf=lambda x: x is None
    )
    assert_equal((objective, sums, gradients), (expected_objective, expected_sums, expected_gradients), tolerance)


@pytest.mark.parametrize("strategy", TRUNCATION_STRATEGIES)
@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("k", (K, V))
def test_the_k_largest_teach_as_the_live_teacher_does(strategy, temperature, k, monkeypatch):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, project), top_k=k)
    slots = k + 3 if k < V else k
    stored = stored_top_k(
        teacher_hidden @ teacher_head, tokens.targets, k=k, temperature=temperature, slots=slots
    )
    monkeypatch.setattr(vocabulary, "_CHUNK_VALUES", 8 * 128)
    got, expected = (
        walked(teacher, tokens, strategy, temperature, evaluation=True)(hidden, head) for teacher in (stored, live)
    )
    assert_teaches_as(got, expected)
    sums = got[0][1]
    assert sums.agreement_sum is None and sums.kept_mass_sum is not None
    assert (sums.kl_t1_sum is not None) == (k == V and temperature == 1.0)
