"""Turns text into shuffled ArrayRecord shards for MaxText's grain pipeline, split into training and evaluation.

    python scripts/prepare_text.py data/*.jsonl.gz book.txt --out corpus --shards 16 --eval-fraction 0.01

writes train-*.arrayrecord and eval-*.arrayrecord (tf.train.Example with one feature, `text`), manifest.json (inputs,
counts, shards, their hashes) and bad_lines.txt (what was left out, and why) into --out. Recipes: docs/data.md.

Each document gets two hashes. That of its text alone decides whether it is held out, so the split is the same whatever
the order of the inputs, the seed and the number of shards, and a text that occurs twice lies on one side. That of seed,
line and text is its place in the shuffled order; a shard is a range of places. The first pass appends every document to
the bucket of its place, the second sorts bucket after bucket: memory holds a buffer, one bucket and one document.

An interrupted preparation goes on with the same command: after the last input that was read to its end, or at the first
unfinished shard. A shard gets its name when it is whole. Left out on purpose: tokenisation (the pipeline does it),
deduplication and filtering.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module
from build_corpus import write_rows
from rich.console import Console
from rich.progress import Progress

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BUCKET_BYTES = 64 << 20  # of text that the second pass sorts in memory at a time
BUFFER_BYTES = 64 << 20  # of text that the first pass gathers before it appends to the buckets
LARGEST_DOCUMENT = 64 << 20  # bytes; a longer one is a bad line
EXPANSION = 8  # how much larger than its file the text of a compressed input may be: it only sets the buckets' number
REPORT_EVERY = 1000  # documents between two looks at the progress bar
HEADER = struct.Struct("<QI")  # of a document in a bucket: its place and its length
PLACES = 1 << 64

State = dict[str, Any]


class InputError(Exception):
    """What makes the preparation impossible: a message with the option or file, what is wrong and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Bad:
    """Why a line is no document."""

    why: str


Records = Iterator[tuple[int, bytes | Bad]]  # line (or row) in its file, from 1; the text in UTF-8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for."""

    inputs: tuple[Path, ...]
    out: Path
    text_key: str
    sample_by: str
    shards: int
    eval_fraction: float
    seed: int

    @property
    def work(self) -> Path:
        return self.out / ".work"

    @property
    def bad_lines(self) -> Path:
        return self.out / "bad_lines.txt"

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.json"

    @property
    def shard_counts(self) -> dict[str, int]:
        """Split -> number of shards; those of evaluation are about as large as those of training."""
        return {"train": self.shards, "eval": math.ceil(self.shards * self.eval_fraction)}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which bytes come out, beside the inputs' contents."""
        names = ("text_key", "sample_by", "shards", "eval_fraction", "seed")
        return {"inputs": sorted(map(str, self.inputs))} | {name: getattr(self, name) for name in names}

    def shard_names(self, split: str) -> list[str]:
        count = self.shard_counts[split]
        return [f"{split}-{index:05d}-of-{count:05d}.arrayrecord" for index in range(count)]

    def split_of(self, text: bytes) -> str:
        """ "eval" for the share --eval-fraction of all texts, by the text alone."""
        held_out = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < self.eval_fraction * PLACES
        return "eval" if held_out else "train"

    def place_of(self, text: bytes, line: int) -> int:
        """Where in the shuffled order the text stands, in [0, PLACES). The line keeps copies of one text apart."""
        key = f"{self.seed} {line}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=key).digest())


# Reading ------------------------------------------------------------------------------------------------------------


def read(path: Path, file: BinaryIO, plan: Plan) -> Records:
    """The documents of an input and its bad lines, in order."""
    kind = next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))
    if kind == ".parquet":
        yield from read_parquet(path, file, plan.text_key)
        return
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(gzip.GzipFile(fileobj=file)) if kind.endswith(".gz") else file
        if kind.startswith(".jsonl"):
            records: Records = ((line, parse(raw, plan.text_key)) for line, raw in read_lines(stream))
        elif plan.sample_by == "line":
            records = ((line, decoded(raw)) for line, raw in read_lines(stream))
        else:
            records = read_passages(stream, plan.sample_by)
        yield from records


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


# First pass: documents to buckets -----------------------------------------------------------------------------------


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


def distribute(plan: Plan, state: State, progress: Progress) -> None:
    """Appends the documents of every input that is not done to their buckets."""
    buckets = Buckets(plan.work, state["buckets"])
    counts_of = {split: count * state["buckets_per_shard"] for split, count in plan.shard_counts.items()}
    plan.bad_lines.touch()
    os.truncate(plan.bad_lines, state["bad_bytes"])
    done = {entry["path"] for entry in state["inputs"]}
    task = progress.add_task("reading", total=sum(path.stat().st_size for path in plan.inputs))
    before = 0  # bytes of the inputs before this one
    for path in plan.inputs:
        if str(path) not in done:
            entry: dict[str, Any] = {"path": str(path), **stamp(path), "documents": 0, "blank": 0, "bad": 0}
            with path.open("rb") as file, plan.bad_lines.open("a") as bad_lines, refusals(path, entry):
                for line, text in read(path, file, plan):
                    if isinstance(text, Bad):
                        entry["bad"] += 1
                        bad_lines.write(f"{path}:{line}: {text.why}\n")
                    elif not text.strip():
                        entry["blank"] += 1
                    else:
                        entry["documents"] += 1
                        split, place = plan.split_of(text), plan.place_of(text, line)
                        buckets.add(bucket_name(split, place * counts_of[split] // PLACES), place, text)
                    if line % REPORT_EVERY == 0:
                        progress.update(task, completed=before + file.tell(), description=f"reading {path.name}")
                file.seek(0)
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            buckets.flush()
            state["inputs"].append(entry)
            state |= {"buckets": buckets.sizes, "bad_bytes": plan.bad_lines.stat().st_size}
            save(plan.work / "state.json", state)
        before += path.stat().st_size
        progress.update(task, completed=before)


def stamp(path: Path) -> dict[str, int]:
    """Changes with the file."""
    status = path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


@contextlib.contextmanager
def refusals(path: Path, entry: dict[str, Any]) -> Iterator[None]:
    """A file that is damaged as a whole: what cannot be unpacked cannot be told line by line."""
    try:
        yield
    except (EOFError, OSError, zlib.error, pyarrow.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        raise InputError(f"{path}: damaged or cut off after {entry['documents']} documents: {error}") from error


# Second pass: buckets to shards -------------------------------------------------------------------------------------


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


def write_shards(plan: Plan, state: State, progress: Progress) -> None:
    """Writes what is missing of the shards, each under its name only when it is whole."""
    per_shard = state["buckets_per_shard"]
    done = {entry["name"] for entry in state["shards"]}
    task = progress.add_task("writing shards", total=sum(plan.shard_counts.values()))
    for split in plan.shard_counts:
        for index, name in enumerate(plan.shard_names(split)):
            if name not in done:
                files = [plan.work / bucket_name(split, index * per_shard + part) for part in range(per_shard)]
                state["shards"].append({"name": name, "split": split} | write_shard(plan, name, files))
                save(plan.work / "state.json", state)
                for file in files:
                    file.unlink(missing_ok=True)
            progress.update(task, advance=1)


def write_shard(plan: Plan, name: str, buckets: list[Path]) -> dict[str, Any]:
    """Writes one shard -> its counts and its hash."""
    unfinished = plan.work / name
    counts = {"documents": 0, "text_bytes": 0}

    def rows() -> Iterator[str]:
        for bucket in buckets:
            for text in sorted_bucket(bucket):
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
    unfinished.replace(plan.out / name)
    return counts | {"bytes": size, "sha256": digest}


# The whole ----------------------------------------------------------------------------------------------------------


def save(path: Path, content: Any) -> None:
    """Writes all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def begin(plan: Plan, console: Console) -> State:
    """The state of an interrupted preparation of the same plan, or a fresh one.

    Raises:
      InputError: files lie in --out that are not this preparation's.
    """
    ours = {name for split in plan.shard_counts for name in plan.shard_names(split)}
    found = {file.name for file in plan.out.glob("*.arrayrecord")}
    path = plan.work / "state.json"
    state: State = json.loads(path.read_text()) if path.exists() else {}
    if not state and found:
        raise InputError(f"--out {plan.out}: holds shards of another origin ({min(found)}); take an empty folder")
    if state:
        changed = [Path(entry["path"]) for entry in state["inputs"] if has_changed(entry)]
        if state["settings"] == plan.settings and not changed and found <= ours:
            console.print(f"going on: {len(state['inputs'])} inputs read, {len(state['shards'])} shards written")
            return state
        console.print(f"starting afresh: {f'{changed[0]} has changed' if changed else 'the options have changed'}")
        for entry in state["shards"]:
            (plan.out / entry["name"]).unlink(missing_ok=True)
    sizes = ((path.stat().st_size, path.suffix in (".gz", ".parquet")) for path in plan.inputs)
    expected = sum(size * (EXPANSION if compressed else 1) for size, compressed in sizes)
    per_shard = max(1, math.ceil(expected / plan.shards / BUCKET_BYTES))
    state = {"settings": plan.settings, "buckets_per_shard": per_shard, "inputs": [], "buckets": {}, "bad_bytes": 0}
    save(path, state | {"shards": []})
    return state | {"shards": []}


def has_changed(entry: dict[str, Any]) -> bool:
    path = Path(entry["path"])
    return not path.exists() or any(entry[key] != value for key, value in stamp(path).items())


def check_shards_are_filled(plan: Plan, state: State) -> None:
    """A shard without a document cannot be read."""
    documents = sum(entry["documents"] for entry in state["inputs"])
    per_shard = state["buckets_per_shard"]
    for split, count in plan.shard_counts.items():
        filled = {int(name.split("-")[1].removesuffix(".bucket")) // per_shard
                  for name in state["buckets"] if name.startswith(split)}  # fmt: skip
        if count and not filled and split == "eval":
            raise InputError(
                f"--eval-fraction {plan.eval_fraction}: none of {documents} documents is held out; raise it, or "
                "give 0 for none"
            )
        if len(filled) < count:
            raise InputError(
                f"--shards {plan.shards}: {documents} documents leave {count - len(filled)} of {count} {split} shards "
                "empty; take fewer"
            )


def check_bad_lines(plan: Plan, state: State, max_bad: int) -> None:
    bad = sum(entry["bad"] for entry in state["inputs"])
    if bad > max_bad:
        with plan.bad_lines.open() as lines:
            first = lines.readline().strip()
        raise InputError(
            f"--max-bad {max_bad}: {bad} bad line{'s' if bad > 1 else ''} in {plan.bad_lines}, the first: {first}\n"
            f"No shard was written. Mend the input, or go on without them: the same command with --max-bad {bad}."
        )


def finished(plan: Plan) -> dict[str, Any] | None:
    """The manifest of a preparation that ended; None without one.

    Raises:
      InputError: it is of other inputs or options, or its shards are not all there.
    """
    if not plan.manifest.exists():
        return None
    manifest = json.loads(plan.manifest.read_text())
    if manifest["settings"] != plan.settings or any(map(has_changed, manifest["inputs"])):
        raise InputError(f"--out {plan.out}: holds what other inputs or options gave ({plan.manifest}); take another")
    for entry in manifest["shards"]:
        file = plan.out / entry["name"]
        if not file.exists() or file.stat().st_size != entry["bytes"]:
            raise InputError(f"{file}: is missing or not as {plan.manifest} has it; remove {plan.out} and begin again")
    return manifest


def prepare(plan: Plan, max_bad: int, console: Console) -> dict[str, Any]:
    """Writes the shards and the manifest, unless they are there -> the manifest."""
    if (manifest := finished(plan)) is not None:
        console.print("finished earlier and kept")
        return manifest
    plan.work.mkdir(parents=True, exist_ok=True)
    with (plan.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {plan.out}: another process is writing there") from None
        state = begin(plan, console)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            distribute(plan, state, progress)
            check_bad_lines(plan, state, max_bad)
            check_shards_are_filled(plan, state)
            write_shards(plan, state, progress)
        totals = {
            split: {
                "documents": sum(entry["documents"] for entry in state["shards"] if entry["split"] == split),
                "text_bytes": sum(entry["text_bytes"] for entry in state["shards"] if entry["split"] == split),
                "files": f"{plan.out}/{split}-*.arrayrecord",
            }
            for split, count in plan.shard_counts.items()
            if count
        }
        manifest = {"settings": plan.settings, **totals, "inputs": state["inputs"], "shards": state["shards"]}
        save(plan.manifest, manifest)
        shutil.rmtree(plan.work)
    return manifest


def parse_arguments(arguments: list[str]) -> tuple[Plan, int]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="docs/data.md has the recipes, and what the trainer is told.",
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=f"a local file: {', '.join(SUFFIXES)}")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the shards; must be new or this command's own"
    )
    parser.add_argument("--text-key", default="text", help="the key (jsonl) or column (parquet) that holds the text")
    parser.add_argument(
        "--sample-by",
        choices=("line", "paragraph", "document"),
        default="line",
        help="what a document is in a .txt: a line, what blank lines part, or the whole file (default: line)",
    )
    parser.add_argument("--shards", type=int, default=1, help="number of training shards (default: 1)")
    parser.add_argument(
        "--eval-fraction",
        type=float,
        default=0.01,
        help="share of the documents that is held out, in [0, 1) (default: 0.01)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle; the split does not depend on it")
    parser.add_argument("--max-bad", type=int, default=0, help="fail if more lines than this are bad (default: 0)")
    parser.add_argument("--format", choices=("arrayrecord",), default="arrayrecord", help="of the shards")
    given = parser.parse_args(arguments)
    for option, is_right, allowed in (
        ("shards", given.shards >= 1, "1 or more"),
        ("eval_fraction", 0 <= given.eval_fraction < 1, "0 or more and less than 1"),
        ("max_bad", given.max_bad >= 0, "0 or more"),
    ):
        if not is_right:
            parser.error(f"--{option.replace('_', '-')} {getattr(given, option)}: allowed is {allowed}")
    for path in given.inputs:
        if not path.is_file():
            parser.error(f"{path}: no such file")
        if not path.name.endswith(SUFFIXES):
            parser.error(f"{path}: unknown kind of file; allowed are {', '.join(SUFFIXES)}")
    if twice := [path for path, count in collections.Counter(given.inputs).items() if count > 1]:
        parser.error(f"{twice[0]}: is named twice")
    names = ("out", "text_key", "sample_by", "shards", "eval_fraction", "seed")
    return Plan(inputs=tuple(given.inputs), **{name: getattr(given, name) for name in names}), given.max_bad


def main(arguments: list[str]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    plan, max_bad = parse_arguments(arguments)
    try:
        manifest = prepare(plan, max_bad, console)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}; the same command goes on")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    for split in ("train", "eval"):
        if split in manifest:
            entry = manifest[split]
            console.print(
                f"{split:>5}  {entry['documents']:,} documents, {entry['text_bytes']:,} bytes  {entry['files']}"
            )
    bad, blank = (sum(entry[name] for entry in manifest["inputs"]) for name in ("bad", "blank"))
    console.print(f"left out: {bad:,} bad lines ({plan.bad_lines}), {blank:,} blank")


if __name__ == "__main__":
    main(sys.argv[1:])
