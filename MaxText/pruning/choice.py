"""Which layers, channels, heads, neurons and experts are kept: numbers in, ascending indices out."""

# L layers, D channels, H query heads, K key-value heads, M neurons, E experts

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Scores = np.ndarray  # the larger the better
Indices = list[int]
Pick = Callable[[Scores, int], Indices]
Module = tuple[int, str]  # of the teacher: a layer, and an attention, an MLP or a router in it
WIDTHS = ("heads", "kv_heads", "mlp", "experts")  # those that a layer's modules have


@dataclasses.dataclass(frozen=True)
class Scored:
    """What is known of the teacher's parts.

    Attributes:
      layers: [L].
      emb: [D].
      heads: of each attention, [H].
      mlp: of each MLP, [M]; of none in models of experts.
      experts: of each router, [E].
    """

    layers: Scores
    emb: Scores
    heads: dict[Module, Scores]
    mlp: dict[Module, Scores]
    experts: dict[Module, Scores]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Indices of the teacher's parts, ascending. Modules are of the teacher's layers that are kept."""

    layers: Indices
    emb: Indices
    heads: dict[Module, Indices]
    kv_heads: dict[Module, Indices]
    mlp: dict[Module, Indices]
    experts: dict[Module, Indices]

    def to_json(self) -> dict[str, Any]:
        """Layer by layer, as a reader wants it."""
        return {
            "layers": self.layers,
            "emb": self.emb,
            **{
                name: {f"{layer}/{module}": kept for (layer, module), kept in getattr(self, name).items()}
                for name in WIDTHS
            },
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Kept:
        def modules(width: str) -> dict[Module, Indices]:
            names = ((name.partition("/"), kept) for name, kept in found[width].items())
            return {(int(layer), module): kept for (layer, _, module), kept in names}

        return cls(found["layers"], found["emb"], *map(modules, WIDTHS))


# Ways -----------------------------------------------------------------------------------------------------------------


def best(scores: Scores, number: int) -> Indices:
    """Those of the largest scores; among equal ones the first."""
    return sorted(np.argsort(-scores, kind="stable")[:number].tolist())


def first(scores: Scores, number: int) -> Indices:
    return list(range(number))


def uniform(scores: Scores, number: int) -> Indices:
    """Evenly spaced, both ends among them."""
    last, gaps = len(scores) - 1, max(number - 1, 1)
    return [(2 * i * last + gaps) // (2 * gaps) for i in range(number)]


WAYS: dict[str, Pick] = {"importance": best, "loss": best, "first": first, "uniform": uniform}


# What is kept ---------------------------------------------------------------------------------------------------------


def choose(scored: Scored, way: Pick, kinds: list[bool], student_kinds: list[bool], sizes: dict[str, int]) -> Kept:
    """Applies a way to all parts.

    Args:
      scored: of the teacher.
      way: of WAYS.
      kinds: of each of the teacher's layers, of two kinds which.
      student_kinds: of each of the student's.
      sizes: the student's, and its teacher's kv_heads by "group".
    """
    kept = layers(scored.layers, way, kinds, student_kinds)

    def of_modules(scores: dict[Module, Scores], pick: Callable[[Scores], Indices]) -> dict[Module, Indices]:
        return {module: pick(own) for module, own in scores.items() if module[0] in kept}

    groups = of_modules(scored.heads, lambda own: way(own.reshape(-1, sizes["group"]).sum(1), sizes["kv_heads"]))
    return Kept(
        layers=kept,
        emb=way(scored.emb, sizes["emb"]),
        heads={module: query_heads(scored.heads[module], groups[module], way, sizes) for module in groups},
        kv_heads=groups,
        mlp=of_modules(scored.mlp, lambda own: way(own, sizes["mlp"])),
        experts=of_modules(scored.experts, lambda own: way(own, sizes["experts"])),
    )


def query_heads(scores: Scores, groups: Indices, way: Pick, sizes: dict[str, int]) -> Indices:
    """As many heads of each group that is kept."""
    group, number = sizes["group"], sizes["heads"] // sizes["kv_heads"]
    return [g * group + head for g in groups for head in way(scores[g * group : (g + 1) * group], number)]


def layers(scores: Scores, way: Pick, kinds: list[bool], student_kinds: list[bool]) -> Indices:
    """The layers of most value, in their order, each where the student has a layer of its kind.

    Where all are of one kind, these are the way's own. Else the sum of what they are worth is largest: their scores
    for `best`; for the others, how near each is to the one that the way would take.
    """
    number = len(student_kinds)
    wanted = way(scores, number)
    if [kinds[layer] for layer in wanted] == student_kinds:
        return wanted
    worth = np.tile(scores, (number, 1)).astype(np.float64)
    if way is not best:
        worth = -np.abs(np.arange(len(kinds))[None] - np.array(wanted)[:, None]).astype(np.float64)
    worth[np.array(student_kinds)[:, None] != np.array(kinds)[None]] = -np.inf
    return ascending(worth)


def ascending(worth: np.ndarray) -> Indices:
    """Of a matrix, a column for each row, ascending, of the largest sum; among equal ones the first."""
    rows, columns = worth.shape
    total = np.full((rows + 1, columns + 1), -np.inf)  # of the rows from i on, in the columns from j on
    total[rows] = 0
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            total[i, j] = max(worth[i, j] + total[i + 1, j + 1], total[i, j + 1])
    chosen, j = [], 0
    for i in range(rows):
        while worth[i, j] + total[i + 1, j + 1] < total[i, j]:
            j += 1
        chosen.append(j)
        j += 1
    return chosen
