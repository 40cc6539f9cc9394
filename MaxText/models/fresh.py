"""How a student begins that nothing is restored into: the scale of its embedding table.

MaxText draws every table with a standard deviation of 1. A head that is tied to such a table, and whose logits are not
divided by sqrt(width) again, begins with logits of deviation sqrt(width), and with one of width for the token just
read, whose own row most of the residual stream still is: a cross-entropy of 205 where guessing has 12 (docs/log.md).
The published models with such heads have small tables. Left out on purpose: all other parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from MaxText import upstream

TABLE = ("model", "token_embedder", "embedding")  # in a train state


def origin(config: Any, manager: Any) -> str:
    """The setting by which the student's parameters are restored, key=value; "" where they are drawn.

    Args:
      config: MaxText's configuration of the student.
      manager: upstream's checkpoint manager, before this run saves; a checkpoint of the run's own wins over a path.
    """
    if manager is not None and upstream.checkpointing.latest_step(manager) is not None:
        return f"run_name={config.run_name}"
    if config.load_parameters_path:
        return f"load_parameters_path={config.load_parameters_path!r}"
    return f"load_full_state_path={config.load_full_state_path!r}" if config.load_full_state_path else ""


def is_tied_unnormalised(config: Any) -> bool:
    return config.logits_via_embedding and not config.normalize_embedding_logits


def table_std(config: Any) -> float:
    """The standard deviation of a fresh student's embedding table (kd_embedding_std, or what null stands for)."""
    if config.kd_embedding_std is not None:
        return config.kd_embedding_std
    return config.emb_dim**-0.5 if config.use_kd and is_tied_unnormalised(config) else upstream.EMBEDDING_STD


def with_table_at(state: nnx.State, std: float) -> nnx.State:
    """The train state with its embedding table, just drawn, at this standard deviation; the table given is donated.

    Nothing else is touched: the optimizer's moments are still zeros, whatever the parameters are.
    """
    if std == upstream.EMBEDDING_STD:
        return state
    factor = std / upstream.EMBEDDING_STD

    def at(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        if path != TABLE:
            return variable
        drawn = variable.get_value()
        scale = jax.jit(scaled, donate_argnums=0, out_shardings=drawn.sharding)
        return variable.replace(scale(drawn, factor))

    return nnx.map_state(at, state)


def scaled(x: Array, factor: float) -> Array:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
