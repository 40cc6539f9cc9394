"""The laws of what is stored of a teacher: it is the definition's, and what was stored teaches as the teacher does."""

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
from test_stored import assert_teaches_as, entropy, problem, project, walked

from MaxText.distill.projection import Projection
from MaxText.distill.stored import StoredTeacher
from MaxText.distill.systematic import systematic_draws
from MaxText.distill.targets import teacher_targets
from MaxText.distill.teacher_side import LiveTeacher
from MaxText.distill.vocabulary import Vocabulary

N, V, SHARED = 19, 64, 50
DRAWS = 24
KINDS = ({"draws": DRAWS}, {"top_k": 8}, {"top_k": SHARED})
TEMPERATURES = (1.0, 2.0)
# Each kind at one of them.
few_kinds = pytest.mark.parametrize(
    ("kind", "temperature"), few(tuple(zip(KINDS, (2.0, 2.0, 1.0), strict=True)), product(KINDS, TEMPERATURES)), ids=str
)


def offsets(tokens=N):
    return jnp.asarray(np.random.default_rng(5).random(tokens), jnp.float32)


def targets_of(hidden, head, tokens, *, block_size=4, **settings):
    return teacher_targets(
        Projection(hidden, head, project),
        tokens.mask,
        tokens.targets,
        offsets(len(hidden)) if "draws" in settings else None,
        block_size=block_size,
        **settings,
    )


@few_kinds
def test_what_is_stored_is_what_the_definitions_say(kind, temperature):
    _, _, hidden, head, tokens = problem()
    # A tie at the border of the k largest, and masked tokens that hold anything.
    head = head.at[:, 7].set(head[:, 3])
    mask = np.asarray(tokens.mask)
    spoilt = tokens._replace(targets=jnp.where(tokens.mask, tokens.targets, -100))
    spoilt_hidden = jnp.where(tokens.mask[:, None], hidden, jnp.nan)
    settings = {"temperature": temperature, "shared_vocabulary": SHARED, **kind}
    got = jax.jit(lambda: targets_of(spoilt_hidden, head, spoilt, **settings))()
    logits = np.where(np.arange(V) < SHARED, np.asarray(hidden @ head), -np.inf)
    log_p = reference.log_softmax(logits, temperature)
    at_target = np.take_along_axis(reference.log_softmax(logits, 1.0), np.asarray(tokens.targets)[:, None], -1)
    np.testing.assert_allclose(got.entropy, np.where(mask, entropy(log_p), 0.0), atol=1e-5)
    np.testing.assert_allclose(got.target_log_prob, np.where(mask, at_target[:, 0], 0.0), atol=1e-5)
    assert (np.asarray(got.ids)[~mask] == V).all() and got.ids.dtype == jnp.int32
    ids = np.asarray(got.ids)[mask]
    if "draws" in kind:
        assert got.log_probs is None and got.log_tail is None
        expected = systematic_draws(
            jnp.asarray(logits, jnp.float32)[mask],
            offsets()[mask][:, None],
            jnp.asarray(logits.max(axis=-1, keepdims=True), jnp.float32)[mask],
            draws=DRAWS,
            temperature=temperature,
            vocabulary=Vocabulary(),
        )
        np.testing.assert_array_equal(ids, expected.ids)
        return
    np.testing.assert_array_equal(ids, np.sort(reference.order_of(logits[mask])[:, : kind["top_k"]], axis=-1))
    np.testing.assert_allclose(np.asarray(got.log_probs)[mask], np.take_along_axis(log_p[mask], ids, -1), atol=2e-5)
    np.put_along_axis(outside := log_p[mask].copy(), ids, -np.inf, axis=-1)
    np.testing.assert_allclose(np.asarray(got.log_tail)[mask], reference.log_sum_exp(outside)[:, 0], atol=2e-5)
    assert np.isneginf(got.log_tail[~mask]).all() and np.isneginf(got.log_probs[~mask]).all()


@pytest.mark.parametrize(("temperature", "k"), few(((1.0, V), (2.0, 8)), product(TEMPERATURES, (8, V))))
def test_what_is_stored_of_the_k_largest_teaches_as_the_teacher(temperature, k):
    hidden, head, teacher_hidden, teacher_head, tokens = problem()
    found = targets_of(teacher_hidden, teacher_head, tokens, top_k=k, temperature=temperature)
    stored = StoredTeacher(*found, temperature=temperature)
    live = LiveTeacher(Projection(teacher_hidden, teacher_head, project), top_k=k)
    got, expected = (walked(teacher, tokens, "other_bucket", temperature)(hidden, head) for teacher in (stored, live))
    assert_teaches_as(got, expected)


def test_a_tail_that_is_smaller_than_any_rounding_of_one_is_stored():
    logits = jnp.zeros((1, V)).at[0, 5].set(90.0)
    found = teacher_targets(
        Projection(jnp.ones((1, 1)), logits, project), jnp.array([True]), jnp.array([0]), block_size=1, top_k=1
    )
    np.testing.assert_allclose(found.log_tail, np.log(V - 1) - 90.0, rtol=1e-6)


def test_no_array_is_as_large_as_all_tokens_logits():
    tokens, width, size, block_size = 2048, 64, 16_384, 64
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, width), (width, size), (tokens,))]

    def found(hidden, head, offsets, **kind):
        mask, targets = jnp.ones(tokens, bool), jnp.zeros(tokens, jnp.int32)
        return teacher_targets(Projection(hidden, head, project), mask, targets, offsets, block_size=block_size, **kind)

    drawn = jax.jit(lambda *arrays: found(*arrays, draws=50))
    largest = jax.jit(lambda hidden, head, _: found(hidden, head, None, top_k=64))
    for program in (drawn, largest):
        temporaries = program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        # Some arrays of a block, and what is found.
        assert temporaries <= 4 * (4 * block_size * size + 4 * tokens * 64)


@pytest.mark.parametrize(
    ("settings", "named"),
    (
        ({"block_size": 0, "top_k": 1}, "block_size=0"),
        ({}, "draws=0 and top_k=0"),
        ({"draws": 2, "top_k": 2}, "draws=2 and top_k=2"),
        ({"top_k": V + 1}, f"top_k={V + 1}"),
        ({"top_k": SHARED + 1, "shared_vocabulary": SHARED}, f"top_k={SHARED + 1}"),
        ({"top_k": 2, "temperature": 0.0}, r"temperature=0\.0"),
        ({"top_k": 2, "shared_vocabulary": V + 1}, f"shared_vocabulary={V + 1}"),
        ({"top_k": 2, "vocab_axis": "tensor"}, "vocab_axis="),
    ),
    ids=str,
)
def test_an_argument_without_meaning_is_an_error_that_names_it(settings, named):
    _, _, hidden, head, tokens = problem()
    with pytest.raises(ValueError, match=named):
        targets_of(hidden, head, tokens, **settings)


def test_draws_want_an_offset_per_token_and_the_largest_want_none():
    _, _, hidden, head, tokens = problem()
    for kind, given in (({"draws": 3}, None), ({"top_k": 3}, offsets())):
        with pytest.raises(ValueError, match="an offset per token"):
            teacher_targets(Projection(hidden, head, project), *tokens[::-1], given, block_size=4, **kind)


def check_sharded_targets():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    _, _, hidden, head, tokens = problem(tokens=40)
    tokens = tokens._replace(mask=tokens.mask.at[:20].set(False))
    layouts = (
        (("data",), ("tensor",), ()),
        ((), ("data", "tensor"), ()),
        (("data", "tensor"), (), ()),
        (("data",), ("tensor", "data"), ("data",)),
    )
    for kind in KINDS[:2]:
        settings = {"temperature": 2.0, "shared_vocabulary": SHARED, **kind}
        expected = targets_of(hidden, head, tokens, **settings)
        for token_axes, vocab_axes, pooled_axes in layouts:
            token, head_spec = P(token_axes or None), P(None, vocab_axes or None)

            def local(hidden, head, offsets, tokens, axes=(vocab_axes, pooled_axes), settings=settings):
                given = offsets if "draws" in settings else None
                arguments = Projection(hidden, head, project), tokens.mask, tokens.targets, given
                return teacher_targets(*arguments, block_size=3, vocab_axis=axes[0], pooled_axis=axes[1], **settings)

            found = jax.shard_map(local, mesh=mesh, in_specs=(token, head_spec, token, token), out_specs=token)
            got = jax.jit(found)(hidden, head, offsets(40), tokens)
            np.testing.assert_array_equal(got.ids, expected.ids)
            finite = jax.tree.map(lambda x: jnp.where(jnp.isneginf(x), 0.0, x), (got[1:], expected[1:]))
            assert_equal(*finite)


@pytest.mark.slow
def test_a_teacher_on_several_devices_gives_the_same():
    in_four_devices(check_sharded_targets)


@few_kinds
def test_bfloat16_logits_store_what_their_float32_values_store(kind, temperature):
    """As a teacher that computes in bfloat16 gives them: of its numbers nothing is rounded once more."""
    _, _, hidden, head, tokens = problem()
    logits = (8 * hidden @ head).astype(jnp.bfloat16)
    rows, settings = jnp.eye(len(logits)), {"temperature": temperature, "block_size": 4, **kind}
    drawn = offsets(len(logits)) if "draws" in kind else None

    def stored(table):
        return teacher_targets(
            Projection(rows, table, lambda table, rows: table[jnp.argmax(rows, axis=-1)]),
            tokens.mask,
            tokens.targets,
            drawn,
            **settings,
        )

    got, expected = (jax.tree.leaves(jax.jit(stored)(table)) for table in (logits, logits.astype(jnp.float32)))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)  # -inf at masked tokens
