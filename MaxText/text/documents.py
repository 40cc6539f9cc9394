"""The documents in a file of text, and its lines that are none.

Read by the line or the row: of a line that is too long no more is ever held than a document may have. Left out on
purpose: tokenisation (the pipeline does it), deduplication and filtering.
"""

import codecs
import contextlib
import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
LARGEST_DOCUMENT = 64 << 20  # bytes; a longer one is a bad line


class InputError(Exception):
    """What makes the preparation impossible: a message with the option or file, what is wrong and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Bad:
    """Why a line is no document."""

    why: str


Records = Iterator[tuple[int, bytes | Bad]]  # line (or row) in its file, from 1; the text in UTF-8


def read(path: Path, file: BinaryIO, text_key: str, sample_by: str) -> Records:
    """The documents of an input and its bad lines, in order.

    Args:
      path: says by its ending of which kind the file is.
      file: the same file, open.
      text_key: the key (jsonl) or column (parquet) that holds the text.
      sample_by: what a document is in a .txt: a line, a paragraph or the whole document.

    Raises:
      InputError: it is no file of its kind.
    """
    kind = next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))
    if kind == ".parquet":
        yield from read_parquet(path, file, text_key)
        return
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(gzip.GzipFile(fileobj=file)) if kind.endswith(".gz") else file
        skip_mark(path, stream)
        if kind.startswith(".jsonl"):
            records: Records = ((line, parse(raw, text_key)) for line, raw in read_lines(stream))
        elif sample_by == "line":
            records = ((line, decoded(raw)) for line, raw in read_lines(stream))
        else:
            records = read_passages(stream, sample_by)
        yield from records


def skip_mark(path: Path, stream: Any) -> None:
    """Goes past a byte order mark, which says how the file is encoded and is no part of its text."""
    mark = stream.read(len(codecs.BOM_UTF8))
    if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # the first is UTF-32's, too
        raise InputError(f"{path}: by its byte order mark this is UTF-16 or UTF-32; UTF-8 is expected")
    if mark != codecs.BOM_UTF8:
        stream.seek(0)


def read_lines(stream: Any) -> Iterator[tuple[int, bytes | Bad]]:
    """Lines without their ends; of one that is too long no more than LARGEST_DOCUMENT bytes are ever held."""
    line = 0
    while raw := stream.readline(LARGEST_DOCUMENT + 1):
        line += 1
        fits = len(raw) <= LARGEST_DOCUMENT
        while len(raw) > LARGEST_DOCUMENT and not raw.endswith(b"\n"):
            raw = stream.readline(LARGEST_DOCUMENT + 1)
        yield line, raw.rstrip(b"\r\n") if fits else too_long()


def read_passages(stream: Any, sample_by: str) -> Records:
    """Paragraphs (what blank lines part) or the whole document, at the line where each begins."""
    lines: list[bytes] = []
    size, start = 0, 1
    for line, raw in read_lines(stream):
        if sample_by == "paragraph" and isinstance(raw, bytes) and not raw.strip():
            if size:
                yield start, joined(lines, size)
            lines, size, start = [], 0, line + 1
        elif isinstance(raw, bytes) and size + len(raw) < LARGEST_DOCUMENT:
            lines.append(raw)
            size += len(raw) + 1
        else:
            lines, size = [], LARGEST_DOCUMENT + 1
    if size:
        yield start, joined(lines, size)


def joined(lines: list[bytes], size: int) -> bytes | Bad:
    return too_long() if size > LARGEST_DOCUMENT else decoded(b"\n".join(lines).strip(b"\n"))


def too_long() -> Bad:
    return Bad(f"longer than {LARGEST_DOCUMENT} bytes")


def decoded(raw: bytes | Bad) -> bytes | Bad:
    """The text itself, if it is UTF-8."""
    if isinstance(raw, Bad):
        return raw
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return Bad(f"no UTF-8 at byte {error.start + 1}")
    return raw


def parse(raw: bytes | Bad, key: str) -> bytes | Bad:
    """The text of a line of JSON; b"" for a blank line."""
    if isinstance(raw, Bad) or not raw.strip():
        return raw if isinstance(raw, Bad) else b""
    try:
        row = json.loads(raw)
    except UnicodeDecodeError as error:
        return Bad(f"no UTF-8 at byte {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return Bad(f"no JSON: {error}")
    if not isinstance(row, dict):
        return Bad(f"a JSON object is expected, not {type(row).__name__}")
    if key not in row:
        return Bad(f"has no {key!r}; its keys: {', '.join(map(repr, list(row)[:8])) or 'none'}")
    if row[key] is None:
        return Bad(f"{key!r} is null")
    if not isinstance(row[key], str):
        return Bad(f"{key!r} is no text but {type(row[key]).__name__}")
    try:
        return row[key].encode()
    except UnicodeEncodeError:
        return Bad(f"{key!r} holds half a surrogate pair, which is no character")


def read_parquet(path: Path, file: BinaryIO, key: str) -> Records:
    """The rows of a text column, a few at a time."""
    table = pyarrow.parquet.ParquetFile(file)
    names = table.schema_arrow.names
    if key not in names:
        raise InputError(f"--text-key {key}: {path} has no such column; it has {', '.join(names)}")
    kind = table.schema_arrow.field(key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise InputError(f"--text-key {key}: in {path} this column is {kind}; text (string) is expected")
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=[key]):
        for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            row += 1
            if raw is None:
                yield row, Bad(f"{key!r} is null")
            else:
                yield (
                    row,
                    decoded(raw) if len(raw) <= LARGEST_DOCUMENT else Bad(f"longer than {LARGEST_DOCUMENT} bytes"),
                )


@contextlib.contextmanager
def refusals(path: Path, entry: dict[str, Any]) -> Iterator[None]:
    """A file that is damaged as a whole: what cannot be unpacked cannot be told line by line."""
    try:
        yield
    except (EOFError, OSError, zlib.error, pyarrow.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        raise InputError(f"{path}: damaged or cut off after {entry['documents']} documents: {error}") from error
