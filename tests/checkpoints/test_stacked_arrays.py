"""Laws of arrays that are written by piece: they are what they would be at once, and are never in memory whole."""

import tracemalloc

import jax
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

from MaxText.checkpoints.stacked_arrays import Pending, Stacked, stored_by_piece, written_by_piece

LAYERS = [f"layer{i}" for i in range(3)]
EXPERTS = [[f"expert{e}_layer{i}" for i in range(3)] for e in range(2)]
STACKS = [("table", (), (4, 6)), (LAYERS, (1,), (4, 3, 6)), (LAYERS, (0,), (3, 4, 6)), (EXPERTS, (0, 1), (2, 3, 4, 6))]


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).normal(size=shape).astype(np.float32)


def reference(names: object, axes: tuple[int, ...]) -> np.ndarray:
    tensors = np.array([numbers(name, (4, 6)) for name in np.ravel(names)]).reshape(*np.shape(names), 4, 6)
    return np.moveaxis(tensors, range(len(axes)), axes)


def save(path, tree):
    """-> the bytes of each piece."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.scoped_storage_options_creator = stored_by_piece
    wrote = []
    with context, written_by_piece(wrote.append):
        ocp.partial.save(path, tree)
        ocp.partial.finalize(path)
    return wrote


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("names", "axes", "shape"), STACKS)
def test_an_array_written_by_piece_is_the_one_stacked_in_memory(names, axes, shape, dtype, tmp_path):
    stacked = Stacked(shape, jax.numpy.dtype(dtype), names, axes, numbers)
    expected = reference(names, axes).astype(dtype)
    np.testing.assert_array_equal(stacked.whole(), expected)
    wrote = save(tmp_path / "mt", {"pieces": Pending.of(stacked), "small": np.arange(5)})
    assert sorted(wrote) == sorted([expected.nbytes // np.size(names)] * np.size(names) + [40])
    chunks = ocp.metadata(tmp_path / "mt").metadata["pieces"].storage_metadata.chunk_shape
    assert chunks == tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    restored = ocp.load(tmp_path / "mt")
    np.testing.assert_array_equal(restored["pieces"], expected)
    np.testing.assert_array_equal(restored["small"], np.arange(5))
    assert restored["pieces"].dtype == stacked.dtype


def test_two_tensors_are_in_memory_and_never_the_array(tmp_path):
    count, size = 24, 1 << 18  # tensors of 1 MiB
    names = [f"layer{i}" for i in range(count)]
    stacked = Stacked(
        (512, count, 512), np.dtype(np.float32), names, (1,), lambda name, shape: np.full(shape, len(name))
    )
    leaf = Pending.of(stacked)
    save(tmp_path / "warm", {"small": np.arange(5)})  # what the first save imports
    tracemalloc.start()
    save(tmp_path / "mt", {"pieces": leaf})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tensor = size * 4
    assert peak < 8 * tensor < stacked.nbytes  # float64 as loaded, float32, and the one before


def test_a_tensor_of_another_shape_is_no_piece():
    stacked = Stacked((4, 3, 6), np.dtype(np.float32), LAYERS, (1,), lambda name, shape: np.ones((1, 6), np.float32))
    with pytest.raises(ValueError, match=r"layer0: \(1, 6\) where \(4, 6\) is needed"):
        stacked.whole()


def test_what_was_never_written_is_no_number():
    assert np.isnan(Pending.of(Stacked((2, 2), np.dtype(np.float32), LAYERS, (1,), numbers))).all()
