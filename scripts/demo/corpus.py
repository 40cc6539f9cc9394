"""Builds the demo's corpus from text that every Python carries: the source and docstrings of its standard library.

    python scripts/demo/corpus.py [folder]        5 seconds on one core, no network

writes train.arrayrecord, train_small.arrayrecord and eval.arrayrecord (one `text` column, read by MaxText's grain
pipeline), tokenizer.model (SentencePiece) and corpus.json (what is in them). The same Python gives the same bytes.

A file belongs to training or to evaluation by the hash of its path, no row occurs twice, and evaluation drops a row
that shares a passage with training (licences, copied classes). Left out on purpose: tests (some distributions lack
them), generated tables, and lines longer than a row.
"""

import argparse
import hashlib
import inspect
import io
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from MaxText.console import errors_as_lines
from MaxText.text.shards import write_rows

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
ROW_TOKENS = 126  # 128 less the beginning-of-text and end-of-text tokens that the pipeline adds
VOCAB_SIZE = 2048
EVAL_SHARE = 12  # one file in so many
EVAL_ROWS = 192
SMALL_ROWS = 500
PASSAGE_LINES, PASSAGE_CHARACTERS = 3, 80  # what counts as the same text in two files
LARGEST_FILE = 1 << 18
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "lib2to3"),
    *("encodings", "pydoc_data", "__pycache__"),
    *("site-packages", "dist-packages"),
}
SKIPPED_FILES = {"html/entities.py"}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_sources(root: Path) -> dict[str, str]:
    """Relative path -> text of every source file worth reading under `root`, in a fixed order."""
    sources = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        generated = name.parts[0].startswith(("config-", "_sysconfigdata")) or name.as_posix() in SKIPPED_FILES
        if generated or SKIPPED_FOLDERS & set(name.parts) or path.stat().st_size > LARGEST_FILE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        # U+2581 is how SentencePiece writes a space: a text that holds one would not come back unchanged.
        if "\u2581" not in text:
            sources[name.as_posix()] = text
    return sources


def is_evaluation(name: str) -> bool:
    """Whether the file called `name` is held out."""
    return int(digest(name), 16) % EVAL_SHARE == 0


def passages(row: str) -> set[str]:
    """Every run of PASSAGE_LINES lines in `row`, indentation and empty lines aside; shorter than a passage: idioms."""
    lines = [line.strip() for line in row.splitlines() if line.strip()]
    runs = ("\n".join(lines[start : start + PASSAGE_LINES]) for start in range(len(lines) - PASSAGE_LINES + 1))
    return {run for run in runs if len(run) >= PASSAGE_CHARACTERS}


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """A byte-pair SentencePiece model that keeps every character, whitespace included."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        max_sentence_length=LARGEST_FILE,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def cut_rows(text: str, lengths: Callable[[list[str]], list[int]], most: int) -> Iterator[str]:
    """`text` in rows of whole lines, each at most `most` tokens long; `lengths` counts the tokens of texts."""
    row, length = "", 0
    lines = text.splitlines(keepends=True)
    for line, tokens in zip(lines, lengths(lines), strict=True):
        if tokens > most:
            continue
        if length + tokens > most:
            yield row
            row, length = "", 0
        row, length = row + line, length + tokens
    if row.strip():
        yield row


def build(folder: Path, root: Path = STANDARD_LIBRARY) -> dict[str, Any]:
    """Writes the corpus of the sources under `root` into `folder`, unless it is there already. Returns corpus.json."""
    sources = read_sources(root)
    manifest_path = folder / "corpus.json"
    identity = digest(json.dumps(sources) + Path(__file__).read_text() + inspect.getsource(write_rows))
    if manifest_path.exists() and json.loads(manifest_path.read_text())["identity"] == identity:
        return json.loads(manifest_path.read_text())
    manifest_path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)

    training = {name: text for name, text in sources.items() if not is_evaluation(name)}
    held_out = {name: text for name, text in sources.items() if is_evaluation(name)}
    model = train_tokenizer(training.values())
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)

    def lengths(texts: list[str]) -> list[int]:
        return [len(tokens) for tokens in tokenizer.encode(texts)]

    def rows_of(texts: dict[str, str]) -> list[str]:
        rows = {row for text in texts.values() for row in cut_rows(text, lengths, ROW_TOKENS)}
        return sorted(rows, key=digest)  # a fixed shuffle, whose beginning is a fair sample

    train = rows_of(training)
    known = set(train).union(*map(passages, train))
    evaluation = [row for row in rows_of(held_out) if known.isdisjoint(passages(row) | {row})][:EVAL_ROWS]
    small = train[:SMALL_ROWS]
    for name, rows in (("train", train), ("train_small", small), ("eval", evaluation)):
        write_rows(folder / f"{name}.arrayrecord", rows)
    manifest = {
        "identity": identity,
        "python": sys.version.split()[0],
        "vocab_size": tokenizer.vocab_size(),
        "bytes_per_token": round(len("".join(small).encode()) / sum(map(len, tokenizer.encode(small))), 2),
        "train": {"files": len(training), "rows": len(train)},
        "train_small": {"rows": len(small)},
        "eval": {"files": len(held_out), "rows": len(evaluation)},
    }
    manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default="runs/demo/corpus", help="default: %(default)s")
    print(json.dumps(build(parser.parse_args().folder), indent=2))


if __name__ == "__main__":
    with errors_as_lines(hint="; the same command begins again"):
        main()
