"""A row of the cache: the tokens that the student reads, and what the teacher said at each position that counts.

Positions have ragged targets: those of position i are `ids[offsets[i]:offsets[i + 1]]`. A position that does not count
(targets_segmentation 0) has none, and its numbers are 0.
"""

# L positions, M targets of all positions together, K slots per position, N draws

import dataclasses
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from MaxText.cache import quantiser
from MaxText.console import RunError

Mode = Literal["sample", "top_k"]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Halves = NDArray[np.float16]

# What a batch holds of a row's own, in MaxText's names.
TOKENS = ("inputs", "targets", "inputs_position", "targets_position", "inputs_segmentation", "targets_segmentation")


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """Mode sample: how often each id was drawn. A position's counts add up to `number`."""

    counts: Ints  # [M]
    number: int

    @property
    def weights(self) -> Floats:
        return self.counts.astype(np.float32) / np.float32(self.number)

    @property
    def log_weights(self) -> Floats:
        return np.log(self.counts / np.float64(self.number)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """Mode top_k: the log-probabilities of the `number` most likely ids, and of all others together."""

    log_probs: Floats  # [M], normalised over the whole vocabulary
    log_tail: Floats  # [L], -inf: nothing is left
    number: int

    @property
    def weights(self) -> Floats:
        return np.exp(self.log_probs)

    @property
    def log_weights(self) -> Floats:
        return self.log_probs


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    inputs: Ints  # [L]
    targets: Ints
    inputs_position: Ints
    targets_position: Ints
    inputs_segmentation: Ints
    targets_segmentation: Ints
    offsets: NDArray[np.int64]  # [L + 1]
    ids: Ints  # [M], ascending at each position
    teacher: Draws | TopK
    target_log_prob: Halves  # [L], of the target at T = 1, in nats
    entropy: Halves  # [L], of the teacher's whole distribution at the cache's T, in nats

    @property
    def counts_at(self) -> NDArray[np.bool_]:
        """Which positions count."""
        return self.targets_segmentation != 0

    @property
    def segmentation(self) -> Ints:
        """Which document of the row each target is of; 0 where the position does not count."""
        return self.targets_segmentation

    @property
    def weights(self) -> Floats:
        """The teacher's weight of each id: count over draws, or its probability."""
        return self.teacher.weights


def of_draws(tokens: dict[str, Ints], ids: Ints, target_log_prob: Floats, entropy: Floats) -> Row:
    """A row of mode sample.

    Args:
      tokens: the arrays of TOKENS, [L] each.
      ids: [L, N], the drawn ids of each position, in any order.
      target_log_prob: [L], nats.
      entropy: [L], nats.
    """
    counted = tokens["targets_segmentation"] != 0
    drawn = np.sort(ids[counted], axis=1)
    number = ids.shape[1]
    begins = np.ones(drawn.shape, bool)  # a run of equal ids
    begins[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    counts = np.diff(np.flatnonzero(begins), append=drawn.size).astype(np.int32)
    offsets = offsets_of(counted, begins.sum(axis=1))
    teacher = Draws(counts, number)
    return Row(**own(tokens), offsets=offsets, ids=drawn[begins].astype(np.int32), teacher=teacher,
               target_log_prob=halves(target_log_prob, counted), entropy=halves(entropy, counted))  # fmt: skip


def of_top_k(
    tokens: dict[str, Ints], ids: Ints, log_probs: Floats, log_tail: Floats, target_log_prob: Floats, entropy: Floats
) -> Row:
    """A row of mode top_k, its log-probabilities as the cache will give them back.

    Args:
      tokens: the arrays of TOKENS, [L] each.
      ids: [L, K], ascending at each position.
      log_probs: [L, K], nats, normalised over the whole vocabulary.
      log_tail: [L], the log of the mass of all other ids; -inf where there is none.
      target_log_prob: [L], nats.
      entropy: [L], nats.

    Raises:
      ValueError: ids do not ascend.
    """
    counted = tokens["targets_segmentation"] != 0
    number = ids.shape[1]
    if (np.diff(ids[counted], axis=1) <= 0).any():
        raise ValueError("the ids of a position do not ascend")
    check_numbers(log_probs[counted])
    check_numbers(log_tail[counted])
    kept = quantiser.rounded(log_probs[counted].reshape(-1))
    tail = np.zeros(len(counted), np.float32)
    tail[counted] = quantiser.rounded(log_tail[counted])
    offsets = offsets_of(counted, np.full(counted.sum(), number))
    teacher = TopK(kept, tail, number)
    return Row(**own(tokens), offsets=offsets, ids=ids[counted].reshape(-1).astype(np.int32), teacher=teacher,
               target_log_prob=halves(target_log_prob, counted), entropy=halves(entropy, counted))  # fmt: skip


def to_batch_arrays(row: Row, slots: int, vocabulary: int) -> dict[str, NDArray[Any]]:
    """The row as a student's batch has it: TOKENS, and what the loss takes of the teacher (distill/stored.py).

    Args:
      row: a row.
      slots: K, the ids that there is room for. Fewer than mode top_k has stored: the most likely ones are taken, of
        equal ones those of lower id, and the others belong to the tail.
      vocabulary: V, the id in slots that are not used.

    Returns:
      teacher_ids int32 [L, K], teacher_log_weights float32 [L, K] (-inf in slots that are not used), in mode top_k
      teacher_log_tail float32 [L], teacher_target_log_prob and teacher_entropy float32 [L].

    Raises:
      ValueError: a position has drawn more ids than there are slots.
    """
    sizes = np.diff(row.offsets)
    widest = int(sizes.max(initial=0))
    of_teacher: dict[str, NDArray[Any]] = {}
    if isinstance(row.teacher, TopK):
        widest = max(widest, slots)
        of_teacher["teacher_log_tail"] = np.where(row.counts_at, row.teacher.log_tail, np.float32(-np.inf))
    elif widest > slots:
        raise ValueError(f"{widest} ids at a position, and {slots} slots")
    else:
        widest = slots
    used = np.arange(widest) < sizes[:, None]
    ids = np.full(used.shape, vocabulary, np.int32)
    ids[used] = row.ids
    log_weights = np.full(used.shape, -np.inf, np.float32)
    log_weights[used] = row.teacher.log_weights
    if widest > slots:
        ids, log_weights, outside = most_likely(ids, log_weights, slots)
        of_teacher["teacher_log_tail"] = np.logaddexp(of_teacher["teacher_log_tail"], outside)
    return {name: getattr(row, name) for name in TOKENS} | {
        "teacher_ids": ids,
        "teacher_log_weights": log_weights,
        **of_teacher,
        "teacher_target_log_prob": row.target_log_prob.astype(np.float32),
        "teacher_entropy": row.entropy.astype(np.float32),
    }


def most_likely(ids: Ints, log_probs: Floats, number: int) -> tuple[Ints, Floats, Floats]:
    """The `number` most likely ids of each position, ascending, and the log of the mass of its others."""
    order = np.argsort(-log_probs, axis=1, kind="stable")
    kept = np.sort(order[:, :number], axis=1)
    others = np.take_along_axis(log_probs, order[:, number:], axis=1)
    outside = np.logaddexp.reduce(others, axis=1)
    return np.take_along_axis(ids, kept, axis=1), np.take_along_axis(log_probs, kept, axis=1), outside


def own(tokens: dict[str, Ints]) -> dict[str, Ints]:
    return {name: np.asarray(tokens[name], np.int32) for name in TOKENS}


def offsets_of(counted: NDArray[np.bool_], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The offsets of all positions, of the sizes of those that count."""
    offsets = np.zeros(len(counted) + 1, np.int64)
    offsets[1:][counted] = sizes
    return np.cumsum(offsets)


def halves(values: Floats, counted: NDArray[np.bool_]) -> Halves:
    """Rounded to float16, which holds 65504 at most; 0 where the position does not count."""
    check_numbers(values[counted])
    limit = np.finfo(np.float16).max
    return np.where(counted, np.clip(values, -limit, limit), 0).astype(np.float16)


def check_numbers(values: Floats) -> None:
    if np.isnan(values).any():
        raise RunError("the teacher's log-probabilities are not numbers (NaN)")
