"""Documents between inputs and shards, in files by their places: so a small memory sorts much text."""

import collections
import os
import struct
from collections.abc import Iterator
from pathlib import Path

BUFFER_BYTES = 64 << 20  # of text that the first pass gathers before it appends to the buckets
HEADER = struct.Struct("<QI")  # of a document in a bucket: its place and its length


class Buckets:
    """Files to which documents are appended, many at a time; no more is kept open than one."""

    def __init__(self, folder: Path, sizes: dict[str, int]):
        self.folder = folder
        self.sizes = dict(sizes)
        self.buffers: dict[str, list[bytes]] = collections.defaultdict(list)
        self.buffered = 0
        for file in folder.glob("*.bucket"):  # what an interrupted pass wrote beyond its last whole input goes
            if file.name in self.sizes:
                os.truncate(file, self.sizes[file.name])
            else:
                file.unlink()

    def add(self, name: str, place: int, text: bytes) -> None:
        self.buffers[name].append(HEADER.pack(place, len(text)) + text)
        self.buffered += HEADER.size + len(text)
        if self.buffered > BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        for name, documents in self.buffers.items():
            data = b"".join(documents)
            with (self.folder / name).open("ab") as file:
                file.write(data)
            self.sizes[name] = self.sizes.get(name, 0) + len(data)
        self.buffers.clear()
        self.buffered = 0


def bucket_name(split: str, bucket: int) -> str:
    return f"{split}-{bucket:06d}.bucket"


def sorted_bucket(file: Path) -> Iterator[bytes]:
    """The documents of a bucket in shuffled order."""
    data = memoryview(file.read_bytes()) if file.exists() else memoryview(b"")
    documents, offset = [], 0
    while offset < len(data):
        place, length = HEADER.unpack_from(data, offset)
        offset += HEADER.size
        documents.append((place, bytes(data[offset : offset + length])))
        offset += length
    return (text for _, text in sorted(documents))
