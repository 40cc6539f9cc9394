"""Parameters that stay as they are (trainable_parameters_mask): which, and how a step leaves them alone.

MaxText's optimizer keeps no state for them and makes no update. But it is handed their gradient, which is computed,
added up over devices and counted in the norm by which all are clipped; and a router's bias moves without any. Here they
are no variables of the loss, so none of that is computed, and they are put back as they were, whatever has moved them.
"""

import re
from typing import Any

import jax
from flax import nnx

from MaxText import upstream
from MaxText.config.keys import ConfigError


def are_frozen(config: Any, params: nnx.State) -> list[bool]:
    """Of each array of the parameters, in the order of the leaves; by the engine's own reading of the patterns."""
    mask = upstream.optimizers._get_path_mask_fn(config.trainable_parameters_mask, match_returns_true=False)
    leaves = jax.tree.leaves(params)
    return [False] * len(leaves) if mask is None else jax.tree.leaves(mask(nnx.as_pure(params)))


def hold(config: Any, model: nnx.Module) -> None:
    """Takes a model's frozen parameters out of what is differentiated."""
    if config.trainable_parameters_mask:
        params = nnx.state(model, nnx.Param)
        nnx.update(model, chosen(config, params, jax.lax.stop_gradient(params), params))


def put_back(config: Any, before: nnx.State, model: nnx.Module) -> None:
    """The model with its frozen parameters as they were, to the bit."""
    if config.trainable_parameters_mask:
        after = nnx.state(model, nnx.Param)
        nnx.update(model, chosen(config, after, before, after))


def chosen(config: Any, like: nnx.State, frozen: nnx.State, trained: nnx.State) -> nnx.State:
    pairs = zip(are_frozen(config, like), jax.tree.leaves(frozen), jax.tree.leaves(trained), strict=True)
    return jax.tree.unflatten(jax.tree.structure(like), [x if is_frozen else y for is_frozen, x, y in pairs])


def check(config: Any, params: nnx.State) -> str:
    """What is trained, for the head of a run; "" where all is.

    Raises:
      ConfigError: a pattern names no parameter.
    """
    patterns = config.trainable_parameters_mask
    if not patterns:
        return ""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(nnx.as_pure(params)), strict=True)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"trainable_parameters_mask={patterns}: {pattern!r} names none of the student's parameters, such as "
                f"{names[0]!r} or {names[-1]!r}"
            )
    frozen = are_frozen(config, params)
    count = sum(leaf.size for leaf, is_frozen in zip(leaves, frozen, strict=True) if not is_frozen)
    return f"{count / sum(leaf.size for leaf in leaves):.1%} of them are trained, the others stay as they are"
