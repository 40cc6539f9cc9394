"""The laws of the divergences beside the forward KL, in their plain form and by blocks."""

import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_blockwise
import test_stored
from conftest import few
from jax.sharding import AxisType
from test_blockwise import (
    SHARED,
    WEIGHTS,
    assert_equal,
    by_definition,
    compiled,
    gradients_of,
    in_four_devices,
    matrix_project,
)

from MaxText.config import checks
from MaxText.config.keys import KDKeys
from MaxText.distill import vocabulary
from MaxText.distill.kd_loss import divergence, kd_sums, kl_divergence
from MaxText.distill.projection import Projection
from MaxText.distill.teacher_side import LiveTeacher
from MaxText.distill.term_sums import divergence_of
from MaxText.distill.terms.named import DIVERGENCES, term_named
from MaxText.distill.terms.skew_kl import SkewKL

N, V = 400, 24
TEMPERATURES = (0.5, 1.0, 3.0)
STRATEGIES = ("renormalize", "other_bucket")
# Name -> the divergence's own numbers.
NUMBERED = {
    "reverse_kl": ({},),
    "jsd": ({"jsd_beta": 0.5}, {"jsd_beta": 0.1}),
    "skew_kl": ({"skew": 0.1}, {"skew": 0.7}),
    "skew_reverse_kl": ({"skew": 0.1}, {"skew": 0.7}),
    "tvd": ({},),
}
CASES = tuple((name, numbers) for name, several in NUMBERED.items() for numbers in several)
# As many truncations as there are ways to end a kept set; one that keeps all but one token.
TRUNCATIONS = (
    *({"top_k": k, "top_p": 0.0} for k in (0, 1, 5, V - 1)),
    {"top_k": 0, "top_p": 0.9},
)
all_truncations = pytest.mark.parametrize(
    "truncation", few((TRUNCATIONS[0], TRUNCATIONS[2], TRUNCATIONS[-1]), TRUNCATIONS), ids=str
)
# One that needs no visit of its own, and one that does; what is the same for all of these is in the long matrix.
FEW = ("reverse_kl", "jsd")
few_names = pytest.mark.parametrize("name", few(FEW, NUMBERED))


def term_of(name, jsd_beta=0.5, skew=0.1):
    return term_named(name, jsd_beta=jsd_beta, skew=skew)


def meanings(name):
    """The truncation strategies under which the divergence has a meaning."""
    return (*STRATEGIES, "renormalize_teacher") if name == "skew_kl" else STRATEGIES


@functools.partial(jax.jit, static_argnames=("top_k", "top_p"))
def plain_and_gradients(student, teacher, temperature, **truncation):
    """By case and strategy: the divergence per position, and its gradient, read off that of the sum."""

    def of(term, strategy):
        def summed(student):
            found = divergence(
                student, teacher, term, temperature=temperature, truncation_strategy=strategy, **truncation
            )
            return found.sum(), found

        (_, found), gradient = jax.value_and_grad(summed, has_aux=True)(student)
        return found, gradient

    return {
        (i, strategy): of(term_of(name, **numbers), strategy)
        for i, (name, numbers) in enumerate(CASES)
        for strategy in meanings(name)
    }


def kept_by_definition(teacher, temperature, truncation):
    return reference.kept_set(teacher, temperature=temperature, **truncation)


def assert_equals_reference(student, teacher, temperature, truncation):
    """Value within 2e-4 of |D| + 0.01 and gradient within 2e-5, as for the forward KL; of the reverse KL, whose slopes
    are as large as it is, within 2e-5 and 1e-6 of it."""
    kept = kept_by_definition(teacher, temperature, truncation)
    for (i, strategy), (found, gradient) in plain_and_gradients(student, teacher, temperature, **truncation).items():
        name, numbers = CASES[i]
        expected, expected_gradient = reference.divergence_and_gradient(
            name, student, teacher, kept, temperature=temperature, truncation_strategy=strategy, **numbers
        )
        assert np.isfinite(found).all() and np.isfinite(gradient).all(), (name, strategy)
        assert (np.abs(found - expected) <= 2e-4 * (np.abs(expected) + 0.01)).all(), (name, strategy)
        bound = 2e-5 + (1e-6 * np.abs(expected)[:, None] if name == "reverse_kl" else 0.0)
        error = np.abs(gradient - expected_gradient)
        if name == "tvd":
            error = error[~is_on_the_edge(student, teacher, kept, temperature, strategy)]
        assert (error <= bound).all(), (name, strategy, error.max())


def is_on_the_edge(student, teacher, kept, temperature, strategy):
    """Positions in which float32 need not know whether p or q is larger: there the distance has no slope."""
    log_p = reference.log_softmax(teacher, temperature, kept if strategy == "renormalize" else None)
    log_q = reference.log_softmax(student, temperature, kept if strategy == "renormalize" else None)
    tails = [reference.log_sum_exp(np.where(kept, -np.inf, x)) for x in (log_p, log_q)]
    log_p, log_q = (np.concatenate((x, tail), -1) for x, tail in zip((log_p, log_q), tails, strict=True))
    with np.errstate(invalid="ignore"):
        return ((np.abs(log_p - log_q) < 1e-5) & (log_q > np.log(1e-5))).any(-1)


@all_truncations
def test_value_and_gradient_equal_the_float64_reference(truncation):
    student, teacher = reference.logits_of_every_scale(1, N, V)
    for temperature in TEMPERATURES:
        assert_equals_reference(student, teacher, temperature, truncation)


@all_truncations
def test_a_token_without_mass_is_left_out_of_the_reverse_kl_and_seen_by_the_others(truncation):
    student, teacher = reference.logits_of_every_scale(4, N, V)
    missing = np.random.default_rng(4).uniform(size=teacher.shape) < np.linspace(0, 1, N)[:, None]
    missing[np.arange(N), teacher.argmax(-1)] = False
    teacher[missing] = -np.inf
    for temperature in TEMPERATURES:
        assert_equals_reference(student, teacher, temperature, truncation)


@pytest.mark.parametrize("truncation", few(TRUNCATIONS[2:3], TRUNCATIONS[::2]), ids=str)
def test_a_padded_vocabulary_gives_the_divergence_of_the_vocabulary_without_padding(truncation):
    student, teacher = reference.logits_of_every_scale(3, N, V, largest=100.0)
    without = plain_and_gradients(student, teacher, 2.0, **truncation)
    minus_inf = np.full((N, 8), -np.inf, np.float32)
    padded_teacher = np.concatenate((teacher, minus_inf), -1)
    padded = plain_and_gradients(np.concatenate((student, minus_inf), -1), padded_teacher, 2.0, **truncation)
    # What the teacher alone is padded with is no token to the reverse KL, whatever the student says of it.
    loud = plain_and_gradients(np.concatenate((student, -minus_inf.clip(-9, 9)), -1), padded_teacher, 2.0, **truncation)
    for case, (expected, expected_gradient) in without.items():
        for found, gradient in (padded[case], *([loud[case]] if CASES[case[0]][0] == "reverse_kl" else [])):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(gradient[:, :V], expected_gradient, rtol=1e-5, atol=1e-6)
            assert (np.asarray(gradient[:, V:]) == 0).all()


@all_truncations
def test_equal_models_have_a_divergence_of_zero(truncation):
    _, teacher = reference.logits_of_every_scale(5, N, V)
    for (i, strategy), (found, gradient) in plain_and_gradients(teacher, teacher, 2.0, **truncation).items():
        if strategy != "renormalize_teacher":
            np.testing.assert_allclose(found, 0.0, atol=1e-6)
            # Where p and q are equal but for rounding, the distance's slope may be that of either side.
            np.testing.assert_allclose(gradient, 0.0, atol=0.13 if CASES[i][0] == "tvd" else 1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_their_limits_jsd_and_the_skewed_divergences_are_the_kls(strategy):
    student, teacher = reference.logits_of_every_scale(6, N, V, largest=8.0)
    settings = {"top_k": 5, "truncation_strategy": strategy}
    forward = kl_divergence(student, teacher, **settings)
    reverse = divergence(student, teacher, term_of("reverse_kl"), **settings)
    for limit, name, at in (
        (forward, "jsd", lambda x: ({"jsd_beta": x}, x)),
        (reverse, "jsd", lambda x: ({"jsd_beta": 1 - x}, x)),
        (forward, "skew_kl", lambda x: ({"skew": x}, 1.0)),
        (reverse, "skew_reverse_kl", lambda x: ({"skew": x}, 1.0)),
    ):
        distance = []
        for x in (0.1, 0.01, 0.001):
            numbers, scale = at(x)
            found = divergence(student, teacher, term_of(name, **numbers), **settings) / scale
            distance.append(np.abs(found - limit).max())
        assert distance[2] < distance[1] / 3 < distance[0] / 9, (name, distance)
    assert term_of("skew_kl", skew=0.0) is term_of("skew_kl", skew=1e-40) is None  # the forward KL itself
    assert term_of("skew_reverse_kl", skew=0.0) == term_of("reverse_kl")


def test_each_differs_from_the_others_and_none_is_negative():
    student, teacher = reference.logits_of_every_scale(7, N, V, largest=20.0)
    several = [divergence(student, teacher, term_of(name, **numbers)) for name, numbers in CASES]
    several.append(kl_divergence(student, teacher))
    assert all((np.asarray(found) >= -1e-6).all() for found in several)
    sums = [float(found.sum()) for found in several]
    assert len(np.unique(np.round(sums, 3))) == len(sums)


# By blocks ------------------------------------------------------------------------------------------------------------


def settings_of(name, strategy, keep, shared=0):
    """Those of the plain form, and those of the blockwise one."""
    common = {"evaluation": True, "shared_vocabulary": shared, **keep}
    term = term_of(name)
    plain = {"term": term, "truncation_strategy": strategy, **common}
    return plain, {"divergence": divergence_of(term, strategy), **common}


BLOCKS = [
    *((name, "other_bucket", {"top_k": 5}) for name in NUMBERED),
    ("reverse_kl", "renormalize", {}),
    ("skew_kl", "renormalize_teacher", {"top_k": 5}),
    *(pytest.param(name, "renormalize", {}, marks=pytest.mark.slow) for name in NUMBERED if name != "reverse_kl"),
    *(pytest.param(name, "renormalize", {"top_k": 5}, marks=pytest.mark.slow) for name in NUMBERED),
    pytest.param("jsd", "other_bucket", {"top_p": 0.9}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "strategy", "keep"), BLOCKS, ids=str)
def test_by_blocks_values_and_gradients_equal_the_plain_form(name, strategy, keep, monkeypatch):
    *arrays, targets, mask = test_blockwise.problem()
    arguments = (*arrays, targets % SHARED, mask, *WEIGHTS)
    plain, blockwise = settings_of(name, strategy, keep, shared=SHARED)
    expected = by_definition(test_blockwise.plain(**plain))(*arguments)
    monkeypatch.setattr(vocabulary, "CHUNK_VALUES", 8 * 500)
    assert_equal(gradients_of(test_blockwise.blockwise(block_size=8, **blockwise))(*arguments), expected)


EACH_ONCE = tuple(zip(NUMBERED, itertools.cycle(STRATEGIES), strict=False))


@pytest.mark.parametrize(("name", "strategy"), few(EACH_ONCE, itertools.product(NUMBERED, STRATEGIES)))
def test_by_blocks_logits_of_every_scale_give_the_gradient_of_the_reference(name, strategy):
    hidden = jnp.eye(64)  # makes the head a table of logits, exact to the last digit in any block
    student, teacher = reference.logits_of_every_scale(14, 64, 300)
    teacher[:32, ::7] = -np.inf
    _, blockwise = settings_of(name, strategy, {"top_k": 5})
    loss = test_blockwise.blockwise(matrix_project, look_up, block_size=16, **blockwise)
    arguments = (hidden, student, hidden, teacher, jnp.arange(64), jnp.ones(64, bool), 1.0, 1.0, 0.0)
    (value, _), (_, gradient) = gradients_of(loss)(*arguments)
    kept = kept_by_definition(teacher, 1.0, {"top_k": 5})
    expected, expected_gradient = reference.divergence_and_gradient(
        name, student, teacher, kept, temperature=1.0, truncation_strategy=strategy
    )
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-5, rtol=1e-5)


def look_up(table, hidden):
    """The product of one-hot hidden states and a table that may hold -inf."""
    return table[jnp.argmax(hidden, axis=-1)]


def test_by_blocks_a_student_without_a_token_of_the_teachers_is_told_nothing_by_the_reverse_kl():
    """Its q among them is less than float32 has."""
    student = jnp.asarray([[0.0, -1.0, 500.0, -2.0], [0.0, 1.0, 2.0, 3.0]])
    teacher = jnp.asarray([[1.0, 2.0, -jnp.inf, 0.0], [1.0, 2.0, -jnp.inf, 0.0]])
    _, blockwise = settings_of("reverse_kl", "renormalize", {})
    loss = test_blockwise.blockwise(matrix_project, look_up, block_size=2, **blockwise)
    arguments = (jnp.eye(2), student, jnp.eye(2), teacher, jnp.arange(2), jnp.ones(2, bool), 1.0, 1.0, 0.0)
    (value, sums), (_, gradient) = gradients_of(loss)(*arguments)
    np.testing.assert_allclose(value, divergence(student[1], teacher[1], term_of("reverse_kl")), rtol=1e-6)
    assert (np.asarray(gradient)[0] == 0).all() and (np.asarray(gradient)[:, 2] == 0).all()
    assert np.isfinite(sums.reverse_kl_t1_sum)


@few_names
def test_by_blocks_a_token_that_the_student_cannot_say_is_told_nothing_and_the_others_as_ever(name):
    student, teacher = jnp.asarray([[0.0, -jnp.inf, 1.0, 2.0]]), jnp.asarray([[1.0, 2.0, 0.0, 1.0]])
    _, blockwise = settings_of(name, "renormalize", {})
    loss = test_blockwise.blockwise(matrix_project, look_up, block_size=1, **blockwise)
    arguments = (jnp.eye(1), student, jnp.eye(1), teacher, jnp.zeros(1, int), jnp.ones(1, bool), 1.0, 1.0, 0.0)
    _, (_, gradient) = gradients_of(loss)(*arguments)
    far = student.at[0, 1].set(-80.0)
    expected = jax.grad(lambda far: divergence(far, teacher, term_of(name)).sum())(far)
    assert gradient[0, 1] == 0
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@few_names
def test_of_the_k_largest_that_are_stored_each_teaches_as_with_the_live_teacher(name):
    hidden, head, teacher_hidden, teacher_head, tokens = test_stored.problem()
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, test_stored.project), top_k=test_stored.K)
    logits = teacher_hidden @ teacher_head
    stored = test_stored.stored_top_k(logits, tokens.targets, k=test_stored.K, temperature=2.0, slots=test_stored.K + 3)
    for strategy in meanings(name):
        found = divergence_of(term_of(name), strategy)
        got, expected = (
            test_stored.walked(teacher, tokens, found, 2.0, evaluation=True)(hidden, head) for teacher in (stored, live)
        )
        test_stored.assert_teaches_as(got, expected)
        sums = got[0][1]
        assert sums.kl_t1_sum is None and sums.reverse_kl_t1_sum is None and sums.jsd_t1_sum is None


def check_sharded_terms():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    *arrays, targets, mask = test_blockwise.problem(tokens=40)
    arguments = (*arrays, targets % SHARED, mask, *WEIGHTS)
    layouts = ((("data",), ("tensor",), ()), ((), ("data", "tensor"), ()), (("data",), ("tensor", "data"), ("data",)))
    for i, name in enumerate(NUMBERED):
        plain, blockwise = settings_of(name, STRATEGIES[i % 2], {"top_k": 5 * (i % 2)}, shared=SHARED)
        expected = gradients_of(test_blockwise.plain(**plain))(*arguments)
        token_axes, vocab_axes, pooled_axes = layouts[i % 3]
        loss = test_blockwise.sharded(mesh, token_axes, vocab_axes, pooled_axes, block_size=3, **blockwise)
        assert_equal(gradients_of(loss)(*arguments), expected)


def test_sharded_tokens_and_vocabularies_give_the_same():
    in_four_devices(check_sharded_terms)


@few_names
def test_a_step_has_the_products_and_the_arrays_of_the_forward_kl(name):
    shapes = {"tokens": 1024, "width": 64, "vocabulary": 32_768, "block_size": 256}
    kinds = (divergence_of(term, "renormalize") for term in (term_of(name), None))
    found, forward = (compiled(divergence=kind, **shapes) for kind in kinds)
    assert found.as_text().count(" dot(") == forward.as_text().count(" dot(")
    temporaries, of_forward = (program.memory_analysis().temp_size_in_bytes for program in (found, forward))
    array = 4 * 256 * 32_768  # of a block's logits; what is less is a chunk of one
    assert temporaries < of_forward + array / 8


def test_the_sum_grows_with_the_temperature_squared_times_the_divergence():
    rng = np.random.default_rng(24)
    student, teacher = 3.0 * rng.standard_normal((2, 2, 6, V), np.float32)
    targets, mask = rng.integers(V, size=(2, 6)), rng.uniform(size=(2, 6)) < 0.7
    for name in NUMBERED:
        for temperature in TEMPERATURES:
            sums = kd_sums(student, teacher, targets, mask, temperature=temperature, term=term_of(name))
            found = divergence(student, teacher, term_of(name), temperature=temperature)
            np.testing.assert_allclose(sums.kd_sum, temperature**2 * np.asarray(found)[mask].sum(), rtol=1e-6)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    (
        ({"name": "kl"}, "divergence='kl': expected one of forward_kl, reverse_kl"),
        ({"name": "jsd", "jsd_beta": 0.0}, "jsd_beta=0.0"),
        ({"name": "jsd", "jsd_beta": 1.0}, "jsd_beta=1.0"),
        ({"name": "skew_kl", "skew": 1.0}, "skew=1.0"),
        ({"name": "skew_kl", "skew": -0.1}, "skew=-0.1"),
    ),
    ids=str,
)
def test_a_divergence_without_meaning_is_an_error_that_names_it(arguments, named):
    with pytest.raises(ValueError, match=named):
        term_of(**arguments)


@pytest.mark.parametrize("name", sorted(set(NUMBERED) - {"skew_kl"}))
def test_conditioning_the_teacher_alone_has_no_meaning_for_terms_of_the_student(name):
    for take in (
        lambda term: divergence_of(term, "renormalize_teacher"),
        lambda term: divergence(jnp.zeros((2, V)), jnp.zeros((2, V)), term, truncation_strategy="renormalize_teacher"),
    ):
        with pytest.raises(ValueError, match=f"renormalize_teacher: {name} has terms of the student"):
            take(term_of(name))


def test_every_divergence_has_its_laws_here():
    assert set(DIVERGENCES) == {"forward_kl", *NUMBERED}
    assert all(name == "forward_kl" or term_of(name).name == name for name in DIVERGENCES)
    assert isinstance(term_of("skew_kl"), SkewKL)


def test_what_the_keys_allow_is_what_there_is():
    assert typing.get_args(KDKeys.model_fields["kd_divergence"].annotation) == DIVERGENCES
    of_teachers = [name for name in NUMBERED if term_of(name).is_of_teachers_tokens]
    assert {"forward_kl", *of_teachers} == set(checks.OF_TEACHERS_TOKENS)
