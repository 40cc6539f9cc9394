"""What a run's pipelines give, read in this process: for tests that count tokens."""

from typing import Any

import numpy as np
import pydantic

from MaxText import upstream
from MaxText.data import pipelines


def with_keys(config: Any, **keys: Any) -> Any:
    """The same settings but for these, as their key's type."""
    fields = upstream.types.MaxTextConfig.model_fields
    typed = {key: pydantic.TypeAdapter(fields[key].annotation).validate_python(x) for key, x in keys.items()}
    return upstream.with_settings(config, **typed)


def rows_of(config: Any, split: str) -> dict[str, np.ndarray]:
    """All that the iterator of a split gives, row by row."""
    mesh = upstream.maxtext_utils.get_mesh_from_config(config)
    with pipelines.mended(config):
        train, evaluation = upstream.input_pipeline_interface.create_data_iterator(config, mesh)
    batches = list((train if split == "train" else evaluation).local_iterator)
    batches = [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]
    assert len({array.shape for batch in batches for array in batch.values()}) == 1
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def pieces_of(rows: dict[str, np.ndarray]) -> list[list[tuple[int, ...]]]:
    """Of each row that holds any, the documents or parts of such: what attends to each other."""
    found = []
    for row, segments in zip(rows["inputs"], rows["inputs_segmentation"], strict=True):
        numbers = [number for number in np.unique(segments) if number]
        found.append([tuple(row[segments == number].tolist()) for number in numbers])
    return [pieces for pieces in found if pieces]
