"""Arrays of MaxText's checkpoint that are stacked from tensors of another, read and written piece by piece.

MaxText holds a matrix of all layers, or of all experts, in one array, which may be larger than the host's memory. Orbax
writes arrays that are in memory; what is here hands it one piece after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import tensorstore
from etils import epy

with epy.lazy_imports():
    from orbax.checkpoint import type_handlers
    from orbax.checkpoint.experimental import v1 as ocp

Shape = tuple[int, ...]
Region = tuple[Any, ...]  # of integers, slices and an ellipsis


@dataclasses.dataclass(frozen=True)
class Stacked:
    """An array, and how to read what it is stacked from.

    Attributes:
      names: a tensor's name, or the (nested) list of those that are stacked, the outermost axis first.
      axes: where each level of the list lies in the array.
      load: (name, shape) -> the tensor as it stands in the array, of that shape.
    """

    shape: Shape
    dtype: np.dtype
    names: Any
    axes: tuple[int, ...]
    load: Callable[[str, Shape], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[Region, np.ndarray]]:
        """Where each tensor lies in the array, and the tensor."""
        shape = tuple(size for axis, size in enumerate(self.shape) if axis not in self.axes)
        for index in np.ndindex(*(self.shape[axis] for axis in self.axes)):
            name, region = self.names, [slice(None)] * len(self.shape)
            for axis, i in zip(self.axes, index, strict=True):
                name, region[axis] = name[i], i
            tensor = np.asarray(self.load(name, shape)).astype(self.dtype, copy=False)
            if tensor.shape != shape:
                raise ValueError(f"{name}: {tensor.shape} where {shape} is needed")
            yield tuple(region), tensor

    def whole(self) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        for region, tensor in self.pieces():
            array[region] = tensor
        return array


class Pending(np.ndarray):
    """A leaf for Orbax that takes no memory: `stacked` is what is to be written; the numbers are NaN."""

    stacked: Stacked

    @classmethod
    def of(cls, stacked: Stacked) -> Pending:
        array = np.broadcast_to(np.full((), np.nan, stacked.dtype), stacked.shape).view(cls)
        array.stacked = stacked
        return array


def stored_by_piece(_: Any, leaf: np.ndarray) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """For Orbax's `scoped_storage_options_creator`: each piece has chunks of its own."""
    axes = leaf.stacked.axes if isinstance(leaf, Pending) else None
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=axes)


@contextlib.contextmanager
def written_by_piece(wrote: Callable[[int], None]) -> Iterator[None]:
    """Lets Orbax write `Pending` leaves besides arrays: a piece is read while the one before it is written.

    Pieces must be `stored_by_piece`: of chunks that several share each would be read again for the next.

    Args:
      wrote: is told the bytes of each piece.
    """

    async def write(_: Any, value: np.ndarray, spec: dict[str, Any], context: tensorstore.Context) -> None:
        store = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=context)
        previous: Awaitable[Any] = asyncio.sleep(0)
        for region, piece in value.stacked.pieces() if isinstance(value, Pending) else [((), value)]:
            await previous
            previous = store[region].write(piece, can_reference_source_data_indefinitely=True)
            wrote(piece.nbytes)
        await previous

    with mock.patch.object(type_handlers.NumpyHandler, "_open_and_write", write):
        yield
