"""The arrays of a checkpoint, read region by region: a layer of a stacked array without the others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from MaxText.checkpoints.stacked_arrays import Region

KEPT = 1 << 30  # bytes of chunks that stay decoded: Orbax stores small arrays as one chunk, of which regions are read


class Reader:
    """Reads regions of the arrays in a folder that Orbax has written."""

    def __init__(self, folder: epath.Path):
        """
        Args:
          folder: what holds `_METADATA` and the arrays; local or gs://.
        """
        self.base = str(folder) if "://" in str(folder) else f"file://{folder}"
        self.format = json.loads((folder / "_METADATA").read_text())
        self.context = tensorstore.Context({"cache_pool": {"total_bytes_limit": KEPT}})
        self.opened: dict[tuple[str, ...], Any] = {}

    def read(self, path: tuple[str, ...], region: Region = (...,)) -> np.ndarray:
        """A region of the array at `path` in the checkpoint's tree.

        Raises:
          ValueError, OSError: tensorstore's, where it cannot be read.
        """
        if path not in self.opened:
            self.opened[path] = tensorstore.open(self.spec(path), context=self.context, open=True, read=True).result()
        return np.asarray(self.opened[path][region].read().result())

    def spec(self, path: tuple[str, ...]) -> dict[str, Any]:
        name = ".".join(path)
        store: Any = f"{self.base}/{name}/"
        if self.format.get("use_ocdbt", True):
            store = {"driver": "ocdbt", "base": f"{self.base}/", "path": f"{name}/"}
        return {"driver": "zarr3" if self.format.get("use_zarr3") else "zarr", "kvstore": store}
