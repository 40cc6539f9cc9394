"""At which positions the student learns from its teacher: at those where it is least sure itself (kd_positions).

SE-KD (arXiv:2602.01395): a share of the positions, those of highest student entropy, carries the divergence; the
cross-entropy is taken at all. The share is one of the whole step's valid tokens, over microbatches and devices.
"""

# B batch, L positions

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from MaxText.config.keys import Distillation
from MaxText.distill import entropy
from MaxText.distill.projection import Projection
from MaxText.models import heads


def entropies(mesh: Mesh, kd: Distillation, student: heads.Side, mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """The entropy of the student's distribution at T = 1, in nats, at valid positions; 0 at the others."""
    layout = heads.Layout(mesh, mask.shape, student.config, None, kd)
    learner, spec = heads.projection(student, layout)

    def local(learner: Projection, mask: Bool[Array, "b l"]) -> Float[Array, "b l"]:
        found = entropy.entropies(
            heads.flat_rows(learner),
            heads.flat(mask),
            block_size=layout.walk.block,
            vocab_axis=layout.vocab_axes,
            pooled_axis=layout.pooled_axes,
        )
        return found.reshape(mask.shape)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, layout.tokens), out_specs=layout.tokens)
    return sharded(learner, mask)


def choose(entropies: Float[Array, "..."], mask: Bool[Array, "..."], share: float) -> heads.Chosen:
    """The valid positions of highest entropy: `share` of them, to the nearest whole number and one at least.

    Of equal entropies the earlier position's goes first.
    """
    n = jnp.sum(mask, dtype=jnp.int32)
    number = jnp.clip(jnp.round(share * n).astype(jnp.int32), 1, jnp.maximum(n, 1))
    flat = jnp.where(mask, entropies, -jnp.inf).reshape(-1)
    order = jnp.argsort(flat, descending=True, stable=True)
    first = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) < number)
    return heads.Chosen(first.reshape(mask.shape) & mask, number / jnp.maximum(n, 1))
