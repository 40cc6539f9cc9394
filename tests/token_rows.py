"""Data sets of random tokens: rows that stand where they stand, of known lengths."""

import pathlib
from typing import Any

import maxtext
import numpy as np
from array_record.python import array_record_module
from maxtext.input_pipeline.protos import example_pb2


def write(path: pathlib.Path, lengths: list[int], seed: int) -> pathlib.Path:
    """An ArrayRecord of rows of random tokens, of these lengths; what is shorter than the others is padded."""
    generator = np.random.default_rng(seed)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for length in lengths:
        example = example_pb2.Example()
        example.features.feature["text"].int64_list.value.extend(generator.integers(1, 256, length).tolist())
        writer.write(example.SerializeToString())
    writer.close()
    return path


# Keys that read such rows as they are.
KEYS: dict[str, Any] = {
    "dataset_type": "grain",
    "grain_file_type": "arrayrecord",
    "grain_worker_count": 0,
    "grain_worker_count_eval": 0,
    "tokenize_train_data": "false",
    "tokenize_eval_data": "false",
    "tokenizer_type": "sentencepiece",
    "tokenizer_path": pathlib.Path(maxtext.__file__).parent / "assets/tokenizers/tokenizer.default",
    "packing": "false",
}
