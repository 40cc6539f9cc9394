"""Laws of the program that a TPU would run for the loss, as its compiler writes it: no TPU is needed, libtpu is.

Figures are per token and vocabulary entry of a block; docs/design/blockwise.md has them.
"""

import contextlib
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WITHOUT_LIBTPU
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from MaxText import upstream
from MaxText.chips import CHIPS
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens, blockwise_kd
from MaxText.distill.projection import Projection
from MaxText.distill.targets import teacher_targets
from MaxText.distill.teacher_side import LiveTeacher
from MaxText.distill.term_sums import divergence_of
from MaxText.distill.terms.named import term_named
from MaxText.models.walk import Heads, plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WITHOUT_LIBTPU, reason="libtpu is not installed (bash setup.sh tpu)"),
]

TOKENS, VOCABULARY, D, E = 8192, 151936, 1024, 2560  # of a device: qwen3-4b teaches qwen3-0.6b
TEMPERATURE = 2.0
CLOCK = 1.5e9  # of the cycles that the compiler estimates for a v5e
SEARCH_ROUNDS = 5


def project(head, hidden):
    return hidden @ head.astype(hidden.dtype).T


@functools.cache
def program(pool, top_k=0, top_p=0.0, divergence="forward_kl", is_scheduled=False):
    """(optimised HLO, tokens and vocabulary entries of a device's block) for a v5e, with the planner's block."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    upstream.load_libtpu()
    block = plan(Heads(VOCABULARY, D, E, 6), TOKENS, pool, CHIPS["TPU v5 lite"], 0).block
    devices = upstream.topology_devices("v5e-16" if pool > 1 else "v5e-1", 1)
    axes = ("fsdp",) if pool > 1 else ()
    term = term_named(divergence, jsd_beta=0.5, skew=0.1)

    def loss(hidden, head, teacher_hidden, teacher_head, targets, mask, alpha, temperature):
        return blockwise_kd(
            Projection(hidden, head, project),
            LiveTeacher(Projection(teacher_hidden, teacher_head, project), top_k, top_p),
            Tokens(targets, mask),
            Weights(alpha, temperature if is_scheduled else TEMPERATURE),
            divergence=divergence_of(term, "renormalize"),
            block_size=block,
            vocab_axis=axes,
            pooled_axis=axes,
        )

    token, nowhere = P(axes or None), P()
    shapes = (
        *(((TOKENS * pool, D), "bfloat16"), ((VOCABULARY, D), "float32"), ((TOKENS * pool, E), "bfloat16")),
        *(((VOCABULARY, E), "bfloat16"), ((TOKENS * pool,), "int32"), ((TOKENS * pool,), "bool")),
        *(((), "float32"), ((), "float32")),
    )
    specs = (token,) * 6 + (nowhere,) * 2
    context = contextlib.nullcontext()
    if pool > 1:
        mesh = Mesh(np.array(devices[:pool]), axes)
        loss = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=nowhere)
        context = jax.set_mesh(mesh)

    def argument(shape, dtype, spec):
        sharding = NamedSharding(mesh, spec) if pool > 1 else SingleDeviceSharding(devices[0])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    arguments = [argument(*shape, spec) for shape, spec in zip(shapes, specs, strict=True)]
    with context:
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).trace(*arguments)
        return traced.lower().compile().as_text(), (block * pool, VOCABULARY // pool)


def computations(text):
    """Name -> lines."""
    parts = re.split(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$", text, flags=re.M)[1:]
    return {name: body.splitlines() for name, body in zip(parts[::2], parts[1::2], strict=True)}


def bodies(text):
    """Lines of the walk's body, and of the loop in it, if there is one: the search for a bound."""
    parts = computations(text)

    def loops(lines):
        return [found for line in lines for found in re.findall(r" while\(.*body=%([\w.\-]+)", line)]

    def is_walk(name):
        return any("estimated_cycles" in line and "convolution" in line for line in parts[name])

    (walk,) = (name for lines in list(parts.values()) for name in loops(lines) if is_walk(name))
    inner = loops(parts[walk]) or [
        name
        for line in parts[walk]
        for branch in re.findall(r"(?:branch_computations=\{|to_apply=)%([\w.\-]+)", line)
        for name in loops(parts.get(branch, ()))
    ]
    return parts[walk], [line for name in inner for line in parts[name]]


def cycles(lines, entries):
    """Picoseconds by the compiler's estimate."""
    return 1e12 / CLOCK / entries * sum(int(n) for line in lines for n in re.findall(r'estimated_cycles":"(\d+)', line))


def logit_bytes(lines, shape):
    """Of HBM that is read and written for arrays of a block's logits; those in layout S(n) lie in faster memory.

    Who reads a part of an array, as the gather at the targets does, is charged with all of it.
    """
    sizes = {"bf16": 2, "f32": 4}
    pattern = rf"(bf16|f32)\[{shape[0]},{shape[1]}\](?:\{{[^}}]*\}})?"
    held, total = {}, 0
    for line in lines:
        found = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)$", line)
        if not found:
            continue
        name, rest = found.groups()
        operation = re.search(r" ([\w\-]+)\((.*)", rest)
        results = [match for match in re.finditer(pattern, rest[: operation.start()])]
        held[name] = sum(sizes[match[1]] for match in results if "S(" not in match[0])
        if operation[1] in ("fusion", "copy", "convolution", "reduce", "gather", "scatter"):
            operands = re.findall(r"%([\w.\-]+)", operation[2].split("),")[0])
            total += held[name] + sum(held.get(operand, 0) for operand in operands)
    return total


@pytest.mark.parametrize(
    ("pool", "most_bytes", "most_ps"), [(1, 20, 90), (16, 10, 72.3)], ids=["alone", "pooled over 16"]
)
def test_the_loss_reads_and_computes_no_more_than_it_must(pool, most_bytes, most_ps):
    text, shape = program(pool)
    walk, search = bodies(text)
    assert not search
    assert 6 <= logit_bytes(walk, shape) <= most_bytes
    ideal = 1e12 * 2 * (3 * D + E) / CHIPS["TPU v5 lite"].flops
    assert ideal < cycles(walk, shape[0] * shape[1]) <= most_ps


def test_a_temperature_that_a_schedule_changes_costs_nothing():
    (constant, shape), (scheduled, _) = program(1), program(1, is_scheduled=True)
    entries = shape[0] * shape[1]
    assert cycles(bodies(scheduled)[0], entries) <= 1.01 * cycles(bodies(constant)[0], entries)


@pytest.mark.parametrize("keep", [{"top_k": 64}, {"top_p": 0.9}], ids=str)
def test_a_truncation_costs_a_few_visits_of_the_logits(keep):
    text, shape = program(1, **keep)
    walk, search = bodies(text)
    assert 22 < logit_bytes(walk, shape) <= 34 and logit_bytes(search, shape) == 2
    (full, _), entries = bodies(program(1)[0]), shape[0] * shape[1]
    assert cycles(walk, entries) + SEARCH_ROUNDS * cycles(search, entries) <= 1.85 * cycles(full, entries)


@pytest.mark.parametrize(
    ("pool", "divergence", "most_bytes", "most_ps"),
    [(1, "reverse_kl", 26, 106.5), (1, "jsd", 26, 106.5), (16, "jsd", 8, 82)],
    ids=["reverse_kl, alone", "jsd, alone", "jsd, pooled over 16"],
)
def test_another_divergence_costs_a_visit_of_the_logits_and_no_array(pool, divergence, most_bytes, most_ps):
    text, shape = program(pool, divergence=divergence)
    walk, entries = bodies(text)[0], shape[0] * shape[1]
    assert logit_bytes(walk, shape) <= most_bytes
    assert cycles(walk, entries) <= most_ps
    assert not [line for line in walk if re.search(rf"= \(?[^=]*f32\[{shape[0]},{shape[1]}\]", line)]


@pytest.mark.parametrize("keep", [{}, {"top_k": 64}, {"top_p": 0.9}], ids=str)
def test_no_float32_array_of_a_block_s_logits_is_written(keep):
    text, shape = program(1, **keep)
    for lines in bodies(text):
        written = [line for line in lines if re.search(rf"= \(?[^=]*f32\[{shape[0]},{shape[1]}\]", line)]
        assert not written, written[:3]


def test_of_a_draw_only_its_chunk_is_looked_up():
    """A TPU gathers one row after the other, so that a lookup costs as much as a hundred comparisons."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    upstream.load_libtpu()
    sharding = SingleDeviceSharding(upstream.topology_devices("v5e-1", 1)[0])
    n, vocabulary, draws = 2048, VOCABULARY // 16, 50

    def targets(hidden, head, mask, targets, offsets):
        return teacher_targets(Projection(hidden, head, project), mask, targets, offsets, block_size=n, draws=draws)

    shapes = [((n, E), "bfloat16"), ((vocabulary, E), "bfloat16"), ((n,), "bool"), ((n,), "int32"), ((n,), "float32")]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in shapes]
    text = jax.jit(targets).lower(*arguments).compile().as_text()
    looked_up = re.findall(rf" = \w+(\[{n},{draws}[\d,]*\])\S* gather\(", text)
    assert looked_up == [f"[{n},{draws},128]"]
    assert not re.search(r" sort\(", text)
