"""The files that MaxText's grain pipeline reads."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from MaxText import upstream


def write_rows(path: Path, rows: Iterable[str]) -> None:
    """Writes `rows` as the ArrayRecord file of tf.train.Example that MaxText's grain pipeline reads."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        example = upstream.example_pb2.Example()
        example.features.feature["text"].bytes_list.value.append(row.encode())
        writer.write(example.SerializeToString())
    writer.close()


def write_shard(shard: Path, unfinished: Path, texts: Iterable[bytes]) -> dict[str, Any]:
    """Writes one shard, under the name `unfinished` until it is whole -> its counts and its hash."""
    counts = {"documents": 0, "text_bytes": 0}

    def rows() -> Iterator[str]:
        for text in texts:
            counts["documents"] += 1
            counts["text_bytes"] += len(text)
            yield text.decode()

    write_rows(unfinished, rows())
    found = array_record_module.ArrayRecordReader(str(unfinished)).num_records()
    if found != counts["documents"]:
        raise OSError(None, f"{found} of {counts['documents']} documents were written", str(unfinished))
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = unfinished.stat().st_size
    unfinished.replace(shard)
    return counts | {"bytes": size, "sha256": digest}
