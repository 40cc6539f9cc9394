"""What a run goes on from, and whether it is the state of this model: one array that is not, by name and shape.

Orbax refuses the state of another model, too, with the whole of both trees and no shape. Left out on purpose: states
whose arrays have the same names and shapes, which are taken to be of one model.
"""

from typing import Any

import jax
from etils import epath
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import upstream
from MaxText.models.teacher import committed_steps

Shapes = dict[str, tuple[int, ...]]


def misfit(config: Any) -> str:
    """The first array of what the run would go on from that is not the model's or its optimizer's; "" for none.

    Args:
      config: MaxText's configuration of the student, for which restoring has failed.
    """
    source = source_of(config)
    if source is None:
        return ""
    key, root = source
    name = "items" if (root / "items").exists() else None
    mesh = upstream.maxtext_utils.get_mesh_from_config(config)
    state = upstream.abstract_train_state(config, mesh)[1]
    wanted = shapes(upstream.train_state_nnx.to_checkpoint_dict(state))
    stored = shapes(ocp.metadata(root, checkpointable_name=name).metadata)
    for path in (*wanted, *stored):
        if wanted.get(path) != stored.get(path):
            there, here = (found.get(path, "not there") for found in (stored, wanted))
            other = "optimizer" if path.startswith("opt_state") else "model"
            return f"{key}: {root} holds the state of another {other}: {path} is {there} in it, and {here} in this one"
    return ""


def source_of(config: Any) -> tuple[str, epath.Path] | None:
    """The key that names what is restored, and where it lies: this run's newest step, or else load_full_state_path."""
    if config.enable_checkpointing:
        folder = epath.Path(config.checkpoint_dir)
        if steps := committed_steps(folder):
            return f"run_name={config.run_name}", folder / str(steps[-1])
    if config.load_full_state_path:
        root = epath.Path(config.load_full_state_path)
        return f"load_full_state_path={str(root)!r}", root.parent if root.name == "items" else root
    return None


def shapes(tree: Any) -> Shapes:
    """Of each array but random streams, by its path. Parameters come first: of others the reader knows less."""
    parameters, others = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape")):
        parts = [str(getattr(part, "key", getattr(part, "idx", part))) for part in path]
        if parts[:2] == ["params", "params"]:
            parameters["/".join(parts[2:])] = tuple(leaf.shape)
        elif "rngs" not in parts:
            others["/".join(parts)] = tuple(leaf.shape)
    return parameters | others
