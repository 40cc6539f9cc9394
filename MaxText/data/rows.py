"""Rows of tokens become inputs, targets and what counts, by where the text ends: padding is a position, not a token.

MaxText's pipelines look for padding by a token's id: the tokenizer's pad token, else its unknown token, else 0. Where
that is the end-of-text mark as well, or a letter, text is taken for padding. Here rows are filled with an id that no
text holds, which is replaced once it is known what counts (pipelines.py puts this in the place of MaxText's own).
Worker processes import this module, so it imports no engine.
"""

from typing import Any

import grain.python as grain
import numpy as np

PAD = -1  # no tokenizer gives it
FILL = 0  # what stands there in the batch; it is never a target, and no text attends to it
BEYOND = "the data holds token {}, beyond vocab_size={}"
# What the pipelines fill with the id of padding where a row ends: positions and segments, too.
FILLED = [f"{side}{part}" for side in ("inputs", "targets") for part in ("", "_position", "_segmentation")]


class NextTokens(grain.MapTransform):
    """Makes the tokens that follow, and what of them counts, out of `targets` that are a copy of `inputs`.

    A target counts unless it is padding or, in the prompt of a conversation, masked. Of `marks` one counts unless it
    begins a document: the beginning of the next text is nothing to learn, the same token within a text is.

    Args:
      ignored_ids: the id that stands for padding and masks, then marks (None for one that the tokenizer lacks).
      axis: of the positions.
      vocab_size: token ids at or above it are refused.
      within: no first token of a text counts, whatever it is.
    """

    def __init__(self, ignored_ids: list[int | None], axis: int = 1, *, vocab_size: int, within: bool = False):
        self.padding, *marks = ignored_ids
        self.marks = [mark for mark in marks if mark is not None]
        self.axis = axis
        self.vocab_size = vocab_size
        self.within = within

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        largest = int(element["inputs"].max(initial=0))
        if largest >= self.vocab_size:
            raise ValueError(BEYOND.format(largest, self.vocab_size))
        targets, begins = element["targets"], element["targets_position"] == 0
        counts = targets != self.padding
        for mark in self.marks:
            counts &= (targets != mark) | ~begins
        if self.within:
            counts &= ~begins
        rows = dict(element, targets_segmentation=np.where(counts, element["targets_segmentation"], 0))
        if self.padding == PAD:
            rows |= {name: np.where(rows[name] == PAD, FILL, rows[name]) for name in FILLED}
        return rows | {name: self.one_earlier(rows[name]) for name in ("targets", "targets_segmentation")}

    def one_earlier(self, array: np.ndarray) -> np.ndarray:
        shifted = np.roll(array, -1, axis=self.axis)
        last = [slice(None)] * array.ndim
        last[self.axis] = slice(-1, None)
        shifted[tuple(last)] = 0  # for FILL, and for no segment
        return shifted


# tfds, in TensorFlow --------------------------------------------------------------------------------------------------


def with_segments(batch: dict[str, Any], columns: tuple[str, ...], padding_token: int) -> dict[str, Any]:
    """Adds where text is and at which position; unlike upstream's, to a batch of any number of rows."""
    import tensorflow as tf

    for column in columns:
        tokens = batch[column]
        batch[f"{column}_segmentation"] = tf.cast(tokens != padding_token, tf.int32)
        batch[f"{column}_position"] = tf.broadcast_to(tf.range(tokens.shape[-1], dtype=tf.int32), tf.shape(tokens))
    return batch


def without_padding_id(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with FILL for PAD; what counts, its pipeline has found out by itself."""
    import tensorflow as tf

    return {name: tf.where(tensor == PAD, FILL, tensor) for name, tensor in batch.items()}
