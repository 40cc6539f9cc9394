"""The loss alone: the sum's value and its gradients for the hidden states [N, D] and the head [D, V].

Beside our loss stand what it replaces: cross-entropy, dense and tiled as upstream does it, and a distillation that
has both models' logits in memory. Stored targets are random, with all slots in use: the value does not matter.
"""

import functools
import math
import types
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from MaxText import upstream
from MaxText.benchmarks import liger, programs
from MaxText.benchmarks.programs import Program, Row, Sizes, Truncation
from MaxText.chips import chip_of
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens, blockwise_kd
from MaxText.distill.divergences import FORWARD_KL
from MaxText.distill.kd_loss import cross_entropy, kd_sums
from MaxText.distill.projection import Projection
from MaxText.distill.stored import StoredTeacher
from MaxText.distill.teacher_side import LiveTeacher
from MaxText.models import heads, walk

# N tokens, D student's width, E teacher's width, V vocabulary

TEACHER_SPREAD = 8.0  # standard deviation of the teacher's logits: at T = 2 a nucleus of 0.9 holds about 1 % of V


def project(head: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ head


class Shell(nnx.Module):
    """The part of a model that upstream's tiled cross-entropy asks for: its head."""

    def __init__(self, head: jax.Array):
        self.logits_dense = nnx.Param(head)
        self.mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    def logits_from_hidden_states_for_vocab_tiling(self, hidden, deterministic, model_mode):
        return (hidden @ self.logits_dense.get_value()).astype(jnp.float32)


def upstream_tiled_ce(vocabulary: int, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    config = types.SimpleNamespace(
        enable_dropout=False,
        shard_mode=upstream.types.ShardMode.AUTO,
        debug_sharding=False,
        vocab_tiling_ag_once=False,
        num_vocab_tiling=programs.TILES,
        vocab_size=vocabulary,
        z_loss_multiplier=0.0,
    )
    data = {"targets": targets[None], "targets_segmentation": jnp.ones_like(targets)[None]}
    return upstream.pre_train.vocab_tiling_nnx_loss(Shell(head), hidden[None], data, config, True)[0]


def dense_kd(kept: Truncation, hidden, head, teacher_hidden, teacher_head, targets) -> jax.Array:
    sums = kd_sums(
        project(head, hidden),
        project(teacher_head, teacher_hidden),
        targets,
        jnp.ones(targets.shape, bool),
        temperature=programs.TEMPERATURE,
        top_k=kept.top_k,
        top_p=kept.top_p,
        truncation_strategy=kept.strategy,
    )
    return (1 - programs.ALPHA) * sums.ce_sum + programs.ALPHA * sums.kd_sum


def block_kd(kept: Truncation, block: int, hidden, head, teacher_hidden, teacher_head, targets) -> jax.Array:
    objective, _ = blockwise_kd(
        Projection(hidden, head, project),
        LiveTeacher(Projection(teacher_hidden, teacher_head, project), kept.top_k, kept.top_p),
        Tokens(targets, jnp.ones(targets.shape, bool)),
        Weights(programs.ALPHA, programs.TEMPERATURE),
        divergence=FORWARD_KL[kept.strategy],
        block_size=block,
    )
    return objective


def stored_kd(kept: Truncation, block: int, hidden, head, stored, targets) -> jax.Array:
    objective, _ = blockwise_kd(
        Projection(hidden, head, project),
        stored,
        Tokens(targets, jnp.ones(targets.shape, bool)),
        Weights(programs.ALPHA, programs.TEMPERATURE),
        divergence=FORWARD_KL[kept.strategy],
        block_size=block,
    )
    return objective


def stored_targets(kept: Truncation, shape: tuple[int, ...], vocabulary: int) -> StoredTeacher:
    """As many ids as there are slots at each position of `shape`."""
    slots = kept.top_k or min(programs.DRAWS, vocabulary)
    keys = jax.random.split(jax.random.key(1), 2)
    each = vocabulary // slots
    ids = each * jnp.arange(slots) + jax.random.randint(keys[0], (*shape, slots), 0, each)
    log_weights = jax.nn.log_softmax(jax.random.normal(keys[1], ids.shape))
    half = jnp.full(shape, math.log(0.5), jnp.float32)
    is_drawn = not kept.top_k
    return StoredTeacher(
        ids=ids.astype(jnp.int32),
        log_weights=log_weights if is_drawn else log_weights + half[..., None],
        log_tail=None if is_drawn else half,
        target_log_prob=half,
        entropy=-half,
        temperature=programs.TEMPERATURE,
    )


def loss_inputs(
    tokens: int, vocabulary: int, width: int, teacher_width: int, dtype: str = "float32"
) -> tuple[jax.Array, ...]:
    """Hidden states and heads of student and teacher, and targets."""
    keys = jax.random.split(jax.random.key(0), 5)

    def normal(key: jax.Array, *shape: int, spread: float = 1.0) -> jax.Array:
        return (spread * jax.random.normal(key, shape)).astype(dtype)

    return (
        normal(keys[0], tokens, width),
        normal(keys[1], width, vocabulary, spread=1 / math.sqrt(width)),
        normal(keys[2], tokens, teacher_width),
        normal(keys[3], teacher_width, vocabulary, spread=TEACHER_SPREAD / math.sqrt(teacher_width)),
        jax.random.randint(keys[4], (tokens,), 0, vocabulary),
    )


def block_of(sizes: Sizes, tokens: int, vocabulary: int, kept: Truncation, teacher_width: int) -> int:
    """Tokens of a block as the trainer would take them on this device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    config = types.SimpleNamespace(logits_dot_in_fp32=False, dtype=sizes.dtype)
    logit_bytes = heads.logit_bytes(mesh, config, programs.distillation(sizes, kept))
    projected = walk.Heads(vocabulary, sizes.width, teacher_width, logit_bytes)
    return walk.plan(projected, tokens, 1, chip_of(mesh), sizes.block_mib * walk.MIB).block


def peers(sizes: Sizes, tokens: int, vocabulary: int, rounds: int) -> list[Row]:
    """The rows of other packages that are installed; before this process takes the GPU's memory."""
    if not rounds or not liger.is_here():
        return []
    shape = (tokens, vocabulary, sizes.width, sizes.teacher_width)
    flops = programs.kd_flops(*shape)

    def row(found: dict) -> Row:
        times = {"seconds": found["seconds"], "temp_bytes": found["temp_bytes"]}
        return Row("loss", programs.LIGER, *shape, flops=flops, block=found["chunk"], **times)

    return [row(found) for found in liger.measured(*shape, rounds)]


def loss_programs(sizes: Sizes, tokens: int, vocabulary: int) -> Iterator[Program]:
    """Each row of the loss for one shape, compiled when it is asked for."""
    shape = (tokens, vocabulary, sizes.width, sizes.teacher_width)
    inputs = loss_inputs(*shape, sizes.dtype)
    student_alone = (inputs[0], inputs[1], inputs[4])

    def program(name: str, flops: float, loss: Callable, arguments: tuple, block: int | None = None) -> Program:
        row = Row("loss", name, *shape, flops=flops, block=block)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return Program(programs.analysed(row, compiled), functools.partial(compiled, *arguments))

    def dense_ce(hidden, head, targets):
        return jnp.sum(cross_entropy(project(head, hidden), targets))

    ce = programs.ce_flops(tokens, vocabulary, sizes.width)
    tiled = programs.ce_flops(tokens, vocabulary, sizes.width, projections=2)  # once more in the backward pass
    kd = programs.kd_flops(*shape)
    yield program(programs.CE_DENSE, ce, dense_ce, student_alone)
    yield program(programs.CE_TILED, tiled, functools.partial(upstream_tiled_ce, vocabulary), student_alone)
    yield program(programs.KD_DENSE, kd, functools.partial(dense_kd, Truncation("full")), inputs)
    for kept in programs.truncations(vocabulary):
        block = block_of(sizes, tokens, vocabulary, kept, sizes.teacher_width)
        yield program(f"KD, blockwise, {kept.name}", kd, functools.partial(block_kd, kept, block), inputs, block)
    for kept in programs.stored(vocabulary):
        block = block_of(sizes, tokens, vocabulary, kept, 0)
        arguments = (*inputs[:2], stored_targets(kept, (tokens,), vocabulary), inputs[4])
        yield program(f"KD, stored, {kept.name}", ce, functools.partial(stored_kd, kept, block), arguments, block)
