"""The laws of the distillation loss in its plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from MaxText.distill import kd_loss
from MaxText.distill.kd_loss import TRUNCATION_STRATEGIES, kd_sums, kept_mass, kl_divergence
from MaxText.distill.truncation import kept_set

N, V = 400, 24  # One shape for all, so that each configuration is compiled once.
TEMPERATURES = (0.5, 1.0, 2.0, 3.0)
TRUNCATIONS = (
    *({"top_k": k, "top_p": 0.0} for k in (0, 1, 2, 5, 12, V - 1)),
    *({"top_k": 0, "top_p": p} for p in (0.1, 0.5, 0.9, 0.999)),
)
SOME_TRUNCATIONS = ({"top_k": 5, "top_p": 0.0}, {"top_k": 0, "top_p": 0.9}, {"top_k": 0, "top_p": 0.0})
all_truncations = pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
some_truncations = pytest.mark.parametrize("truncation", SOME_TRUNCATIONS, ids=str)


@functools.partial(jax.jit, static_argnames=("top_k", "top_p"))
def kl_and_gradients(student, teacher, temperature, **truncation):
    """By strategy: KL per position, and its gradient, read off the gradient of the sum: positions do not mix."""

    def by_strategy(strategy):
        def summed(student):
            kl = kl_divergence(student, teacher, temperature=temperature, truncation_strategy=strategy, **truncation)
            return kl.sum(), kl

        (_, kl), gradient = jax.value_and_grad(summed, has_aux=True)(student)
        return kl, gradient

    return {strategy: by_strategy(strategy) for strategy in TRUNCATION_STRATEGIES}


def assert_equals_reference(student, teacher, temperature, truncation):
    """Value within 2e-4 of |KL| + 0.01 and gradient within 2e-5, for a kept set that is right within 1e-6 of mass.

    Returns the kept set and the gradients by strategy.
    """
    kept = kept_set(jnp.asarray(teacher), temperature=temperature, **truncation)
    kept = np.ones(teacher.shape, bool) if kept is None else np.asarray(kept)
    if 0.0 < truncation["top_p"] < 1.0:
        assert reference.is_nucleus(kept, teacher, temperature=temperature, top_p=truncation["top_p"]).all()
    else:
        np.testing.assert_array_equal(kept, reference.kept_set(teacher, temperature=temperature, **truncation))
    gradients = {}
    for strategy, (kl, gradient) in kl_and_gradients(student, teacher, temperature, **truncation).items():
        expected, expected_gradient = reference.kl_and_gradient(
            student, teacher, kept, temperature=temperature, truncation_strategy=strategy
        )
        assert np.isfinite(kl).all() and np.isfinite(gradient).all()
        assert (np.abs(kl - expected) <= 2e-4 * (np.abs(expected) + 0.01)).all()
        assert (np.abs(gradient - expected_gradient) <= 2e-5).all()
        gradients[strategy] = np.asarray(gradient)
    return kept, gradients


@all_truncations
def test_value_and_gradient_equal_the_float64_reference(truncation):
    student, teacher = reference.logits_of_every_scale(1, N, V)
    for temperature in TEMPERATURES:
        assert_equals_reference(student, teacher, temperature, truncation)


@all_truncations
def test_equal_and_rounded_logits_are_no_special_case(truncation):
    student, teacher = (np.round(logits) for logits in reference.logits_of_every_scale(2, N, V, largest=50.0))
    # Whole numbers put whole groups of tokens at the border of a nucleus, which 1e-6 of mass does not settle.
    if truncation["top_p"] in (0.0, 1.0):
        assert_equals_reference(student, teacher, 1.0, truncation)


@some_truncations
def test_a_padded_vocabulary_gives_the_loss_of_the_vocabulary_without_padding(truncation):
    student, teacher = reference.logits_of_every_scale(3, N, V, largest=100.0)
    minus_inf = np.full((N, 8), -np.inf, np.float32)
    padded = [np.concatenate((logits, minus_inf), -1) for logits in (student, teacher)]
    without_padding = kl_and_gradients(student, teacher, 2.0, **truncation)
    for strategy, (kl, gradient) in kl_and_gradients(*padded, 2.0, **truncation).items():
        expected, expected_gradient = without_padding[strategy]
        np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient[:, :V], expected_gradient, atol=1e-6)
        assert (np.asarray(gradient[:, V:]) == 0).all()


@all_truncations
def test_minus_infinity_in_the_teacher_alone_is_a_token_of_no_mass(truncation):
    student, teacher = reference.logits_of_every_scale(4, N, V)
    # Up to all but one token: top_k then keeps tokens of no mass, and the tail outside K has none.
    missing = np.random.default_rng(4).uniform(size=teacher.shape) < np.linspace(0, 1, N)[:, None]
    missing[np.arange(N), teacher.argmax(-1)] = False
    teacher[missing] = -np.inf
    for temperature in TEMPERATURES:
        assert_equals_reference(student, teacher, temperature, truncation)


@all_truncations
def test_kl_is_zero_when_student_equals_teacher(truncation):
    _, teacher = reference.logits_of_every_scale(5, N, V)
    results = kl_and_gradients(teacher, teacher, 2.0, **truncation)
    for strategy in ("renormalize", "other_bucket"):
        kl, gradient = results[strategy]
        np.testing.assert_allclose(kl, 0.0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@all_truncations
def test_renormalize_teacher_of_equal_models_is_minus_log_of_the_kept_mass(truncation):
    _, teacher = reference.logits_of_every_scale(6, N, V)
    kl, _ = kl_and_gradients(teacher, teacher, 2.0, **truncation)["renormalize_teacher"]
    mass = kept_mass(jnp.asarray(teacher), temperature=2.0, **truncation)
    np.testing.assert_allclose(kl, -np.log(mass), rtol=1e-5, atol=1e-6)


@all_truncations
def test_kept_mass_is_the_teachers_probability_of_the_kept_set(truncation):
    _, teacher = reference.logits_of_every_scale(7, N, V)
    for temperature in TEMPERATURES:
        kept = kept_set(jnp.asarray(teacher), temperature=temperature, **truncation)
        kept = True if kept is None else np.asarray(kept)
        expected = np.where(kept, reference.softmax(teacher, temperature), 0).sum(-1)
        mass = kept_mass(jnp.asarray(teacher), temperature=temperature, **truncation)
        np.testing.assert_allclose(mass, expected, rtol=1e-5)
        assert (np.asarray(mass) >= truncation["top_p"] - 1e-6).all()


@all_truncations
def test_gradient_outside_the_kept_set_is_zero_under_renormalize(truncation):
    student, teacher = reference.logits_of_every_scale(8, N, V)
    for temperature in TEMPERATURES:
        kept, gradients = assert_equals_reference(student, teacher, temperature, truncation)
        assert (gradients["renormalize"][~kept] == 0).all()


def test_other_bucket_is_exact_where_the_students_tail_has_collapsed():
    # The teacher leaves a third outside its two kept tokens, the student e^-36: a number that 1 - 1 does not show.
    teacher = np.asarray([[2.0, 1.0, 0.5, 0.7, 0.2]], np.float32)
    student = np.asarray([[2.0, 1.0, -35.0, -35.5, -34.0]], np.float32)
    kept = reference.kept_set(teacher, temperature=1.0, top_k=2)
    expected, expected_gradient = reference.kl_and_gradient(
        student, teacher, kept, temperature=1.0, truncation_strategy="other_bucket"
    )
    assert expected > 10.0 and expected_gradient[0, 2:].sum() < -0.3
    kl, gradient = kl_and_gradients(student, teacher, 1.0, top_k=2, top_p=0.0)["other_bucket"]
    np.testing.assert_allclose(kl, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_the_strategies_agree_without_truncation():
    student, teacher = reference.logits_of_every_scale(9, N, V)
    plain = kl_divergence(student, teacher, temperature=2.0)
    for strategy in TRUNCATION_STRATEGIES:
        for truncation in ({"top_k": V}, {"top_p": 1.0}, {}):
            kl = kl_divergence(student, teacher, temperature=2.0, truncation_strategy=strategy, **truncation)
            np.testing.assert_array_equal(kl, plain)


@some_truncations
def test_arithmetic_is_float32_whatever_comes_in(truncation):
    drawn = reference.logits_of_every_scale(10, N, V, largest=100.0)
    narrow = [jnp.asarray(logits, jnp.bfloat16) for logits in drawn]
    wide = kl_and_gradients(*(logits.astype(jnp.float32) for logits in narrow), 1.0, **truncation)
    for strategy, (kl, gradient) in kl_and_gradients(*narrow, 1.0, **truncation).items():
        assert kl.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(kl, wide[strategy][0], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(gradient.astype(jnp.float32), wide[strategy][1], rtol=2**-8, atol=1e-7)


def test_any_leading_shape_is_kept():
    student, teacher = (logits.reshape(2, 5, N // 10, V) for logits in reference.logits_of_every_scale(11, N, V))
    kl = kl_divergence(student, teacher, top_k=4)
    np.testing.assert_array_equal(kl.reshape(N), kl_divergence(student.reshape(N, V), teacher.reshape(N, V), top_k=4))
    assert kl_divergence(student[0, 0, 0], teacher[0, 0, 0]).shape == ()


def test_no_gradient_flows_to_the_teacher():
    student, teacher = reference.logits_of_every_scale(12, N, V)
    for strategy in TRUNCATION_STRATEGIES:
        kl = functools.partial(kl_divergence, student, top_k=5, truncation_strategy=strategy)
        gradient = jax.grad(lambda teacher, kl=kl: kl(teacher).sum())(teacher)
        assert (np.asarray(gradient) == 0).all()


def test_cross_entropy_equals_the_float64_reference():
    logits, _ = reference.logits_of_every_scale(13, N, V)
    targets = np.random.default_rng(13).integers(V, size=N)
    ce, log_z = kd_loss.cross_entropy_and_log_z(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(ce, reference.cross_entropy(logits, targets), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_z, reference.log_sum_exp(logits.astype(np.float64))[:, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(kd_loss.cross_entropy(jnp.asarray(logits), jnp.asarray(targets)), ce)


def batch(seed, *, batch_size=4, length=6):
    rng = np.random.default_rng(seed)
    student, teacher = (3.0 * rng.standard_normal((batch_size, length, V), np.float32) for _ in range(2))
    targets = rng.integers(V, size=(batch_size, length))
    mask = rng.uniform(size=(batch_size, length)) < 0.7
    return [jnp.asarray(x) for x in (student, teacher, targets, mask)]


@pytest.mark.parametrize(
    ("strategy", "truncation"), tuple(zip(TRUNCATION_STRATEGIES, SOME_TRUNCATIONS, strict=True)), ids=str
)
def test_sums_are_the_float64_references_sums_over_valid_positions(strategy, truncation):
    student, teacher, targets, mask = batch(20)
    jitted = jax.jit(functools.partial(kd_sums, truncation_strategy=strategy, evaluation=True, **truncation))
    at_temperature = {T: jitted(student, teacher, targets, mask, temperature=T) for T in TEMPERATURES}
    student, teacher, targets, mask = map(np.asarray, (student, teacher, targets, mask))
    for temperature, sums in at_temperature.items():
        kept = reference.kept_set(teacher, temperature=temperature, **truncation)
        kl, _ = reference.kl_and_gradient(student, teacher, kept, temperature=temperature, truncation_strategy=strategy)
        full = np.ones_like(kept)
        kl_t1, _ = reference.kl_and_gradient(student, teacher, full, temperature=1.0, truncation_strategy=strategy)
        reverse_kl_t1, jsd_t1 = (
            reference.divergence_and_gradient(
                name, student, teacher, full, temperature=1.0, truncation_strategy="renormalize"
            )[0]
            for name in ("reverse_kl", "jsd")
        )
        expected = kd_loss.KDSums(
            ce_sum=reference.cross_entropy(student, targets)[mask].sum(),
            kd_sum=temperature**2 * kl[mask].sum(),
            log_z_sq_sum=(reference.log_sum_exp(student.astype(np.float64))[mask] ** 2).sum(),
            teacher_ce_sum=reference.cross_entropy(teacher, targets)[mask].sum(),
            kept_mass_sum=np.where(kept, reference.softmax(teacher, temperature), 0).sum(-1)[mask].sum(),
            n=mask.sum(),
            kl_t1_sum=kl_t1[mask].sum(),
            reverse_kl_t1_sum=reverse_kl_t1[mask].sum(),
            jsd_t1_sum=jsd_t1[mask].sum(),
            agreement_sum=(student.argmax(-1) == teacher.argmax(-1))[mask].sum(),
        )
        for name, value in sums._asdict().items():
            assert value.shape == () and value.dtype == jnp.float32
            np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-5, err_msg=name)


def test_masked_positions_contribute_nothing_even_where_they_are_not_finite():
    student, teacher, targets, mask = batch(21)

    @functools.partial(jax.jit, static_argnums=(3,))
    def sums_and_gradient(student, teacher, targets, strategy):
        def objective(student):
            sums = kd_sums(student, teacher, targets, mask, top_k=5, truncation_strategy=strategy, evaluation=True)
            return sums.ce_sum + sums.kd_sum + sums.log_z_sq_sum, sums

        return jax.grad(objective, has_aux=True)(student)

    for strategy in TRUNCATION_STRATEGIES:
        clean_gradient, clean = sums_and_gradient(student, teacher, targets, strategy)
        for poison in (np.nan, np.inf, -np.inf, 3e38):
            spoilt = [np.where(mask[..., None], logits, np.float32(poison)) for logits in (student, teacher)]
            gradient, sums = sums_and_gradient(*spoilt, np.where(mask, targets, -100), strategy)
            assert jax.tree.all(jax.tree.map(lambda a, b: a == b, sums, clean))
            np.testing.assert_array_equal(gradient, clean_gradient)
            assert (np.asarray(gradient)[~mask] == 0).all()


def test_a_batch_without_valid_positions_gives_sums_of_zero():
    student, teacher, targets, mask = batch(22)
    sums = kd_sums(student, teacher, targets, np.zeros_like(mask), top_p=0.9, evaluation=True)
    assert all(value == 0 for value in sums)


def test_sums_of_microbatches_add_up_to_those_of_the_batch():
    student, teacher, targets, mask = batch(23)
    whole = kd_sums(student, teacher, targets, mask, top_k=3, evaluation=True)
    halves = [
        kd_sums(student[i], teacher[i], targets[i], mask[i], top_k=3, evaluation=True)
        for i in np.split(np.arange(4), 2)
    ]
    for name, first, second, together in zip(whole._fields, *halves, whole, strict=True):
        np.testing.assert_allclose(first + second, together, rtol=1e-6, err_msg=name)


def test_kd_sum_grows_with_temperature_squared_times_the_kl():
    student, teacher, targets, mask = batch(24)
    for temperature in TEMPERATURES:
        sums = kd_sums(student, teacher, targets, mask, temperature=temperature)
        kl = kl_divergence(student, teacher, temperature=temperature)
        np.testing.assert_allclose(sums.kd_sum, temperature**2 * np.asarray(kl)[mask].sum(), rtol=1e-6)


def test_what_only_evaluation_needs_is_not_computed_in_training():
    student, teacher, targets, mask = batch(26)
    sums = kd_sums(student, teacher, targets, mask)
    assert sums.kl_t1_sum is None and sums.agreement_sum is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    (
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": V + 1}, f"top_k={V + 1}"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 2, "top_p": 0.5}, "top_k=2 and top_p=0.5"),
        ({"truncation_strategy": "renormalise"}, "truncation_strategy='renormalise'"),
    ),
    ids=str,
)
def test_an_argument_without_meaning_is_an_error_that_names_it(arguments, named):
    with pytest.raises(ValueError, match=named):
        kl_divergence(jnp.zeros((2, V)), jnp.zeros((2, V)), **arguments)


def test_different_vocabularies_are_an_error():
    with pytest.raises(ValueError, match="24 and 25 tokens"):
        kl_divergence(jnp.zeros((2, 24)), jnp.zeros((2, 25)))
