"""What is wrong with data that could not be read: which file is damaged, which row has no text.

Readers say it in their own terms, or not at all. So once one has failed, the local files are looked through, for some
seconds at most. Left out on purpose: files in buckets, and formats other than ArrayRecord, Parquet and lines of JSON.
"""

import itertools
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module
from google.protobuf.message import DecodeError

from MaxText import upstream
from MaxText.data import files, rows

# What cache/reading.py says of a row, in whatever its reader's error has become on its way.
OF_CACHE = re.compile(r"[^\n(:]*\.arrayrecord: row \d+ is damaged [^\n]*?; cache the split anew")
SECONDS = 60.0
AT_ONCE = 256  # records


def named(config: Any, error: BaseException | str, splits: tuple[str, ...] = ("train", "eval")) -> str:
    """The fault of the data in a sentence; "" where none is found."""
    if isinstance(error, FileNotFoundError):
        return ""
    if ours := re.search(rows.BEYOND.format(r"\d+", r"\d+"), str(error)):  # from a worker, in a traceback
        return ours[0]
    if damaged := OF_CACHE.search(str(error)):
        return damaged[0].strip()
    until = time.monotonic() + SECONDS
    for split in splits:
        columns = config.train_data_columns if split == "train" else config.eval_data_columns
        paths = [path for path in files.paths(config, split) if "://" not in path]
        kind = form(config)
        # Files that do not open are found at once; so all are opened before any is read through.
        for looked_through in (False, True):
            for path in paths:
                if fault := FAULTS[kind](path, list(columns), looked_through, until) if kind in FAULTS else "":
                    return fault
    return ""


def form(config: Any) -> str:
    if config.dataset_type == "grain":
        return config.grain_file_type
    return config.hf_path if config.dataset_type == "hf" else ""


def of_array_record(path: str, columns: list[str], looked_through: bool, until: float) -> str:
    reader = array_record_module.ArrayRecordReader(path)
    try:
        if not reader.ok():
            reader.close()  # raises what is wrong
        if looked_through:
            parse = upstream.input_pipeline_utils.ParseFeatures(columns, True)
            for first in range(0, reader.num_records(), AT_ONCE):
                records = reader.read(list(range(first, min(first + AT_ONCE, reader.num_records()))))
                for row, record in enumerate(records, start=first):
                    for column, value in parse.map(record).items():
                        if not len(value):
                            return without_text(path, row, column)
                if time.monotonic() > until:
                    break
    except RuntimeError as error:
        reason = str(error) or "no index at its end"
        return f"{path}: is damaged or was cut short; its ArrayRecords cannot be read ({reason})"
    except (ValueError, DecodeError):  # a column that is not there, which upstream names; rows that are no examples
        return ""
    return ""


def of_parquet(path: str, columns: list[str], looked_through: bool, until: float) -> str:
    try:
        table = pyarrow.parquet.ParquetFile(path)
        if looked_through:
            there = [column for column in columns if column in table.schema_arrow.names]
            batches = (batch.to_pylist() for batch in table.iter_batches(AT_ONCE, columns=there))
            return first_without_text(path, itertools.chain.from_iterable(batches), there, until)
    except (pyarrow.ArrowInvalid, OSError) as error:
        return f"{path}: is damaged or no Parquet ({error})"
    return ""


def of_json(path: str, columns: list[str], looked_through: bool, until: float) -> str:
    if not looked_through:
        return ""
    try:
        with open(path, encoding="utf-8") as lines:
            return first_without_text(path, map(json.loads, lines), columns, until)
    except (OSError, ValueError, AttributeError):  # compressed, or no lines of JSON objects: upstream says so
        return ""


FAULTS = {"arrayrecord": of_array_record, "parquet": of_parquet, "json": of_json}


def first_without_text(path: str, found: Iterator[Any], columns: list[str], until: float) -> str:
    known: set[str] = set()  # a column that no row has is missing, which upstream says
    for number, row in enumerate(found):
        known |= row.keys()
        for column in columns:
            if column in known and lacks_text(row.get(column)):
                return without_text(path, number, column)
        if time.monotonic() > until:
            break
    return ""


def lacks_text(value: Any) -> bool:
    """Whether a column's value is null, or of a conversation what one has said."""
    if isinstance(value, list):
        return any(turn is None or (isinstance(turn, dict) and turn.get("content", "") is None) for turn in value)
    return value is None


def without_text(path: str, row: int, column: str) -> str:
    return f"{path}: the text of row {row} (the first is 0) is null, in column {column!r}; leave such rows out"
