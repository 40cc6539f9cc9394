"""The teacher alone: what is stored of it, for a batch of rows.

Its head is walked over in blocks of tokens, as the loss does it, so that no logits [B, L, V] exist. Rows are whole on
a device when they leave the step: each host writes those that it has read.
"""

# B batch, L positions

import functools
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt32

from MaxText.config.keys import Distillation
from MaxText.distill.projection import Projection
from MaxText.distill.targets import Targets, teacher_targets
from MaxText.loop import flags
from MaxText.loop.step import forward
from MaxText.models import heads
from MaxText.models.teacher import Teacher

Batch = dict[str, jax.Array]
ROW_KEY = "row_key"  # in a batch: what a row's draws are a function of, [B]


def whole_rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Arrays [B, ...] of which each device has rows; every host's in the order in which it gave them."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def jitted(config: Any, kd: Distillation, teacher: Teacher, mesh: jax.sharding.Mesh) -> Any:
    """(teacher's state, batch) -> `Targets` of its tokens, [B, L, ...]."""
    function = functools.partial(batch_targets, config, kd, teacher, mesh)
    rows = whole_rows(mesh)
    options = flags.compiler_options(config, mesh, distils=True)
    return jax.jit(function, in_shardings=(teacher.shardings, rows), out_shardings=rows, compiler_options=options)


def batch_targets(
    config: Any, kd: Distillation, teacher: Teacher, mesh: jax.sharding.Mesh, state: nnx.State, batch: Batch
) -> Targets:
    """What the teacher says of a batch.

    Args:
      config: MaxText's configuration of the run.
      kd: what is stored: kd_cache_mode, its number, kd_temperature.
      teacher: its graph.
      mesh: the run's mesh.
      state: the teacher's arrays.
      batch: rows, and of each its key.
    """
    model = nnx.merge(teacher.graphdef, state, copy=True)
    keys, mask = batch[ROW_KEY], batch["targets_segmentation"] != 0
    with logical_axis_rules(teacher.config.logical_axis_rules):
        reported = forward(model, teacher.config, batch, enable_dropout=False)
        layout = heads.Layout(mesh, batch["targets"].shape, None, teacher.config, kd)
    hidden = heads.normed_hidden_states(model, reported, enable_dropout=False)
    guide, spec = heads.projection(heads.Side(teacher.config, heads.head_of(model), hidden), layout)
    offsets = None
    if kd.kd_cache_mode == "sample":
        offsets = offsets_of(config.data_shuffle_seed, keys, mask.shape[1])

    def local(guide: Projection, mask: Array, targets: Array, offsets: Array | None) -> Targets:
        found = teacher_targets(
            heads.flat_rows(guide),
            heads.flat(mask),
            heads.flat(targets),
            None if offsets is None else heads.flat(offsets),
            block_size=layout.walk.block,
            temperature=kd.kd_temperature,
            draws=kd.kd_cache_draws if kd.kd_cache_mode == "sample" else 0,
            top_k=kd.kd_top_k,
            shared_vocabulary=kd.kd_vocab_size,
            vocab_axis=layout.vocab_axes,
            pooled_axis=layout.pooled_axes,
        )
        return jax.tree.map(lambda x: x.reshape(*mask.shape, *x.shape[1:]), found)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, layout.tokens, layout.tokens, layout.tokens), out_specs=layout.tokens
    )
    return sharded(guide, mask, batch["targets"], offsets)


def offsets_of(seed: int, keys: UInt32[Array, "B"], length: int) -> Float[Array, "B L"]:
    """In [0, 1), one per position: a function of the seed and the row, wherever in the data it stands."""
    generator = jax.random.key(seed, impl="threefry2x32")

    def of_row(key: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(generator, key), (length,))

    return jax.vmap(of_row)(keys)
