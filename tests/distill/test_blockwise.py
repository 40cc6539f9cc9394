"""The laws of the blockwise loss: it equals the plain form, and costs what it says."""

import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import environment, few
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from MaxText.distill import vocabulary
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens, blockwise_kd
from MaxText.distill.divergences import FORWARD_KL
from MaxText.distill.kd_loss import TRUNCATION_STRATEGIES, kd_sums
from MaxText.distill.projection import Projection
from MaxText.distill.teacher_side import LiveTeacher
from MaxText.distill.truncation import counted_bound
from MaxText.distill.vocabulary import Vocabulary

N, D, E, V = 37, 16, 24, 1900
SHARED = 1700  # of V tokens, where the models do not have all of them in common
# The nucleus of 0.3 is found among the largest logits, that of 0.9 by bisection.
TRUNCATIONS = ({"top_k": 5}, {"top_p": 0.3}, {"top_p": 0.9}, {})
# Strategies differ where something is truncated; how K was found does not matter to them.
CASES = (
    *((strategy, {"top_k": 5}) for strategy in TRUNCATION_STRATEGIES),
    *((strategy, {"top_p": 0.9}) for strategy in TRUNCATION_STRATEGIES),
    ("other_bucket", {"top_p": 0.3}),
    ("renormalize", {}),
)


def student_project(head, hidden):
    """A final norm, a tied embedding "V D", a scale and a soft cap."""
    hidden = head["norm"] * hidden / jnp.sqrt(jnp.mean(hidden**2, -1, keepdims=True) + 1e-6)
    return 20.0 * jnp.tanh(0.5 * (hidden @ head["embedding"].T) / 20.0)


def teacher_project(head, hidden):
    return hidden @ head


def problem(dtype=jnp.float32, tokens=N):
    rng = np.random.default_rng(0)

    def normal(*shape, scale):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    student_head = {"norm": normal(D, scale=0.1) + 1, "embedding": normal(V, D, scale=1.0)}
    targets = jnp.asarray(rng.integers(V, size=tokens))
    mask = jnp.asarray(rng.uniform(size=tokens) < 0.7)
    return (
        normal(tokens, D, scale=1.0),
        student_head,
        normal(tokens, E, scale=1.0),
        normal(E, V, scale=0.6),
        targets,
        mask,
    )


def gradients_of(loss):
    """(objective_sum, sums), gradients of the student's hidden states and head."""
    return jax.jit(by_definition(loss))


def by_definition(loss):
    """The same, not compiled as a whole: what a plain form is made of is compiled once for all cases."""
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def plain(student_project=student_project, teacher_project=teacher_project, **settings):
    def loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, mask, alpha, temperature, z_weight):
        sums = kd_sums(
            student_project(student_head, student_hidden)[None],
            teacher_project(teacher_head, teacher_hidden)[None],
            targets[None],
            mask[None],
            temperature=temperature,
            **settings,
        )
        return (1 - alpha) * sums.ce_sum + alpha * sums.kd_sum + z_weight * sums.log_z_sq_sum, sums

    return loss


def blockwise(
    student_project=student_project,
    teacher_project=teacher_project,
    top_k=0,
    top_p=0.0,
    shared_vocabulary=0,
    truncation_strategy="renormalize",
    **settings,
):
    settings = {"divergence": FORWARD_KL[truncation_strategy]} | settings

    def loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, mask, *weights):
        teacher = Projection(teacher_hidden, teacher_head, teacher_project)
        return blockwise_kd(
            Projection(student_hidden, student_head, student_project),
            LiveTeacher(teacher, top_k, top_p, shared_vocabulary),
            Tokens(targets, mask),
            Weights(*weights),
            **settings,
        )

    return loss


WEIGHTS = (0.7, 2.0, 1e-2)


def assert_equal(got, expected, tolerance=1e-5):
    """Each array within the tolerance of the largest entry that is expected in it."""

    def compare(path, got, expected):
        assert got.shape == expected.shape and got.dtype == expected.dtype, path
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max(), path

    jax.tree_util.tree_map_with_path(compare, got, expected)


# Each strategy and each way to find K; the others in the long matrix.
FEW = (*CASES[:3], ("other_bucket", {"top_p": 0.9}), *CASES[-2:])


@pytest.mark.parametrize(("strategy", "keep"), few(FEW, CASES), ids=str)
def test_values_and_gradients_equal_the_plain_form(strategy, keep, monkeypatch):
    settings = {"truncation_strategy": strategy, "evaluation": True, **keep}
    arguments = (*problem(), *WEIGHTS)
    expected = by_definition(plain(**settings))(*arguments)
    # Several chunks of the vocabulary, as at its true size; the first one is shorter.
    monkeypatch.setattr(vocabulary, "CHUNK_VALUES", 8 * 500)
    assert_equal(gradients_of(blockwise(block_size=8, **settings))(*arguments), expected)


LACKING = (("renormalize", {"top_k": 5}), ("renormalize_teacher", {"top_p": 0.9}), *CASES[-2:])


@pytest.mark.parametrize(("strategy", "keep"), few(LACKING, CASES), ids=str)
def test_tokens_that_one_model_lacks_are_in_no_term_that_the_teacher_is_in(strategy, keep, monkeypatch):
    student_hidden, student_head, teacher_hidden, teacher_head, targets, mask = problem()
    # What the models say of those tokens is as loud as it can be.
    teacher_head = teacher_head.at[:, SHARED:].multiply(30.0)
    student_head["embedding"] = student_head["embedding"].at[SHARED:].multiply(3.0)
    arguments = (student_hidden, student_head, teacher_hidden, teacher_head, targets % SHARED, mask, *WEIGHTS)
    settings = {"truncation_strategy": strategy, "evaluation": True, **keep}
    monkeypatch.setattr(vocabulary, "CHUNK_VALUES", 8 * 500)
    (objective, sums), gradients = gradients_of(blockwise(block_size=8, shared_vocabulary=SHARED, **settings))(
        *arguments
    )
    (expected, expected_sums), expected_gradients = by_definition(cropped(**settings))(*arguments)
    assert_equal((objective, sums), (expected, expected_sums))
    assert_equal(gradients, expected_gradients)
    assert_equal(by_definition(plain(shared_vocabulary=SHARED, **settings))(*arguments)[0][1], expected_sums)


def cropped(**settings):
    """The loss put together by hand: cross-entropy of the whole vocabulary, the rest from logits that are cut off."""

    def loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, mask, alpha, temperature, z_weight):
        student = student_project(student_head, student_hidden)[None]
        teacher = teacher_project(teacher_head, teacher_hidden)[None, :, :SHARED]
        target, valid = targets[None], mask[None]
        sums = kd_sums(student[..., :SHARED], teacher, target, valid, temperature=temperature, **settings)
        whole = kd_sums(student, student, target, valid)
        sums = sums._replace(ce_sum=whole.ce_sum, log_z_sq_sum=whole.log_z_sq_sum)
        return (1 - alpha) * sums.ce_sum + alpha * sums.kd_sum + z_weight * sums.log_z_sq_sum, sums

    return loss


def test_a_target_that_the_teacher_lacks_costs_it_infinitely_and_the_student_nothing_more():
    *arrays, targets, mask = problem()
    arguments = (*arrays, targets.at[jnp.argmax(mask)].set(SHARED), mask, *WEIGHTS)
    (objective, sums), gradients = gradients_of(blockwise(block_size=8, shared_vocabulary=SHARED))(*arguments)
    assert np.isposinf(sums.teacher_ce_sum)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((objective, sums._replace(teacher_ce_sum=0.0), gradients)))


def test_any_block_size_gives_the_same():
    arguments = (*problem(), *WEIGHTS)
    expected = by_definition(plain(top_k=5))(*arguments)
    for block_size in (1, N + 1):
        assert_equal(gradients_of(blockwise(top_k=5, block_size=block_size))(*arguments), expected)


def test_the_kept_set_may_be_all_but_one_token():
    arguments = (*problem(), *WEIGHTS)
    settings = {"top_k": V - 1, "truncation_strategy": "other_bucket"}
    assert_equal(
        gradients_of(blockwise(block_size=8, **settings))(*arguments), by_definition(plain(**settings))(*arguments)
    )


def test_alpha_temperature_and_z_weight_change_without_a_new_compilation():
    arrays = problem()
    loss = gradients_of(blockwise(top_k=5, block_size=8))
    expected = by_definition(plain(top_k=5))
    for weights in ((0.0, 1.0, 0.0), (1.0, 3.0, 0.0), (0.3, 0.5, 1.0)):
        assert_equal(loss(*arrays, *weights), expected(*arrays, *weights))
    assert loss._cache_size() == 1


def test_only_the_student_has_a_gradient():
    arguments = (*problem(), *WEIGHTS)
    loss = blockwise(top_k=5, block_size=8)
    gradients = jax.grad(lambda *arguments: loss(*arguments)[0], argnums=(2, 3, 6, 7, 8), allow_int=True)(*arguments)
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)
    through_sums = jax.grad(lambda *arguments: sum(jax.tree.leaves(loss(*arguments)[1])))(*arguments)
    assert (np.asarray(through_sums) == 0).all()


def test_the_gradient_scales_with_what_the_objective_is_multiplied_by():
    arguments = (*problem(), *WEIGHTS)
    loss = blockwise(block_size=8)
    _, once = gradients_of(loss)(*arguments)
    _, thrice = gradients_of(lambda *arguments: (3.0 * loss(*arguments)[0], None))(*arguments)
    assert_equal(thrice, jax.tree.map(lambda gradient: 3.0 * gradient, once), 1e-6)


def test_a_head_that_is_also_an_embedding_gets_both_gradients():
    *arrays, targets, mask = problem()
    inputs = jnp.roll(targets, 1)

    def tied(loss, gradients_of):
        def whole(_, head, *rest):
            return loss(head["embedding"][inputs] + arrays[0], head, *rest)

        return gradients_of(whole)(*arrays, targets, mask, *WEIGHTS)

    got, expected = tied(blockwise(block_size=8), gradients_of), tied(plain(), by_definition)
    assert_equal(got[1][1], expected[1][1])


@pytest.mark.parametrize("keep", ({"top_p": 0.9}, {}), ids=str)
def test_what_masked_tokens_hold_is_never_read(keep):
    student_hidden, student_head, teacher_hidden, teacher_head, targets, mask = problem()
    loss = gradients_of(blockwise(block_size=8, evaluation=True, **keep))
    clean = loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, mask, *WEIGHTS)
    for poison in (jnp.nan, jnp.inf):
        spoilt = [jnp.where(mask[:, None], hidden, poison) for hidden in (student_hidden, teacher_hidden)]
        wrong_targets = jnp.where(mask, targets, -100)
        got = loss(spoilt[0], student_head, spoilt[1], teacher_head, wrong_targets, mask, *WEIGHTS)
        assert_equal(got, clean, 0.0)
    hidden_gradient = clean[1][0]
    assert (np.asarray(hidden_gradient)[~np.asarray(mask)] == 0).all()
    nothing = loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, mask & False, *WEIGHTS)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(nothing))


def test_a_temperature_of_1_that_is_known_takes_half_of_the_exponentials():
    loss = by_definition(blockwise(block_size=8))
    known = jax.jit(lambda *arguments: loss(*arguments, 0.7, 1.0, 0.01))
    traced = jax.jit(lambda temperature, *arguments: loss(*arguments, 0.7, temperature, 0.01))
    at_1 = jnp.float32(1)
    known, traced = known.lower(*problem()).compile(), traced.lower(at_1, *problem()).compile()
    assert_equal(known(*problem()), traced(at_1, *problem()))
    fewer, more = (program.as_text().count(" exponential(") for program in (known, traced))
    assert 0 < fewer <= more / 2, (fewer, more)


def test_only_as_many_blocks_are_visited_as_the_valid_tokens_fill():
    visits = []

    def counting_project(head, hidden):
        jax.debug.callback(lambda: visits.append(1))
        return teacher_project(head, hidden)

    *arrays, mask = problem()
    loss = jax.jit(blockwise(teacher_project=counting_project, block_size=4))
    for valid, blocks in ((0, 0), (1, 1), (4, 1), (9, 3), (N, 10)):
        visits.clear()
        # Spread over the sequence: padding costs nothing wherever it lies.
        mask = np.zeros(N, bool)
        mask[np.linspace(0, N - 1, valid, dtype=int)] = True
        jax.block_until_ready(loss(*arrays, mask, *WEIGHTS))
        jax.effects_barrier()
        assert len(visits) == blocks


@pytest.mark.parametrize(("strategy", "keep"), tuple(zip(TRUNCATION_STRATEGIES, TRUNCATIONS[1:], strict=True)), ids=str)
def test_a_padded_vocabulary_and_tokens_without_mass_are_no_special_case(strategy, keep):
    *arrays, targets, mask = problem()
    is_padding, is_missing = jnp.arange(V) >= V - 50, jnp.arange(V) % 3 == 0

    def padded_project(head, hidden):
        return jnp.where(is_padding, -jnp.inf, student_project(head, hidden))

    def missing_project(head, hidden):
        return jnp.where(is_padding | is_missing, -jnp.inf, teacher_project(head, hidden))

    targets = targets % (V - 50) // 3 * 3 + 1
    loss = blockwise(padded_project, missing_project, truncation_strategy=strategy, block_size=8, **keep)
    plain_loss = plain(padded_project, missing_project, truncation_strategy=strategy, **keep)
    arguments = (*arrays, targets, mask, *WEIGHTS)
    assert_equal(gradients_of(loss)(*arguments), by_definition(plain_loss)(*arguments))


def test_a_kept_set_of_all_tokens_that_the_models_have_leaves_an_empty_tail():
    hidden = jnp.eye(16)
    student, teacher = (jnp.pad(x, ((0, 0), (0, 40)), constant_values=-jnp.inf) for x in _tables(16, 300))
    arguments = (hidden, student, hidden, teacher, jnp.arange(16), jnp.ones(16, bool), *WEIGHTS)
    settings = {"top_k": 300, "truncation_strategy": "other_bucket"}
    got = gradients_of(blockwise(_look_up, _look_up, block_size=8, **settings))(*arguments)
    full = gradients_of(blockwise(_look_up, _look_up, block_size=8))(*arguments)
    assert_equal((got[0], got[1][1]), (full[0], full[1][1]))
    assert (np.asarray(got[1][1])[:, 300:] == 0).all()


def _look_up(table, hidden):
    """The product of one-hot hidden states and a table that may hold -inf."""
    return table[jnp.argmax(hidden, axis=-1)]


def _tables(positions, vocabulary):
    return map(jnp.asarray, reference.logits_of_every_scale(14, positions, vocabulary))


@pytest.mark.parametrize("strategy", TRUNCATION_STRATEGIES)
def test_logits_of_every_scale_give_the_gradient_of_the_plain_form(strategy):
    # Hidden states of one token each make the head a table of logits, exact to the last digit in any block.
    hidden = jnp.eye(64)
    student, teacher = _tables(64, 300)
    targets, mask = jnp.arange(64), jnp.ones(64, bool)
    settings = {"top_k": 5, "truncation_strategy": strategy}
    arguments = (hidden, student, hidden, teacher, targets, mask, 1.0, 1.0, 0.0)
    (value, _), (_, gradient) = gradients_of(blockwise(matrix_project, matrix_project, block_size=16, **settings))(
        *arguments
    )
    kept = reference.kept_set(np.asarray(teacher), temperature=1.0, top_k=5)
    expected, expected_gradient = reference.kl_and_gradient(
        np.asarray(student), np.asarray(teacher), kept, temperature=1.0, truncation_strategy=strategy
    )
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-5)


def test_negative_zeros_are_equal_to_positive_ones():
    def rounded(head, hidden):
        return jnp.round(jnp.minimum(0.2 * teacher_project(head, hidden), 0.4))

    arguments = (*problem(), *WEIGHTS)
    zeros = rounded(arguments[3], arguments[2]) == 0.0
    assert len(set(jnp.signbit(rounded(arguments[3], arguments[2]))[zeros].tolist())) == 2
    for keep in ({"top_k": 5}, {"top_p": 0.3}):
        got = gradients_of(blockwise(teacher_project=rounded, block_size=8, **keep))(*arguments)
        assert_equal(got, by_definition(plain(teacher_project=rounded, **keep))(*arguments))


def test_bfloat16_models_are_summed_in_float32():
    arguments = (*problem(jnp.bfloat16), *WEIGHTS)
    (objective, sums), gradients = gradients_of(blockwise(top_k=5, block_size=8))(*arguments)
    (expected_objective, expected_sums), expected_gradients = gradients_of(plain(top_k=5))(*arguments)
    # The two round the soft cap at different places, so that logits differ by 2^-8 here and there.
    assert_equal((objective, sums), (expected_objective, expected_sums), 5e-4)
    assert_equal(gradients, expected_gradients, 2**-6)


def test_many_small_blocks_lose_nothing_of_the_heads_gradient():
    arguments = (*problem(tokens=600), *WEIGHTS)
    narrow_head = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arguments[1])
    wide_head = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow_head)
    project = functools.partial(_as_float32, student_project)
    _, (_, got) = gradients_of(blockwise(project, block_size=4))(arguments[0], narrow_head, *arguments[2:])
    _, (_, expected) = gradients_of(plain(project))(arguments[0], wide_head, *arguments[2:])
    # 150 shares are rounded to bfloat16 each, and their sum once: half a step of 2^-7, and a little more.
    assert_equal(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), got), expected, 1.25 * 2**-8)


def _as_float32(project, head, hidden):
    return project(jax.tree.map(lambda x: x.astype(jnp.float32), head), hidden)


def matrix_project(head, hidden):
    return hidden @ head


def compiled(*, tokens, width, vocabulary, block_size, differentiate=True, dtype=jnp.float32, **settings):
    loss = blockwise(matrix_project, matrix_project, block_size=block_size, **settings)
    loss = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True) if differentiate else loss
    hidden, head = jax.ShapeDtypeStruct((tokens, width), dtype), jax.ShapeDtypeStruct((width, vocabulary), dtype)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    targets, mask = (jax.ShapeDtypeStruct((tokens,), kind) for kind in (jnp.int32, jnp.bool_))
    return jax.jit(loss).lower(hidden, head, hidden, head, targets, mask, number, number, number).compile()


@pytest.mark.parametrize(
    ("keep", "strategy"),
    (({}, "renormalize"), ({"top_k": 64}, "other_bucket"), ({"top_p": 0.9}, "other_bucket")),
    ids=str,
)
def test_a_step_costs_the_flops_and_the_memory_that_are_promised(keep, strategy):
    tokens, width, vocabulary, block_size = 4096, 512, 32_768, 256
    program = compiled(
        tokens=tokens, width=width, vocabulary=vocabulary, block_size=block_size, truncation_strategy=strategy, **keep
    )
    # cost_analysis counts the loop's body once: the FLOPs of one block.
    assert program.cost_analysis()["flops"] <= 1.03 * 2 * block_size * vocabulary * (3 * width + width)
    block, head, hidden = (4 * size for size in (block_size * vocabulary, width * vocabulary, tokens * width))
    blocks = 4 if "top_p" in keep else 3
    assert program.memory_analysis().temp_size_in_bytes <= blocks * block + head + hidden
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.as_text())]
    assert max(sizes) < tokens * vocabulary
    assert " sort(" not in program.as_text()


def test_evaluation_does_no_gradient_work():
    shapes = {"tokens": 256, "width": 512, "vocabulary": 4096, "block_size": 64}
    both_projections = 2 * 64 * 4096 * (512 + 512)
    assert compiled(differentiate=False, evaluation=True, **shapes).cost_analysis()["flops"] <= 1.05 * both_projections


@pytest.mark.parametrize(
    ("settings", "named"),
    (
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 8, "top_k": V + 1}, f"top_k={V + 1}"),
        ({"block_size": 8, "top_k": 2, "top_p": 0.5}, "top_k=2 and top_p=0.5"),
        ({"block_size": 8, "shared_vocabulary": V + 1}, f"shared_vocabulary={V + 1}"),
        ({"block_size": 8, "shared_vocabulary": 9, "top_k": 10}, "top_k=10"),
    ),
    ids=str,
)
def test_an_argument_without_meaning_is_an_error_that_names_it(settings, named):
    with pytest.raises(ValueError, match=named):
        blockwise(**settings)(*problem(), *WEIGHTS)


def test_a_temperature_of_zero_is_an_error_that_names_it():
    alpha, _, z_weight = WEIGHTS
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        blockwise(block_size=8)(*problem(), alpha, 0.0, z_weight)


def test_different_vocabularies_are_an_error():
    student_hidden, student_head, teacher_hidden, teacher_head, targets, mask = problem()
    with pytest.raises(ValueError, match=f"{V} and {V - 1} tokens"):
        blockwise(block_size=8)(
            student_hidden, student_head, teacher_hidden, teacher_head[:, 1:], targets, mask, *WEIGHTS
        )


def sharded(mesh, token_axes, vocab_axes, pooled_axes=(), **settings):
    """The loss of tokens and of a vocabulary that are sharded over these axes of the mesh."""
    summed = tuple(axis for axis in token_axes if axis not in pooled_axes)

    def local(*arguments):
        loss = blockwise(vocab_axis=vocab_axes, pooled_axis=pooled_axes, **settings)
        return jax.lax.psum(loss(*arguments), summed)

    token, vocab = (P(axes or None) for axes in (token_axes, vocab_axes))
    heads = {"norm": P(), "embedding": vocab}, P(None, *vocab)
    specs = (token, heads[0], token, heads[1], token, token, P(), P(), P())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())


def truncated_over(layouts, numbers):
    """(settings, layout) for each truncation: one of the layouts, whose number is given."""
    strategies = (*TRUNCATION_STRATEGIES, "renormalize")
    for keep, strategy, number in zip(TRUNCATIONS, strategies, numbers, strict=True):
        yield {"truncation_strategy": strategy, "evaluation": True, **keep}, layouts[number]


def check_sharded_losses():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    *arrays, targets, mask = problem(tokens=40)
    arguments = (*arrays, targets % SHARED, mask, *WEIGHTS)
    layouts = ((("data",), ("tensor",)), (("data", "tensor"), ()), ((), ("data", "tensor")))
    for settings, (token_axes, vocab_axes) in truncated_over(layouts, (0, 2, 0, 1)):
        settings["shared_vocabulary"] = SHARED
        loss = gradients_of(sharded(mesh, token_axes, vocab_axes, block_size=8, **settings))
        program = loss.lower(*arguments).compile()
        assert_equal(program(*arguments), gradients_of(plain(**settings))(*arguments))
        computations = program.as_text().split("\n\n")
        inside = "".join(text for text in computations if not text.lstrip().startswith("ENTRY"))
        moved = re.findall(r"= (.*) all-(?:reduce|gather)(?:-start)?\(", inside)
        # Neither a head nor hidden states nor logits: those would have a dimension of one of these sizes.
        sizes = {int(size) for shape in re.findall(r"\w\d+\[([\d,]+)\]", "".join(moved)) for size in shape.split(",")}
        assert not sizes & {D, V, V // 2, V // 4}
        assert bool(moved) == bool(vocab_axes)


def check_pooled_losses():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    student_hidden, student_head, teacher_hidden, teacher_head, targets, mask = problem(tokens=40)
    # Devices without a valid token take part in the others' blocks; what their tokens hold is not read.
    mask = mask.at[:20].set(False)
    student_hidden, teacher_hidden = (x.at[:20].set(jnp.nan) for x in (student_hidden, teacher_hidden))
    arguments = (student_hidden, student_head, teacher_hidden, teacher_head, targets.at[:20].set(-1), mask, *WEIGHTS)
    layouts = (
        (("data",), ("tensor", "data"), ("data",)),
        (("data", "tensor"), ("tensor",), ("tensor",)),
        (("data", "tensor"), ("data", "tensor"), ("data", "tensor")),
    )
    for settings, layout in truncated_over(layouts, (0, 1, 2, 0)):
        loss = gradients_of(sharded(mesh, *layout, block_size=3, **settings))
        assert_equal(loss(*arguments), gradients_of(blockwise(block_size=8, **settings))(*arguments))


def in_four_devices(check):
    module = check.__module__
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"import {module}; {module}.{check.__name__}()"]
    process = subprocess.run(command, env=os.environ | environment(devices=4) | paths, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]


def check_sharded_counting():
    """What accelerators do, of a vocabulary that is sharded: `platform_dependent` chooses another way on this one."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    _, teacher = reference.logits_of_every_scale(3, 40, 2000)
    for logits in (jnp.asarray(teacher), jnp.asarray(teacher, jnp.bfloat16), jnp.round(jnp.asarray(teacher) / 1e3)):
        for keep in ({"top_k": 30, "top_p": 0.0}, {"top_k": 0, "top_p": 0.9}):

            def kept(logits, axes=(), keep=keep):
                vocabulary = Vocabulary(axes)
                bound = counted_bound(logits, temperature=2.0, vocabulary=vocabulary, **keep)
                return bound.keeps(logits, vocabulary.ids(logits))

            specs = {"in_specs": P(None, "tensor"), "out_specs": P(None, "tensor")}
            on_four = jax.shard_map(functools.partial(kept, axes=("tensor",)), mesh=mesh, **specs)
            np.testing.assert_array_equal(jax.jit(on_four)(logits), jax.jit(kept)(logits))


def test_a_bound_that_is_counted_over_shards_is_that_of_the_whole_vocabulary():
    in_four_devices(check_sharded_counting)


def test_sharded_tokens_and_vocabulary_give_the_same_without_moving_heads_in_the_loop():
    in_four_devices(check_sharded_losses)


def test_blocks_gathered_over_the_axis_that_shards_the_vocabulary_give_the_same():
    in_four_devices(check_pooled_losses)


def test_a_vocabulary_axis_that_shards_no_head_is_an_error():
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    loss = blockwise(vocab_axis="tensor", block_size=8)
    replicated = jax.shard_map(loss, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="vocab_axis=\\('tensor',\\)"):
        replicated(*problem(), *WEIGHTS)
