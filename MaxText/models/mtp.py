"""Multi-token prediction under distillation: MTP heads go through the blockwise loss, too.

MaxText's MTP block projects each depth's hidden states to logits [B, L, V] inside the model. Under use_kd the decoder
hands it logits of nothing and reports the hidden states instead, so that a head at depth k is one more walk of the loss
over blocks: of cross-entropy alone, of the teacher's next-token distribution k positions on (kd_mtp_alpha), or of the
model's own, for the acceptance rate. docs/design/mtp.md defines the loss. Left out on purpose: the MTP block itself,
which is upstream's.
"""

# B batch, L positions, D width, E teacher's width; depth k predicts the token k + 1 positions on

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from MaxText import upstream
from MaxText.config.keys import Distillation
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens
from MaxText.distill.kd_loss import KDSums
from MaxText.distill.truncation import Scalar
from MaxText.models import heads

Batch = dict[str, jax.Array]


def depths(
    data: Batch, reported: dict[str, Any], ahead: Float[Array, "B L E"]
) -> Iterator[tuple[Float[Array, "B L D"], Float[Array, "B L E"], Tokens]]:
    """Per depth, the MTP layer's normed hidden states, and `ahead` and the tokens where its predictions lie.

    They are shifted as MaxText's block shifts them: what would come from beyond a document's end is masked.
    """
    shifted = upstream.multi_token_prediction.roll_and_mask_by_segment
    targets, mask, segments = data["targets"], data["targets_segmentation"] != 0, data["inputs_segmentation"]
    for hidden in reported["decoder"][heads.MTP_HIDDEN_STATES]:
        targets, mask, ahead = (shifted(x, segments) for x in (targets, mask, ahead))
        segments = upstream.multi_token_prediction.roll_and_mask(segments)
        yield hidden, ahead, Tokens(targets, mask != 0)


def loss(
    mesh: Mesh,
    kd: Distillation,
    student: heads.Side,
    teacher: Any,
    data: Batch,
    reported: dict[str, Any],
    temperature: Scalar,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The MTP loss, scaled as MaxText scales it, and the cross-entropy and T^2 D in it, unscaled; nats per token.

    loss = mtp_loss_scaling_factor * ((1 - kd_mtp_alpha) * CE + kd_mtp_alpha * T^2 D), CE and D means over the valid
    positions of all depths, D the divergence of the head from the teacher.

    Args:
      mesh: the run's mesh.
      kd: the distillation settings; truncation and shared vocabulary hold here as well.
      student: the model itself; its MTP layers share its head.
      teacher: a model's side; not read where kd_mtp_alpha is 0.
      data: the batch.
      reported: what the student's layers reported.
      temperature: of the step at hand.
    """
    weights = Weights(jnp.float32(kd.kd_mtp_alpha), temperature)
    total: Any = None
    reads_teacher = kd.kd_mtp_alpha > 0
    for hidden, ahead, tokens in depths(data, reported, (teacher if reads_teacher else student).hidden):
        drafting = student._replace(hidden=hidden)
        guide = teacher._replace(hidden=ahead) if reads_teacher else None
        objective, sums = heads.kd_objective(mesh, kd, drafting, guide, tokens, weights, evaluation=False)
        depth = jnp.stack([objective, sums.ce_sum, sums.kd_sum, sums.n])
        total = depth if total is None else total + depth
    objective, ce_sum, kd_sum, n = total
    n = jnp.maximum(n, 1)
    return student.config.mtp_loss_scaling_factor * objective / n, ce_sum / n, kd_sum / n


def acceptance(mesh: Mesh, kd: Distillation, student: heads.Side, data: Batch, reported: dict[str, Any]) -> KDSums:
    """How often the head at depth mtp_eval_target_module and the model itself, k positions on, put one token first.

    Args:
      mesh, kd, student, data, reported: as for `loss`.

    Returns:
      The sums, of which agreement_sum / n is the acceptance rate.
    """
    everything = kd.model_copy(
        update={"kd_top_k": 0, "kd_top_p": 0.0, "kd_vocab_size": 0, "kd_divergence": "forward_kl"}
    )
    depth = list(depths(data, reported, student.hidden))[student.config.mtp_eval_target_module - 1]
    drafted, ahead, tokens = depth
    drafting, model = student._replace(hidden=drafted), student._replace(hidden=ahead)
    weights = Weights(alpha=jnp.float32(0), temperature=1.0)
    return heads.kd_objective(mesh, everything, drafting, model, tokens, weights, evaluation=True)[1]
