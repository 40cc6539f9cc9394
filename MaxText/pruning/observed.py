"""The teacher at work on rows of text: what passes through its norms, heads, neurons and layers.

Modules are observed by a class of their own that computes what theirs does; nothing of the engine is copied. Sums are
over the positions that count; they are added up over batches, and divided once.
"""

# B batch, L positions, D channels, H heads, d their width, M neurons, E experts

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jaxtyping import Array, Bool, Float

from MaxText import upstream
from MaxText.config.keys import Distillation
from MaxText.distill.block import Weights
from MaxText.distill.blockwise import Tokens
from MaxText.loop.step import forward
from MaxText.models import heads
from MaxText.models.teacher import Teacher
from MaxText.pruning.structure import Path, Structure

Batch = dict[str, jax.Array]
SEEN = "seen_"  # how what is reported here begins
LAST = ("out", "wo")  # the projections of heads and of neurons back to the channels


def watch(model: nnx.Module, counts: Bool[Array, "B L"], experts_per_token: int) -> None:
    """Lets the modules of a model report, within the trace in which `counts` is an array."""
    classes = {
        upstream.normalizations.RMSNorm: functools.partial(norm_seen, counts),
        upstream.moe.GateLogit: functools.partial(routes_seen, counts, experts_per_token),
    }
    for path, module in nnx.iter_graph(model):
        observe = classes.get(type(module))
        if path and path[-1] in LAST and isinstance(module, nnx.Module):  # experts' are arrays
            observe = functools.partial(inputs_seen, counts)
        elif has_attention(module):
            observe = functools.partial(layer_seen, counts)
        if observe is not None:
            module.__class__ = observe(type(module))


def has_attention(module: Any) -> bool:
    """Whether it is a layer: it has an attention of its own, or two."""
    return isinstance(module, nnx.Module) and any(name.startswith("self_attention") for name in vars(module))


def report(module: Any, **sums: Array) -> None:
    for name, value in sums.items():
        setattr(module, SEEN + name, nnx.Intermediate(value))


def counted(counts: Bool[Array, "B L"], x: Array) -> Array:
    """[B, L, ...] -> [...]: the sum over the positions that count, in float32."""
    return jnp.where(jnp.expand_dims(counts, range(2, x.ndim)), x.astype(jnp.float32), 0).sum((0, 1))


def inputs_seen(counts: Bool[Array, "B L"], cls: Any) -> Any:
    """A projection that reports the squares of what it projects: of each neuron, [M], of each head [H]."""

    class Observed(cls):
        @functools.wraps(cls.__call__)
        def __call__(self, inputs: Array, *arguments: Any, **keys: Any) -> Any:
            squares = counted(counts, jnp.square(inputs.astype(jnp.float32)))
            report(self, inputs=squares.sum(-1) if squares.ndim == 2 else squares)
            return super().__call__(inputs, *arguments, **keys)

    return Observed


def norm_seen(counts: Bool[Array, "B L"], cls: Any) -> Any:
    """A norm that reports the squares of what leaves it, [D], and of what it is before the scale."""

    class Observed(cls):
        @functools.wraps(cls.__call__)
        def __call__(self, x: Array, *arguments: Any, **keys: Any) -> Any:
            y = super().__call__(x, *arguments, **keys)
            if x.ndim == 3:  # norms of queries and keys have heads
                before = jnp.square(x.astype(jnp.float32))
                of_one = before / (before.mean(-1, keepdims=True) + self.epsilon)
                report(
                    self, squares=counted(counts, jnp.square(y.astype(jnp.float32))), unscaled=counted(counts, of_one)
                )
            return y

    return Observed


def routes_seen(counts: Bool[Array, "B L"], number: int, cls: Any) -> Any:
    """A router that reports how many tokens each expert gets, [E]."""

    class Observed(cls):
        @functools.wraps(cls.__call__)
        def __call__(self, *arguments: Any, **keys: Any) -> Any:
            logits, other = super().__call__(*arguments, **keys)
            _, chosen = jax.lax.top_k(logits, number)
            report(self, load=counted(counts, jax.nn.one_hot(chosen, logits.shape[-1]).sum(-2)))
            return logits, other

    return Observed


def layer_seen(counts: Bool[Array, "B L"], cls: Any) -> Any:
    """A layer that reports how far it turns what goes through it: 1 - cosine of input and output."""

    class Observed(cls):
        @functools.wraps(cls.__call__)
        def __call__(self, inputs: Any, *arguments: Any, **keys: Any) -> Any:
            output = super().__call__(inputs, *arguments, **keys)
            x, y = (z[0] if isinstance(z, tuple) else z for z in (inputs, output))
            report(self, turned=counted(counts, cosine_distance(x, y)))
            return output

    return Observed


def cosine_distance(x: Float[Array, "B L D"], y: Float[Array, "B L D"]) -> Float[Array, "B L"]:
    """As half the squared distance of the directions, which does not cancel where they are nearly one."""

    def direction(z: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        z = z.astype(jnp.float32)
        return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)

    return jnp.square(direction(x) - direction(y)).sum(-1) / 2


# Sums -----------------------------------------------------------------------------------------------------------------


def jitted(kd: Distillation, teacher: Teacher, mesh: jax.sharding.Mesh, *, observes: bool) -> Callable[..., Any]:
    """(teacher's state, batch) -> sums of cross-entropy and of tokens that count; and what modules report, by path."""

    def function(state: nnx.State, batch: Batch) -> tuple[Array, Array, dict[Path, Array]]:
        model = nnx.merge(teacher.graphdef, state, copy=True)
        counts = batch["targets_segmentation"] != 0
        if observes:
            watch(model, counts, teacher.config.num_experts_per_tok)
        with logical_axis_rules(teacher.config.logical_axis_rules):
            reported = forward(model, teacher.config, batch, enable_dropout=False)
            hidden = heads.normed_hidden_states(model, reported, enable_dropout=False)
            seen = [*paths(reported), *paths(nnx.pop(model, nnx.Intermediate).to_pure_dict())]  # and the last norm's
            side = heads.Side(teacher.config, heads.head_of(model), hidden)
            tokens = Tokens(batch["targets"], counts)
            _, sums = heads.kd_objective(mesh, kd, side, None, tokens, Weights(0.0, 1.0), evaluation=False)
        return sums.ce_sum, sums.n, {path: x for path, x in seen if path[-1].startswith(SEEN)}

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    return jax.jit(function, in_shardings=(teacher.shardings, rows))


def paths(tree: Any) -> list[tuple[Path, Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), x) for path, x in leaves]


Seen = dict[tuple[int | None, Path, str], np.ndarray]  # of a layer (None: of none), by what module, what


def by_layer(structure: Structure, reported: dict[Path, Array]) -> Seen:
    """Reports of stacked layers apart."""
    found: Seen = {}
    for (*path, name), array in reported.items():
        layers, part = structure.held(tuple(path))
        value, what = np.asarray(array, np.float64), name.removeprefix(SEEN)
        if isinstance(layers, list):
            found |= {(layer, part, what): value[i] for i, layer in enumerate(layers)}
        else:
            found[layers, part, what] = value
    return found


def without(state: nnx.State, structure: Structure, layer: int) -> nnx.State:
    """The model's state with a layer that lets everything pass: what it would add is 0."""

    def at(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        held = structure.held(tuple(map(str, path)))
        adds = held.part[-2:] in (("out", "kernel"), ("wo", "kernel")) or held.part[-1:] == ("wo",)
        if not adds:
            return variable
        value = variable.get_value()
        if held.layers == layer:
            return variable.replace(jnp.zeros_like(value))
        if isinstance(held.layers, list) and layer in held.layers:
            place = (slice(None),) * structure.scan_axis + (held.layers.index(layer),)
            return variable.replace(value.at[place].set(0))
        return variable

    return nnx.map_state(at, state)
