"""The laws of stored targets: they teach as the teacher does that they were taken from, and cost less."""

import dataclasses
import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import few
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_blockwise import assert_equal, in_four_devices
from test_divergences import JensenShannon, ReverseKL

from MaxText.distill import stored as stored_lib
from MaxText.distill import vocabulary
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens, blockwise_kd
from MaxText.distill.divergences import FORWARD_KL
from MaxText.distill.kd_loss import TRUNCATION_STRATEGIES
from MaxText.distill.projection import Projection
from MaxText.distill.stored import StoredTeacher
from MaxText.distill.systematic import systematic_draws
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
        return blockwise_kd(student, teacher, tokens, weights, divergence=divergence, block_size=block_size, **settings)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_teaches_as(got, expected, tolerance=1e-5):
    """The same objective, sums and gradients; of the sums those that stored targets know."""
    (objective, sums), gradients = got
    (expected_objective, expected_sums), expected_gradients = expected
    expected_sums = jax.tree.map(
        lambda mine, live: None if mine is None else live, sums, expected_sums, is_leaf=lambda x: x is None
    )
    assert_equal((objective, sums, gradients), (expected_objective, expected_sums, expected_gradients), tolerance)


TEMPERATURES = (1.0, 2.0)
# Each strategy at one of them.
STRATEGIES = (("renormalize", 1.0), ("renormalize_teacher", 2.0), ("other_bucket", 2.0))
LARGEST = (*((*each, K) for each in STRATEGIES), ("other_bucket", 1.0, V))


@pytest.mark.parametrize(
    ("strategy", "temperature", "k"), few(LARGEST, product(TRUNCATION_STRATEGIES, TEMPERATURES, (K, V)))
)
def test_the_k_largest_teach_as_the_live_teacher_does(strategy, temperature, k, monkeypatch):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, project), top_k=k)
    slots = k + 3 if k < V else k
    stored = stored_top_k(teacher_hidden @ teacher_head, tokens.targets, k=k, temperature=temperature, slots=slots)
    monkeypatch.setattr(vocabulary, "CHUNK_VALUES", 8 * 128)
    got, expected = (
        walked(teacher, tokens, strategy, temperature, evaluation=True)(hidden, head) for teacher in (stored, live)
    )
    assert_teaches_as(got, expected)
    sums = got[0][1]
    assert sums.agreement_sum is None and sums.kept_mass_sum is not None
    assert (sums.kl_t1_sum is not None) == (k == V and temperature == 1.0)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_two_conditioned_distributions_need_no_more_than_the_differences_that_are_stored(temperature):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, project), top_k=K)
    stored = stored_top_k(teacher_hidden @ teacher_head, tokens.targets, k=K, temperature=3.0 - temperature)
    got, expected = (walked(teacher, tokens, "renormalize", temperature)(hidden, head) for teacher in (stored, live))
    (objective, sums), gradients = expected
    # What the teacher kept is that of the temperature that it was stored at.
    assert_teaches_as(got, ((objective, sums._replace(kept_mass_sum=got[0][1].kept_mass_sum)), gradients))


@pytest.mark.parametrize(("strategy", "temperature"), few(STRATEGIES, product(TRUNCATION_STRATEGIES, TEMPERATURES)))
def test_tokens_that_one_model_lacks_are_in_no_term_that_the_teacher_is_in(strategy, temperature):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    head, teacher_head = head.at[:, SHARED:].multiply(9.0), teacher_head.at[:, SHARED:].multiply(9.0)
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, project), top_k=K, shared_vocabulary=SHARED)
    logits = teacher_hidden @ teacher_head
    stored = stored_top_k(logits, tokens.targets, k=K, temperature=temperature, shared=SHARED)
    got, expected = (walked(teacher, tokens, strategy, temperature)(hidden, head) for teacher in (stored, live))
    assert_teaches_as(got, expected)


@pytest.mark.parametrize("divergence", (ReverseKL(), JensenShannon()))
def test_any_divergence_takes_stored_targets(divergence):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    # All but one: what is outside is then that token, and its logit is known.
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, project), top_k=V - 1)
    stored = stored_top_k(teacher_hidden @ teacher_head, tokens.targets, k=V - 1, temperature=2.0)
    got, expected = (walked(teacher, tokens, divergence, 2.0)(hidden, head) for teacher in (stored, live))
    assert_teaches_as(got, expected)


def stored_draws(ids, logits, targets, temperature):
    """A teacher of draws [N, draws], as a cache has them."""
    ids = np.asarray(ids)
    slots = ids.shape[-1]
    tokens, log_weights = np.full(ids.shape, V), np.full(ids.shape, -np.inf)
    for row, drawn in enumerate(ids):
        found, count = np.unique(drawn, return_counts=True)
        tokens[row, : len(found)], log_weights[row, : len(found)] = found, np.log(count / slots)
    logits = np.asarray(logits, np.float64)
    at_target = np.take_along_axis(reference.log_softmax(logits, 1.0), np.asarray(targets)[:, None], -1)[:, 0]
    return StoredTeacher(
        ids=jnp.asarray(tokens, jnp.int32),
        log_weights=jnp.asarray(log_weights, jnp.float32),
        log_tail=None,
        target_log_prob=jnp.asarray(at_target, jnp.float32),
        entropy=jnp.asarray(entropy(reference.log_softmax(logits, temperature)), jnp.float32),
        temperature=temperature,
    )


def test_draws_teach_without_bias_and_systematic_ones_err_at_most_0_65_times_as_much_as_independent_ones():
    seeds, draws = 400, 50
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    logits = np.asarray(1.5 * teacher_hidden @ teacher_head)
    rng = np.random.default_rng(1)
    p = reference.softmax(logits, 1.0)

    def systematic():
        offsets = jnp.asarray(rng.random((N, 1)), jnp.float32)
        return draw(logits, offsets)

    @jax.jit
    def draw(logits, offsets):
        whole, maximum = vocabulary.Vocabulary(), jnp.max(logits, axis=-1, keepdims=True)
        return systematic_draws(logits, offsets, maximum, draws=draws, temperature=1.0, vocabulary=whole).ids

    def independent():
        return np.sort([rng.choice(V, draws, p=row / row.sum()) for row in p], axis=-1)

    @jax.jit
    def taught(teacher):
        (_, sums), (_, gradient) = walked(teacher, tokens)(hidden, head)
        return sums.kd_sum, gradient

    live = LiveTeacher(Projection(jnp.asarray(logits), jnp.eye(V), project))
    expected = taught(live)
    errors = []
    for kind in (systematic, independent):
        several = [taught(stored_draws(kind(), logits, tokens.targets, 1.0)) for _ in range(seeds)]
        values, gradients = (np.stack(part) for part in zip(*several, strict=True))
        for got, mean in ((values, expected[0]), (gradients, expected[1])):
            standard_error = got.std(axis=0) / np.sqrt(seeds)
            assert (np.abs(got.mean(axis=0) - mean) <= 4 * standard_error + 1e-5).all()
        errors.append(np.sqrt(np.mean(np.square(gradients - expected[1]))))
    assert errors[0] <= 0.65 * errors[1]


@pytest.mark.parametrize(("temperature", "shared"), few(((1.0, SHARED), (2.0, 0)), product(TEMPERATURES, (0, SHARED))))
def test_draws_with_the_shares_of_the_whole_distribution_teach_as_the_live_teacher_does(temperature, shared):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, project), shared_vocabulary=shared)
    logits = teacher_hidden @ teacher_head
    largest = stored_top_k(logits, tokens.targets, k=shared or V, temperature=temperature, shared=shared, slots=V)
    stored = dataclasses.replace(largest, log_tail=None)
    got, expected = (walked(teacher, tokens, "renormalize", temperature)(hidden, head) for teacher in (stored, live))
    assert_teaches_as(got, expected)


def test_of_draws_each_strategy_is_the_kl_of_the_whole_vocabulary_and_evaluation_knows_it():
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    logits = teacher_hidden @ teacher_head
    stored = stored_draws(np.sort(np.random.default_rng(1).integers(V, size=(N, 9)), -1), logits, tokens.targets, 1.0)
    expected = walked(stored, tokens, TRUNCATION_STRATEGIES[0], evaluation=True)(hidden, head)
    for strategy in TRUNCATION_STRATEGIES[1:]:
        assert_equal(walked(stored, tokens, strategy, evaluation=True)(hidden, head), expected)
    sums = expected[0][1]
    assert sums.kl_t1_sum == sums.kd_sum
    assert sums.kept_mass_sum is None and sums.agreement_sum is None
    log_q, mask = reference.log_softmax(np.asarray(hidden @ head), 1.0), np.asarray(tokens.mask)
    weights = np.exp(np.asarray(stored.log_weights)) * np.isfinite(stored.log_weights)
    at_ids = np.take_along_axis(log_q, np.minimum(stored.ids, V - 1), axis=-1)
    value = -(weights * at_ids).sum(-1) - np.asarray(stored.entropy)
    np.testing.assert_allclose(sums.kd_sum, value[mask].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "temperature"),
    few((*STRATEGIES, ("draws", 1.0)), product((*TRUNCATION_STRATEGIES, "draws"), TEMPERATURES)),
)
def test_slots_that_are_compared_with_all_tokens_teach_as_those_do_that_are_looked_up(
    strategy, temperature, monkeypatch
):
    """As a TPU has it, and as the others do."""
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    logits = teacher_hidden @ teacher_head
    stored = stored_top_k(logits, tokens.targets, k=K, temperature=temperature, slots=K + 3, shared=SHARED)
    if strategy == "draws":
        stored, strategy = dataclasses.replace(stored, log_tail=None), "renormalize"
    visited = []

    def by(visits):
        def choose(slots, compared, scalars, *arrays):
            visited.append(visits)
            return (compared if visits else scalars)(*arrays)

        monkeypatch.setattr(stored_lib, "_at_ids", choose)
        return walked(stored, tokens, strategy, temperature, evaluation=True)(hidden, head)

    assert_equal(by(True), by(False), 3e-6)
    assert len(visited) >= 2 and visited.count(True) == visited.count(False)


@pytest.mark.parametrize("is_drawn", (True, False))
def test_a_program_for_a_tpu_writes_no_slots_into_an_array_of_the_vocabulary(is_drawn):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    stored = stored_top_k(teacher_hidden @ teacher_head, tokens.targets, k=K, temperature=1.0)
    traced = walked(dataclasses.replace(stored, log_tail=None) if is_drawn else stored, tokens).trace(hidden, head)

    def writes(platform):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        return len(re.findall(rf"\(tensor<8x{V}xf32>, tensor<8x{K}x2xi32>, tensor<8x{K}xf32>\)", program))

    assert [writes(platform) for platform in ("tpu", "cuda", "cpu")] == [0, 1, 1]


def look_up(table, hidden):
    """The product of one-hot hidden states and a table that may hold -inf."""
    return table[jnp.argmax(hidden, axis=-1)]


def tabled(stored, strategy):
    """KL's sum and its gradient, of a table of logits, exact to the last digit in any block."""
    positions = len(stored.ids)
    tokens = Tokens(jnp.arange(positions), jnp.ones(positions, bool))

    def loss(table):
        learner, weights = Projection(jnp.eye(positions), table, look_up), Weights(1.0, 1.0)
        return blockwise_kd(learner, stored, tokens, weights, divergence=FORWARD_KL[strategy], block_size=16)[0]

    return jax.jit(jax.value_and_grad(loss))


SCALES = (*((strategy, 5) for strategy in TRUNCATION_STRATEGIES), ("other_bucket", 100))


@pytest.mark.parametrize(("strategy", "k"), few(SCALES, product(TRUNCATION_STRATEGIES, (5, 100))))
def test_logits_of_every_scale_give_the_gradient_of_the_reference(strategy, k):
    student, teacher = reference.logits_of_every_scale(14, 64, 300)
    # In some positions nothing is outside of 100 tokens, and all logits are far below 0.
    student[:8] = student[:8] / 10 - 5000
    student[:8, 100:], teacher[:8, 100:] = -np.inf, -np.inf
    value, gradient = tabled(stored_top_k(teacher, np.arange(64), k=k, temperature=1.0), strategy)(student)
    kept = reference.kept_set(teacher, temperature=1.0, top_k=k)
    expected, expected_gradient = reference.kl_and_gradient(
        student, teacher, kept, temperature=1.0, truncation_strategy=strategy
    )
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-5)


@pytest.mark.parametrize("strategy", TRUNCATION_STRATEGIES)
def test_a_constant_added_to_all_logits_changes_nothing(strategy):
    rng = np.random.default_rng(3)
    # Of few binary digits, so that the sum with a power of two is exact.
    student, teacher = np.round(rng.standard_normal((2, 16, 300)) * 256).astype(np.float32) / 256
    taught = tabled(stored_top_k(teacher, np.arange(16), k=5, temperature=1.0), strategy)
    (value, gradient), (shifted_value, shifted_gradient) = taught(student), taught(student + 8192.0)
    np.testing.assert_allclose(shifted_value, value, rtol=1e-6)
    np.testing.assert_allclose(shifted_gradient, gradient, atol=1e-7)


def test_what_masked_tokens_hold_is_never_read():
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    stored = stored_top_k(teacher_hidden @ teacher_head, tokens.targets, k=K, temperature=2.0)
    clean = walked(stored, tokens, "other_bucket", 2.0)(hidden, head)
    keeps = jax.tree.map(lambda array: tokens.mask.reshape(-1, *[1] * (array.ndim - 1)), stored)
    spoilt = StoredTeacher(
        ids=jnp.where(keeps.ids, stored.ids, V),
        log_weights=jnp.where(keeps.log_weights, stored.log_weights, -jnp.inf),
        log_tail=jnp.where(keeps.log_tail, stored.log_tail, -jnp.inf),
        target_log_prob=jnp.where(tokens.mask, stored.target_log_prob, jnp.nan),
        entropy=jnp.where(tokens.mask, stored.entropy, jnp.nan),
        temperature=2.0,
    )
    assert_equal(walked(spoilt, tokens, "other_bucket", 2.0)(hidden, head), clean, 0.0)


def test_at_a_temperature_of_one_no_visit_takes_a_second_exponential():
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    logits = teacher_hidden @ teacher_head

    def draws(temperature):
        return stored_draws(np.tile(np.arange(K), (N, 1)), logits, tokens.targets, temperature)

    def largest(temperature):
        return stored_top_k(logits, tokens.targets, k=K, temperature=temperature)

    def exponentials(stored, strategy="other_bucket"):
        program = str(jax.make_jaxpr(walked(stored, tokens, strategy, stored.temperature))(hidden, head))
        return len(re.findall(rf":f32\[8,{V}\] = exp ", program))

    # The sums' visit and the gradient's.
    assert [exponentials(draws(1.0)), exponentials(largest(1.0))] == [2, 2]
    assert [exponentials(draws(2.0)), exponentials(largest(2.0))] == [4, 4]
    # Conditioned on the stored tokens the loss has no weights outside, at no temperature.
    assert exponentials(largest(2.0), "renormalize") == 2


@pytest.mark.parametrize(("strategy", "k"), (("other_bucket", 64), ("renormalize", 0)), ids=str)
def test_a_step_needs_no_more_memory_than_with_a_live_teacher(strategy, k):
    tokens, width, size, block_size = 1024, 64, 32_768, 256
    hidden, head = jax.ShapeDtypeStruct((tokens, width), jnp.float32), jax.ShapeDtypeStruct((width, size), jnp.float32)
    targets = Tokens(jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, bool))
    per_token, slots = jax.ShapeDtypeStruct((tokens,), jnp.float32), (tokens, k or 50)
    stored = StoredTeacher(
        ids=jax.ShapeDtypeStruct(slots, jnp.int32),
        log_weights=jax.ShapeDtypeStruct(slots, jnp.float32),
        log_tail=per_token if k else None,
        target_log_prob=per_token,
        entropy=per_token,
        temperature=2.0,
    )

    def temporaries(teacher):
        def loss(hidden, head, teacher):
            learner, weights = Projection(hidden, head, project), Weights(ALPHA, 2.0, Z_WEIGHT)
            settings = {"divergence": FORWARD_KL[strategy], "block_size": block_size}
            return blockwise_kd(learner, teacher, targets, weights, **settings)

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(hidden, head, teacher).compile()
        # Logits are written over where they lie.
        assert not re.search(rf"f32\[{block_size},{size}\]\S* copy\(", program.as_text())
        return program.memory_analysis().temp_size_in_bytes

    live = temporaries(LiveTeacher(Projection(hidden, head, project), top_k=k))
    assert temporaries(stored) <= live
    assert live <= 4 * (3 * block_size * size + width * size + tokens * width)


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    (
        ({}, {"temperature": 2.0, "strategy": "other_bucket"}, r"temperature=2\.0: expected 1\.0"),
        ({"log_tail": None}, {"temperature": 2.0}, r"temperature=2\.0: expected 1\.0"),
        ({"log_tail": None}, {"strategy": ReverseKL()}, "divergence=ReverseKL"),
        ({"shared_vocabulary": V + 1}, {}, f"shared_vocabulary={V + 1}"),
        ({"ids": jnp.zeros((N, V + 1), jnp.int32)}, {}, f"{V + 1} stored tokens"),
    ),
    ids=("temperature of the tail", "temperature of draws", "divergence of draws", "shared tokens", "slots"),
)
def test_targets_that_teach_no_such_loss_are_an_error_that_says_why(changes, settings, named):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    stored = stored_top_k(teacher_hidden @ teacher_head, tokens.targets, k=K, temperature=1.0)
    settings = {"strategy": "renormalize", "temperature": 1.0} | settings
    with pytest.raises(ValueError, match=named):
        walked(dataclasses.replace(stored, **changes), tokens, **settings)(hidden, head)


def sharded(mesh, stored, token_axes, vocab_axes, pooled_axes, strategy):
    summed = tuple(axis for axis in token_axes if axis not in pooled_axes)
    token, head_spec = P(token_axes or None), P(None, vocab_axes or None)

    def local(hidden, head, teacher, tokens):
        learner, weights = Projection(hidden, head, project), Weights(ALPHA, stored.temperature, Z_WEIGHT)
        axes = {"vocab_axis": vocab_axes, "pooled_axis": pooled_axes}
        settings = {"divergence": FORWARD_KL[strategy], "block_size": 3, "evaluation": True}
        return jax.lax.psum(blockwise_kd(learner, teacher, tokens, weights, **settings, **axes), summed)

    return jax.shard_map(local, mesh=mesh, in_specs=(token, head_spec, token, token), out_specs=P())


def check_sharded_targets():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    hidden, head, teacher_hidden, teacher_head, tokens = problem(tokens=40)
    # A device without a valid token goes along with the others of its pool.
    tokens = tokens._replace(mask=tokens.mask.at[:20].set(False))
    logits = teacher_hidden @ teacher_head
    largest = stored_top_k(logits, tokens.targets, k=K, slots=K + 2, temperature=2.0, shared=SHARED)
    ids = np.sort(np.random.default_rng(1).integers(V, size=(40, 9)), axis=-1)
    cases = (
        (largest, "other_bucket"),
        (largest, "renormalize"),
        (stored_draws(ids, logits, tokens.targets, 1.0), "renormalize"),
    )
    layouts = (
        (("data",), ("tensor",), ()),
        ((), ("data", "tensor"), ()),
        (("data",), ("tensor", "data"), ("data",)),
    )
    for (stored, strategy), layout in zip(cases, layouts, strict=True):
        expected = walked(stored, tokens, strategy, stored.temperature, evaluation=True)(hidden, head)
        loss = jax.value_and_grad(sharded(mesh, stored, *layout, strategy), argnums=(0, 1), has_aux=True)
        assert_equal(jax.jit(loss)(hidden, head, stored, tokens), expected)


def test_a_vocabulary_on_several_devices_gives_the_same():
    in_four_devices(check_sharded_targets)


TAUGHT = (
    *(("live", keep, "other_bucket") for keep in ({}, {"top_k": 5}, {"top_p": 0.9})),
    *(("stored", {}, strategy) for strategy in TRUNCATION_STRATEGIES),
)


@pytest.mark.parametrize(("side", "keep", "strategy"), few((*TAUGHT[1:3], TAUGHT[-1]), TAUGHT), ids=str)
def test_bfloat16_logits_are_read_as_their_float32_values(side, keep, strategy):
    """Nothing between the head and the sums rounds to bfloat16 once more."""
    student_hidden, student_head, teacher_hidden, teacher_head, tokens = problem()
    rows = jnp.eye(N)
    student, teacher = (
        (8 * x @ y).astype(jnp.bfloat16) for x, y in ((student_hidden, student_head), (teacher_hidden, teacher_head))
    )

    def sums(dtype):
        if side == "live":
            guide = LiveTeacher(Projection(rows, teacher.astype(dtype), look_up), **keep)
        else:
            guide = stored_top_k(teacher.astype(jnp.float32), tokens.targets, k=K, temperature=1.0)
        settings = {"divergence": FORWARD_KL[strategy], "block_size": 8, "evaluation": True}
        weights = Weights(ALPHA, 1.0, Z_WEIGHT)
        return jax.jit(
            lambda table: blockwise_kd(Projection(rows, table, look_up), guide, tokens, weights, **settings)
        )(student.astype(dtype))

    assert_equal(sums(jnp.bfloat16), sums(jnp.float32), 1e-6)
