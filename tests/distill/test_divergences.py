"""The law of a divergence: it is a value and its slope, and the walk takes any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from MaxText.distill import vocabulary
from MaxText.distill.block import Asked, StudentBlock, Weights
from MaxText.distill.blockwise import Tokens, blockwise_kd
from MaxText.distill.divergences import FORWARD_KL, Divergence
from MaxText.distill.projection import Projection
from MaxText.distill.teacher_side import LiveTeacher
from MaxText.distill.vocabulary import Vocabulary

N, D, V, K = 21, 16, 700, 9
WEIGHTS = Weights(alpha=0.7, temperature=2.0, z_weight=1e-2)


class ReverseKL(Divergence):
    """KL(student || teacher) over the whole vocabulary: sum of q (log q - log p)."""

    def maxima(self, logits):
        return None

    def terms(self, logits, scale):
        log_p, log_q = self.log_weights(logits, scale)
        return jnp.exp(log_q), jnp.exp(log_q) * (log_q - log_p)

    def value(self, scale, sums):
        q, cross = sums.own
        return cross / q + jnp.log(sums.p) - jnp.log(q)

    def slope(self, logits, scale, sums, weight):
        log_p, log_q = self.log_weights(logits, scale)
        q, cross = sums.own
        return weight / q * jnp.exp(log_q) * (log_q - log_p - cross / q)

    def log_weights(self, logits, scale):
        return scale.log_weight(logits.teacher, scale.teacher), scale.log_weight(logits.student, scale.student)


class JensenShannon(Divergence):
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, which is known where p and q are normalised."""

    def maxima(self, logits):
        return None

    def terms(self, logits, scale):
        return jnp.exp(scale.log_weight(logits.student, scale.student))

    def normalized_terms(self, logits, scale, sums):
        log_p, log_q, log_m = self.log_probabilities(logits, scale, sums)
        return jnp.exp(log_p) * (log_p - log_m), jnp.exp(log_q) * (log_q - log_m)

    def value(self, scale, sums):
        return (sums.normalized[0] + sums.normalized[1]) / 2

    def slope(self, logits, scale, sums, weight):
        _, log_q, log_m = self.log_probabilities(logits, scale, sums)
        return weight / 2 * jnp.exp(log_q) * (log_q - log_m - sums.normalized[1])

    def log_probabilities(self, logits, scale, sums):
        log_p = scale.log_weight(logits.teacher, scale.teacher) - jnp.log(sums.p)
        log_q = scale.log_weight(logits.student, scale.student) - jnp.log(sums.own)
        return log_p, log_q, jnp.logaddexp(log_p, log_q) - jnp.log(2.0)


def reverse_kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def jensen_shannon(log_p, log_q):
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return (jnp.sum(jnp.exp(log_p) * (log_p - log_m), -1) + jnp.sum(jnp.exp(log_q) * (log_q - log_m), -1)) / 2


def problem():
    """Hidden states and heads of both models, and the tokens."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    tokens = Tokens(jnp.asarray(rng.integers(V, size=N)), jnp.asarray(rng.uniform(size=N) < 0.7))
    return normal(N, D), normal(D, V, scale=0.5), normal(N, D), normal(D, V, scale=0.8), tokens


def matrix_project(head, hidden):
    return hidden @ head


def walked(teacher, tokens, divergence):
    """The objective of a student's hidden states and head, by blocks."""

    def loss(hidden, head):
        student = Projection(hidden, head, matrix_project)
        return blockwise_kd(student, teacher, tokens, WEIGHTS, divergence=divergence, block_size=8)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_close(got, expected):
    """Each array within 1e-5 of the largest entry that is expected in it."""

    def compare(got, expected):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    jax.tree.map(compare, got, expected)


@pytest.mark.parametrize(
    ("divergence", "definition"), ((ReverseKL(), reverse_kl), (JensenShannon(), jensen_shannon)), ids=("reverse", "js")
)
def test_a_further_divergence_is_one_class_and_the_walk_takes_it(divergence, definition, monkeypatch):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    alpha, temperature, z_weight = WEIGHTS

    def plain(hidden, head):
        logits, targets = hidden @ head, tokens.targets
        log_p = jax.nn.log_softmax(teacher_hidden @ teacher_head / temperature)
        kd = temperature**2 * definition(log_p, jax.nn.log_softmax(logits / temperature))
        log_z = jax.nn.logsumexp(logits, axis=-1)
        ce = log_z - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(tokens.mask, (1 - alpha) * ce + alpha * kd + z_weight * log_z**2, 0.0))

    monkeypatch.setattr(vocabulary, "CHUNK_VALUES", 8 * 300)  # several chunks, as at a vocabulary's true size
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, matrix_project))
    (objective, _), gradient = walked(live, tokens, divergence)(hidden, head)
    assert_close((objective, gradient), jax.value_and_grad(plain, argnums=(0, 1))(hidden, head))


DIVERGENCES = FORWARD_KL | {"reverse": ReverseKL(), "js": JensenShannon()}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("top_k", (0, K))
def test_the_slope_is_the_derivative_of_the_value(name, top_k):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, matrix_project), top_k=top_k)
    asked = Asked(DIVERGENCES[name], Vocabulary(), evaluation=False)

    def block(logits):
        student = StudentBlock(logits, tokens.targets[:, None], tokens.mask[:, None], WEIGHTS, asked)
        return live.block(live.rows, student)

    def objective(logits):
        sums = block(logits).sums()
        return (1 - WEIGHTS.alpha) * sums.ce_sum + WEIGHTS.alpha * sums.kd_sum + WEIGHTS.z_weight * sums.log_z_sq_sum

    assert_close(block(hidden @ head).sums_and_gradient()[1], jax.grad(objective)(hidden @ head))
