"""The frozen teacher: its checkpoint, its configuration's missing half, its arrays on the student's mesh.

The teacher is a graph definition and a state of arrays. No optimizer, no dropout, no gradient: the step receives the
state as an argument, reads it, and it is in no checkpoint of the student.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from flax.core.spmd import logical_axis_rules
from orbax.checkpoint import path as ocp_path
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import upstream
from MaxText.config.files import absolute
from MaxText.config.keys import ConfigError
from MaxText.console import first_line, say
from MaxText.models import heads

Path = tuple[str, ...]

# The arrays with a row or a column per token, and which axis that is.
VOCABULARY_AXIS: dict[Path, int] = {("token_embedder", "embedding"): 0, ("decoder", "logits_dense", "kernel"): 1}

# Variables a checkpoint need not hold: random streams are unused, the others live within a call.
EPHEMERAL = (nnx.RngState, nnx.Cache, nnx.Intermediate)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A MaxText checkpoint as it lies on disk, before anything of it is read but its index.

    Attributes:
      root: the step's folder (what holds `items`), or a parameters-only checkpoint.
      step: the training step, None where the path does not tell.
      arrays: where each array of the model lies: path within the model -> (path on disk, shape, dtype).
    """

    root: epath.Path
    step: int | None
    arrays: dict[Path, tuple[Path, tuple[int, ...], np.dtype]]

    @property
    def scan_layers(self) -> bool:
        """Whether the layers are stacked in one array (MaxText's scan_layers), read off the names.

        Only those right below the decoder tell: a scanned block of unlike layers numbers them within itself.
        """
        below = {path[1] for path in self.arrays if path[0] == "decoder"}
        return not any(re.fullmatch(r"(\w+_)?layers_\d+", name) for name in below)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The teacher on the student's mesh: `nnx.merge(graphdef, state, copy=True)` is the model."""

    config: Any
    graphdef: nnx.GraphDef
    state: nnx.State
    shardings: nnx.State
    checkpoint: Checkpoint | None  # None: shapes without values


def find_checkpoint(path: str) -> Checkpoint:
    """Reads the index of the checkpoint at `path`: a step, its `items`, a `checkpoints` folder or a run's folder.

    Raises:
      ConfigError: nothing is there, or it is no checkpoint of MaxText's.
    """
    key = f"kd_teacher_parameters_path={path!r}"
    given = epath.Path(absolute(path))
    with unreadable_as_config_error(f"{key}: cannot be read"):
        if not given.exists():
            raise ConfigError(f"{key}: no such path")
        root = given.parent if given.name == "items" else given
        for folder in (root, root / "checkpoints"):
            steps = committed_steps(folder)
            if steps:
                root = folder / str(steps[-1])
                break
        name = "items" if (root / "items").exists() else None
    expected = ".../checkpoints/<step>/items, a parameters-only checkpoint, or a run's checkpoints folder"
    check_complete(key, root / (name or ""))
    with unreadable_as_config_error(f"{key}: no MaxText checkpoint; expected {expected}"):
        index = ocp.metadata(root, checkpointable_name=name).metadata
    if index is None:
        raise ConfigError(f"{key}: no MaxText checkpoint, or one whose _METADATA cannot be read; expected {expected}")
    arrays = model_arrays(index)
    if not arrays:
        raise ConfigError(f"{key}: holds no model parameters (no `params` in it)")
    return Checkpoint(root=root, step=int(root.name) if root.name.isdigit() else None, arrays=arrays)


def check_complete(key: str, folder: epath.Path) -> None:
    """The arrays of an OCDBT checkpoint are found through one small file; without it orbax's readers only complain."""
    if any(folder.glob("ocdbt.process_*")) and not (folder / "manifest.ocdbt").exists():
        raise ConfigError(f"{key}: the checkpoint is incomplete, manifest.ocdbt is missing in {folder}")


@contextlib.contextmanager
def unreadable_as_config_error(message: str) -> Iterator[None]:
    """File systems and formats fail in types of their own; whichever, the path is what is wrong."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        upstream.ignore_closed_loops()
        raise ConfigError(f"{message} ({first_line(error)})") from error


def committed_steps(folder: epath.Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(found.step for found in ocp_path.step.standard_name_format().find_all(folder))


def model_arrays(index: Any) -> dict[Path, tuple[Path, tuple[int, ...], np.dtype]]:
    """Locates the model's arrays in a checkpoint's index.

    MaxText keeps trainable parameters in params/params, other kinds of variables in params/<their type> (converted
    checkpoints) or nnx_aux/model (training checkpoints; router biases of DeepSeek-style MoE are such).
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(index, is_leaf=lambda x: hasattr(x, "shape")):
        where = tuple(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)
        if where[0] == "params" or where[:2] == ("nnx_aux", "model"):
            found[where[2:]] = (where, tuple(leaf.shape), np.dtype(leaf.dtype))
    return found


def load(config: Any, checkpoint: Checkpoint, mesh: jax.sharding.Mesh, dtype: str, shared_vocabulary: int) -> Teacher:
    """Restores the teacher once, each array straight to its shards.

    Args:
      config: MaxText's configuration of the teacher.
      checkpoint: where its arrays lie.
      mesh: the student's mesh.
      dtype: what floating-point parameters are held in; "" = as stored.
      shared_vocabulary: what comes after so many tokens is cut off, or filled up with zeros, to the configured size.
        0: the stored size must be the configured one.

    Raises:
      ConfigError: the checkpoint lacks arrays of the configured model, or holds them in other shapes.
    """
    config = laid_out(config, mesh)
    shapes = created(config, mesh)
    graphdef, ephemeral, stored = nnx.split(shapes, EPHEMERAL, ...)
    wanted = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(stored)}
    check_shapes(config, checkpoint, {path: leaf.shape for path, leaf in wanted.items()}, shared_vocabulary)

    def request(path: Path, leaf: nnx.Variable) -> jax.ShapeDtypeStruct:
        target = leaf.get_value()
        kind = checkpoint.arrays[path][2]
        if is_cast(leaf):
            kind = np.dtype(dtype or kind)
        return jax.ShapeDtypeStruct(target.shape, kind, sharding=target.sharding)

    requests = {checkpoint.arrays[path][0]: request(path, leaf) for path, leaf in wanted.items()}
    context = upstream.checkpoint_context.build_context(
        use_ocdbt=config.checkpoint_storage_use_ocdbt,
        use_zarr3=config.checkpoint_storage_use_zarr3,
        checkpoint_storage_concurrent_gb=config.checkpoint_storage_concurrent_gb,
        partial_load=True,
        enable_single_replica_ckpt_restoring=config.enable_single_replica_ckpt_restoring,
    )
    context.array.loading.enable_padding_and_truncation = shared_vocabulary > 0
    with context:
        name = "items" if (checkpoint.root / "items").exists() else None
        key = f"kd_teacher_parameters_path={str(checkpoint.root)!r}"
        # A reader's threads complain by themselves of what the error says.
        with upstream.quietly(), unreadable_as_config_error(f"{key}: cannot be restored"):
            tree = ocp.load(checkpoint.root, nnx.traversals.unflatten_mapping(requests), checkpointable_name=name)
    restored = nnx.traversals.flatten_mapping(tree)
    for path, leaf in wanted.items():
        leaf.set_value(restored[checkpoint.arrays[path][0]])

    # Random streams need values, though nothing draws from them. The engine's would cost the making of another model.
    placed = jax.tree.map(lambda x: x.sharding, ephemeral)
    streams = jax.jit(lambda: jax.tree.map(jnp.zeros_like, ephemeral), out_shardings=placed)()
    return assembled(config, graphdef, nnx.State.merge(stored, streams), checkpoint)


def abstract(config: Any, mesh: jax.sharding.Mesh, dtype: str) -> Teacher:
    """The teacher as shapes on shards, for a compilation without its checkpoint.

    Args:
      config, mesh, dtype: as for `load`; "" = the configuration's weight_dtype, since no checkpoint tells.
    """
    config = laid_out(config, mesh)
    shapes = created(config, mesh)
    graphdef, ephemeral, stored = nnx.split(shapes, EPHEMERAL, ...)

    for _, leaf in nnx.to_flat_state(stored):
        x = leaf.get_value()
        kind = dtype if dtype and is_cast(leaf) else x.dtype
        leaf.set_value(jax.ShapeDtypeStruct(x.shape, kind, sharding=x.sharding))
    return assembled(config, graphdef, nnx.State.merge(stored, ephemeral), None)


def is_cast(leaf: nnx.Variable) -> bool:
    """Whether kd_teacher_dtype is for it: biases of routers, which move by small steps, are no parameters."""
    return isinstance(leaf, nnx.Param) and jnp.issubdtype(leaf.get_value().dtype, jnp.floating)


# The logical axes that are as long as a model has attention heads.
HEAD_AXES = {"heads", "q_heads", "kv_heads", "activation_heads", "activation_kv_heads"}


def laid_out(config: Any, mesh: jax.sharding.Mesh) -> Any:
    """The teacher's settings; its attention heads are whole on each device where the run's layout does not divide them.

    Queries and keys are laid out alike: kernels pair them by place.
    """
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        shares = max(heads.size(mesh, heads.as_tuple(heads.first_entry(mesh, name))) for name in HEAD_AXES)
    number = math.gcd(config.num_query_heads, config.num_kv_heads)
    if number % shares == 0:
        return config
    say(
        f"warning: the teacher's {config.num_query_heads} query and {config.num_kv_heads} key-value heads do not "
        f"divide by {shares} (tensor parallelism): each device holds and computes all of them"
    )
    return upstream.without_mesh_axes(config, HEAD_AXES)


def created(config: Any, mesh: jax.sharding.Mesh) -> nnx.Module:
    """The model as shapes on shards; ConfigError where it cannot be built."""
    try:
        return upstream.model_creation_utils.create_nnx_abstract_model(config, mesh)[1]
    except ValueError as error:
        raise ConfigError(f"the teacher (model {config.model_name!r}) cannot be built: {error}") from error


def assembled(config: Any, graphdef: nnx.GraphDef, state: nnx.State, checkpoint: Checkpoint | None) -> Teacher:
    return Teacher(
        config=config,
        graphdef=heads.ends_in_hidden_states(graphdef, state),
        state=state,
        shardings=jax.tree.map(lambda x: x.sharding, state),
        checkpoint=checkpoint,
    )


def check_shapes(
    config: Any, checkpoint: Checkpoint, wanted: dict[Path, tuple[int, ...]], shared_vocabulary: int
) -> None:
    problems = []
    for path, shape in wanted.items():
        stored = checkpoint.arrays[path][1] if path in checkpoint.arrays else None
        if stored is None:
            problems.append(f"  {'/'.join(path)}: not in the checkpoint, the model has {tuple(shape)}")
        elif shared_vocabulary and path in VOCABULARY_AXIS and len(stored) == len(shape):
            axis = VOCABULARY_AXIS[path]
            if stored[axis] < shared_vocabulary:
                raise ConfigError(
                    f"kd_vocab_size={shared_vocabulary}: at most the teacher's vocabulary, {stored[axis]} "
                    f"({'/'.join(path)} is {stored} in {checkpoint.root})"
                )
            shape = (*shape[:axis], stored[axis], *shape[axis + 1 :])
        if stored is not None and stored != tuple(shape):
            problems.append(f"  {'/'.join(path)}: {stored} stored, the model has {tuple(shape)}")
    if problems:
        shown = "\n".join(problems[:5]) + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ConfigError(
            f"kd_teacher_parameters_path={str(checkpoint.root)!r}: does not hold the configured teacher "
            f"(model {config.model_name!r}):\n{shown}\n"
            "Set kd_teacher_model_name to the teacher's preset, or kd_teacher_overrides to what differs from it."
        )
