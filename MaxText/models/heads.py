"""Where MaxText's decoders meet the blockwise loss: hidden states and heads out, tokens and vocabulary sharded.

A decoder here ends in its final norm. What follows (matrix, scale, soft cap, casts) is the decoder's own output head,
which the loss calls on blocks of tokens inside `jax.shard_map`. Under tensor parallelism the vocabulary stays sharded.
Over the axes that shard the tokens, what is smaller travels: either each device walks its own tokens, with heads
gathered once before the walk and their gradient reduced once after it; or heads stay sharded, and each block's hidden
states are gathered.
"""

# B batch, L positions, N tokens of one device, n tokens of a block, D width, V vocabulary

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from MaxText import upstream
from MaxText.chips import chip_of
from MaxText.config.keys import Distillation
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens, blockwise_kd
from MaxText.distill.divergences import NOTHING, Divergence
from MaxText.distill.kd_loss import KDSums
from MaxText.distill.projection import Projection
from MaxText.distill.stored import StoredTeacher
from MaxText.distill.teacher_side import LiveTeacher
from MaxText.distill.term_sums import divergence_of
from MaxText.distill.terms.named import term_named
from MaxText.models.walk import MIB, Heads, Walk, plan

Guide = LiveTeacher | StoredTeacher

MTP_HIDDEN_STATES = "mtp_hidden_states"  # what a decoder reports them as


def ends_in_hidden_states(graphdef: nnx.GraphDef, state: nnx.State) -> nnx.GraphDef:
    """The same graph, whose decoder reports its last hidden states, and those of MTP layers, and projects nothing.

    MaxText's decoders do so for a loss that tiles the vocabulary; the switch is in the decoder's settings alone, and
    the state's structure does not depend on it.
    """
    root = nnx.merge(graphdef, state)
    model = root.model if hasattr(root, "model") else root
    model.decoder.config = upstream.with_vocab_tiling(model.decoder.config)
    if model.config.mtp_num_layers > 0:
        decoder: Any = type(model.decoder)
        model.decoder.__class__ = reporting(decoder)
    return nnx.graphdef(root)


@functools.cache
def reporting(decoder: Any) -> Any:
    """The decoder's class, whose output head reports what an MTP layer gives it instead of projecting it."""

    class Reporting(decoder):
        def apply_output_head(
            self, shared_embedding: Any, y: Array, deterministic: bool, model_mode: str, normalize_y: bool = True
        ) -> Array:
            if normalize_y:  # the model's own logits
                return super().apply_output_head(shared_embedding, y, deterministic, model_mode)
            before = getattr(self, MTP_HIDDEN_STATES).get_value() if hasattr(self, MTP_HIDDEN_STATES) else ()
            states = (*before, self.dropout(y, deterministic=deterministic))
            setattr(self, MTP_HIDDEN_STATES, nnx.Intermediate(states))
            return jnp.zeros((*y.shape[:-1], self.config.vocab_size), y.dtype)  # read by nothing that is read

    return Reporting


def normed_hidden_states(model: nnx.Module, reported: dict[str, Any], enable_dropout: bool) -> Float[Array, "B L D"]:
    """What the head's matrix is applied to. The norm is outside the blocks: it is cheap, and its gradient is jax's."""
    decoder = model.decoder
    (hidden,) = reported["decoder"].pop("hidden_states")
    return decoder.dropout(decoder.decoder_norm(hidden), deterministic=not enable_dropout)


class OutputHead(nnx.Module):
    """What MaxText's `apply_output_head` reads of a decoder, apart from the norm and the dropout, which come before."""

    def __init__(self, model: Any):
        is_tied = model.config.logits_via_embedding
        # The loss reads logits as float32 wherever it reads them: as they come, they are half of that in memory.
        self.config, self.mesh = upstream.with_settings(model.config, cast_logits_to_fp32=False), model.mesh
        self.token_embedder = model.token_embedder if is_tied else None
        self.logits_dense = None if is_tied else model.decoder.logits_dense

    def dropout(self, x: Array, deterministic: bool) -> Array:
        return x

    def __call__(self, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]:
        decoder: Any = upstream.nnx_decoders.NNXDecoder
        return decoder.apply_output_head(self, self.token_embedder, hidden, True, "train", normalize_y=False)


class Head(NamedTuple):
    """A decoder's output head: static, and its arrays (a matrix [D, V] or the embedding table [V, D], and scales)."""

    graphdef: nnx.GraphDef
    arrays: nnx.State


def head_of(model: nnx.Module) -> Head:
    return Head(*nnx.split(OutputHead(model)))


def project(graphdef: nnx.GraphDef, arrays: nnx.State, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]:
    """Logits as the decoder itself makes them of normed hidden states, before they are cast; of a shard of V where the
    arrays are of one."""
    return nnx.merge(graphdef, arrays)(hidden)


def of_no_width(head: Float[Array, "0 V"], hidden: Float[Array, "n 0"]) -> Float[Array, "n V"]:
    """The logits of a teacher that knows nothing: zeros."""
    return hidden @ head


def logit_bytes(mesh: Mesh, config: Any, kd: Distillation) -> int:
    """Bytes that a block holds at once per token and vocabulary entry: both models' logits, and the gradient.

    Accelerators hold them in the type that the head computes in. XLA for CPUs casts, and selects from a copy.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return 4 * (4 if 0 < kd.kd_top_p < 1 else 3)
    return 3 * (4 if config.logits_dot_in_fp32 else jnp.dtype(config.dtype).itemsize)


def walk_of(mesh: Mesh, config: Any, teacher_config: Any | None, kd: Distillation) -> Walk:
    """How the train step's loss walks."""
    shape = (config.micro_batch_size_to_train_on, config.max_target_length)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        return Layout(mesh, shape, config, teacher_config, kd).walk


# An array of a head -> its axis that is the vocabulary's.
VOCABULARY_AXIS = {"embedding": 0, "kernel": 1, "kernel_scale": 1}


class Layout:
    """How a batch's tokens and the heads' vocabulary lie on the mesh, by the logical axis rules in force.

    Attributes:
      tokens: PartitionSpec of an array [B, L].
      hidden: PartitionSpec of an array [B, L, D].
      token_axes: the mesh axes that shard tokens.
      vocab_axes: the mesh axes that shard the vocabulary; empty where it is whole on each device.
      pooled_axes: those of vocab_axes that shard the tokens too: blocks are gathered over them, heads are not.
      walk: how the loss walks over a device's tokens.
    """

    def __init__(self, mesh: Mesh, shape: tuple[int, ...], student: Any | None, teacher: Any | None, kd: Distillation):
        """`student`, `teacher`: MaxText's configurations of those models whose heads are projected, one at least."""
        config: Any = student or teacher
        vocabulary = config.vocab_size
        names = ("activation_embed_and_logits_batch", "activation_length")
        spec: Any = upstream.sharding.create_sharding(mesh, names).spec
        by_row, by_position = (as_tuple(entry) for entry in (*spec, None, None)[:2])
        rows = dividing(mesh, by_row, shape[0])
        # Axes that the rows are too few for (per_device_batch_size below 1) split positions, or each of their devices
        # would compute every token's loss.
        left = tuple(axis for axis in by_row if axis not in rows)
        axes = rows, dividing(mesh, (*by_position, *left), shape[1])
        self.tokens = PartitionSpec(*(entry or None for entry in axes))
        self.hidden: Any = PartitionSpec(*self.tokens, None)
        self.token_axes = axes[0] + axes[1]
        split = as_tuple(first_entry(mesh, "activation_vocab"))
        tensor_axes = dividing(mesh, tuple(axis for axis in split if axis not in self.token_axes), vocabulary)
        share = vocabulary // size(mesh, tensor_axes)
        # The axes that shard a parameter's width: a head is gathered over them, or its vocabulary is sharded by them.
        stored = as_tuple(first_entry(mesh, "embed"))
        pooled = dividing(mesh, tuple(axis for axis in self.token_axes if axis in stored), share)
        student_width, teacher_width = (0 if model is None else model.emb_dim for model in (student, teacher))
        heads = Heads(share, student_width, teacher_width, logit_bytes(mesh, config, kd))
        tokens = math.prod(shape) // size(mesh, self.token_axes)
        self.walk = plan(heads, tokens, size(mesh, pooled), chip_of(mesh), kd.kd_block_mib * MIB)
        self.pooled_axes = pooled if self.walk.pool > 1 else ()
        self.vocab_axes = tensor_axes + self.pooled_axes

    def head(self, arrays: nnx.State) -> Any:
        """A PartitionSpec for each of a head's arrays, in its place."""

        def spec(path: Any, array: Array) -> PartitionSpec:
            axis = next(VOCABULARY_AXIS[part.key] for part in path if getattr(part, "key", None) in VOCABULARY_AXIS)
            is_whole = array.ndim <= axis or array.shape[axis] == 1  # a scale of the whole matrix
            return PartitionSpec() if is_whole else PartitionSpec(*[None] * axis, self.vocab_axes or None)

        return jax.tree_util.tree_map_with_path(spec, arrays)


def first_entry(mesh: Mesh, name: str) -> Any:
    """What shards an array's axis of this logical name."""
    spec: Any = upstream.sharding.create_sharding(mesh, (name,)).spec
    return (*spec, None)[0]


def size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def as_tuple(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def dividing(mesh: Mesh, entry: Any, length: int) -> tuple[str, ...]:
    """The axes of a PartitionSpec's entry that are larger than one, up to where they stop dividing `length`."""
    taken: tuple[str, ...] = ()
    for axis in as_tuple(entry):
        if mesh.shape[axis] > 1:
            if length % (size(mesh, taken) * mesh.shape[axis]):
                break
            taken += (axis,)
    return taken


class Side(NamedTuple):
    """A model as the loss sees it: its configuration, its head and its normed hidden states."""

    config: Any
    head: Head
    hidden: Float[Array, "B L D"]


class Chosen(NamedTuple):
    """The positions at which the divergence is taken (positions.py).

    mask: True at these, which are valid ones.
    share: of the step's valid positions.
    """

    mask: Bool[Array, "B L"]
    share: Float[Array, ""]


def kd_objective(
    mesh: Mesh,
    kd: Distillation,
    student: Side,
    teacher: Side | StoredTeacher | None,
    tokens: Tokens,
    weights: Weights,
    *,
    evaluation: bool,
    chosen: Chosen | None = None,
) -> tuple[Float[Array, ""], KDSums]:
    """`blockwise_kd` over all devices' tokens.

    Args:
      mesh: the run's mesh.
      kd: the distillation settings.
      student: what is trained.
      teacher: no gradient reaches it; of a stored one the arrays are [B, L, ...]. None: cross-entropy alone is asked
        for, and alpha is 0.
      tokens: targets and mask, [B, L].
      weights: of the step at hand.
      evaluation: also sum the full-vocabulary KL at T = 1 and the agreement, where they can be known.
      chosen: the divergence is taken at these positions, in the mean over them, and nowhere else is the teacher
        projected. None: at all positions.

    Returns:
      The objective's sum over all valid positions, and the sums it is made of. With `chosen` what is known of the
      teacher is that of those positions, and weighs so that it is their mean when divided by n.
    """
    teacher_config = teacher.config if isinstance(teacher, Side) else None
    layout = Layout(mesh, tokens.targets.shape, student.config, teacher_config, kd)
    learner, learner_spec = projection(student, layout)
    guide, guide_spec = teachers_side(kd, student, teacher, layout)
    axes = tuple(axis for axis in layout.token_axes if axis not in layout.pooled_axes)
    changing = {name: weight for name, weight in weights._asdict().items() if isinstance(weight, Array)}

    taken = divergence(kd) if teacher is not None else NOTHING
    walk = functools.partial(
        blockwise_kd,
        block_size=layout.walk.block,
        evaluation=evaluation,
        vocab_axis=layout.vocab_axes,
        pooled_axis=layout.pooled_axes,
    )

    def local(
        learner: Projection,
        guide: Guide,
        tokens: Tokens,
        changing: dict[str, Array],
        choice: tuple[Guide, Chosen] | None,
    ) -> tuple[Float[Array, ""], KDSums]:
        learner, guide, tokens = flat_rows(learner), flat_guide(guide), Tokens(*map(flat, tokens))
        of_step = weights._replace(**changing)
        if choice is None:
            result = walk(learner, guide, tokens, of_step, divergence=taken)
        else:
            nobody, (taught, share) = flat_guide(choice[0]), choice[1]
            of_taught, scale = for_share(of_step, share)
            here = tokens._replace(mask=flat(taught))
            elsewhere = tokens._replace(mask=tokens.mask & ~flat(taught))
            objective, sums = walk(learner, guide, here, of_taught, divergence=taken)
            rest, others = walk(learner, nobody, elsewhere, of_step, divergence=NOTHING)
            result = scale * objective + rest, of_both(sums, others, share)
        return jax.lax.psum(result, axes) if axes else result

    nowhere = PartitionSpec()
    choice, choice_spec = None, None
    if chosen is not None:
        nobody, nobody_spec = teachers_side(kd, student, None, layout)
        choice, choice_spec = (nobody, chosen), (nobody_spec, Chosen(layout.tokens, nowhere))  # type: ignore[arg-type]
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(learner_spec, guide_spec, layout.tokens, nowhere, choice_spec),
        out_specs=nowhere,
    )
    return sharded(learner, guide, tokens, changing, choice)


def for_share(weights: Weights, share: Float[Array, ""]) -> tuple[Weights, Float[Array, ""]]:
    """The weights at positions that carry the whole divergence, and what their objective is then multiplied by.

    The cross-entropy there weighs as it does elsewhere, the divergence 1 / share of that.
    """
    of_kd = weights.alpha / share
    scale = 1 - weights.alpha + of_kd
    return weights._replace(alpha=of_kd / scale, z_weight=weights.z_weight / scale), scale


def of_both(taught: KDSums, others: KDSums, share: Float[Array, ""]) -> KDSums:
    """The sums of all positions, where those that know the teacher are of a share of them."""
    own = ("ce_sum", "log_z_sq_sum", "n")
    added = {name: getattr(taught, name) + getattr(others, name) for name in own}
    return jax.tree.map(lambda of_share: of_share / share, taught)._replace(**added)


def divergence(kd: Distillation) -> Divergence:
    return divergence_of(
        term_named(kd.kd_divergence, jsd_beta=kd.kd_jsd_beta, skew=kd.kd_skew), kd.kd_truncation_strategy
    )


def teachers_side(
    kd: Distillation, student: Side, teacher: Side | StoredTeacher | None, layout: Layout
) -> tuple[Guide, Guide]:
    """The teacher as the walk takes it, its rows [B, L, ...]; and how each array lies on the mesh in its place."""
    if isinstance(teacher, StoredTeacher):
        return teacher, jax.tree.map(lambda x: PartitionSpec(*layout.tokens, *[None] * (x.ndim - 2)), teacher)
    model, spec = knowing_nothing(student, layout) if teacher is None else projection(teacher, layout)
    limits = (0, 0.0, 0) if teacher is None else (kd.kd_top_k, kd.kd_top_p, kd.kd_vocab_size)
    return LiveTeacher(model, *limits), LiveTeacher(spec, *limits)


def flat_guide(guide: Guide) -> Guide:
    if isinstance(guide, LiveTeacher):
        return dataclasses.replace(guide, model=flat_rows(guide.model))
    return jax.tree.map(flat, guide)


def projection(side: Side, layout: Layout) -> tuple[Projection, Projection]:
    """The model as the walk takes it; and the same with how each array lies on the mesh in the array's place."""
    model = Projection(side.hidden, side.head.arrays, functools.partial(project, side.head.graphdef))
    return model, dataclasses.replace(model, hidden=layout.hidden, head=layout.head(side.head.arrays))


def knowing_nothing(student: Side, layout: Layout) -> tuple[Projection, Projection]:
    """A teacher of width 0 for the student's tokens: its logits are all alike, and no product makes them."""
    hidden = jnp.zeros((*student.hidden.shape[:-1], 0))
    model = Projection(hidden, jnp.zeros((0, student.config.vocab_size)), of_no_width)
    head = PartitionSpec(None, layout.vocab_axes or None)
    return model, dataclasses.replace(model, hidden=layout.hidden, head=head)


def flat_rows(model: Projection) -> Projection:
    return dataclasses.replace(model, hidden=flat(model.hidden))


def flat(x: Array) -> Array:
    """[B, L, ...] -> [N, ...]"""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # the width may be 0
