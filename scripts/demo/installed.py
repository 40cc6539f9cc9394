"""Builds the corpus of `make demo-smollm2` from text that the project's environment carries, in English and in code.

    python scripts/demo/installed.py TOKENIZER [folder]        TOKENIZER: a Hugging Face folder; a minute on one core

writes train.arrayrecord, train_long.arrayrecord (which has the same rows, and more), eval.arrayrecord (a `text` column,
a row of at most ROW_TOKENS tokens a record) and corpus.json. A third of the rows each are what installed packages say
of themselves on PyPI, documentation (their docstrings, and Python's reference), and code. The same environment gives
the same bytes.

A package belongs to training or to evaluation as a whole, by the hash of its name. Evaluation then drops a row that
shares a line with training (licences, vendored files, common imports); lines shorter than LINE_CHARACTERS, such as
`return None`, are idioms. Left out on purpose: tests, generated files, badges, tables, markup.
"""

import argparse
import ast
import importlib.metadata
import inspect
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from pydoc_data import topics
from typing import Any

from corpus import STANDARD_LIBRARY, cut_rows, digest, read_sources
from tokenizers import Tokenizer

from MaxText.console import errors_as_lines
from MaxText.text.shards import write_rows

ROW_TOKENS = 256
EVAL_SHARE = 10  # one package in so many
EVAL_ROWS = 48  # a third of each kind
LINE_CHARACTERS = 24
QUOTA = 32  # rows of one kind from one package: or a few large ones would be most of the text
LARGEST_FILE = 1 << 16
KINDS = ("description", "documentation", "code")

SKIPPED = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|third_party|node_modules|examples)/|_pb2(_grpc)?\.py$|/test_")
GENERATED = re.compile(r"generated|do not edit", re.IGNORECASE)
NOISE = re.compile(r"!\[|badge|shields\.io|</?[a-zA-Z!]|^\s*(\||\+[-=]|\.\. (image|\|)|:(target|alt|width)|\[.*\]: )")

Documents = dict[str, Iterator[str]]  # kind -> a package's documents, read when asked for


def described(text: str) -> str:
    """A package's description without what is there for a browser."""
    lines = [line.rstrip() for line in text.splitlines() if not NOISE.search(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def docstrings(source: str) -> str:
    """The docstrings of a file that explain something, one after the other."""
    with warnings.catch_warnings(action="ignore"):  # of escapes that will be errors one day
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if len(text) > 200)


def code(source: str) -> str:
    """A file without the comment at its head, which is a licence."""
    lines = source.splitlines(keepends=True)
    return "".join(itertools.dropwhile(lambda line: line.startswith("#") or not line.strip(), lines))


def sources_of(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    """The Python files of a package that are worth reading, in a fixed order that favours none."""
    names = [file for file in distribution.files or () if file.suffix == ".py" and not SKIPPED.search(str(file))]
    for name in sorted(names, key=lambda file: digest(file.as_posix())):
        path = Path(str(distribution.locate_file(name)))
        if path.is_file() and 500 < path.stat().st_size < LARGEST_FILE:
            text = path.read_text(encoding="utf-8", errors="replace")
            if "\ufffd" not in text and not GENERATED.search(text[:1000]):
                yield text


def packages() -> Iterator[tuple[str, Documents]]:
    """Name and documents of everything that is installed, the standard library by its modules."""
    installed = {each.name.lower(): each for each in importlib.metadata.distributions() if each.files}
    for name, distribution in sorted(installed.items()):
        if not is_ours(distribution):
            description = distribution.metadata.get("Description", "")
            yield name, of_sources(sources_of(distribution), description)
    library = read_sources(STANDARD_LIBRARY)
    for name, files in itertools.groupby(library, key=lambda path: PurePath(path).parts[0]):
        yield f"python/{name}", of_sources(library[file] for file in files)
    for name, text in sorted(topics.topics.items()):
        yield f"python/topics/{name}", {"documentation": iter([text])}


def is_ours(distribution: importlib.metadata.Distribution) -> bool:
    """Whether it is this project, or what pip serves itself with."""
    return any("__editable__" in str(file) for file in distribution.files or ()) or distribution.name == "pip"


def of_sources(sources: Iterable[str], description: str = "") -> Documents:
    read, again = itertools.tee(sources)
    found = {"documentation": map(docstrings, read), "code": map(code, again)}
    return found | {"description": iter([described(description)])}


def rows_of(documents: Iterator[str], lengths: Callable[[list[str]], list[int]]) -> list[str]:
    """The first rows of a package's documents of one kind, those that are at least half full."""
    rows = itertools.chain.from_iterable(cut_rows(text, lengths, ROW_TOKENS) for text in documents)
    whole = (row for row in rows if is_text(row) and ROW_TOKENS // 2 <= lengths([row])[0] <= ROW_TOKENS)
    return list(itertools.islice(whole, QUOTA))


def is_text(row: str) -> bool:
    """Whether it reads rather than lists numbers and identifiers."""
    return sum(character.isalpha() or character.isspace() for character in row) >= 0.7 * len(row)


def lines(row: str) -> set[str]:
    """The lines of a row, indentation aside, that are no idioms."""
    return {stripped for line in row.splitlines() if len(stripped := line.strip()) >= LINE_CHARACTERS}


def in_turn(by_kind: dict[str, list[str]], count: int) -> list[str]:
    """So many rows, of each kind as many; where one has fewer, of the others more."""
    in_order = (sorted(by_kind[kind], key=digest) for kind in KINDS)
    mixed = itertools.chain.from_iterable(itertools.zip_longest(*in_order))
    return list(itertools.islice((row for row in mixed if row is not None), count))


def build(folder: Path, tokenizer: Path, rows: int, long_rows: int) -> dict[str, Any]:
    """Writes the corpus into `folder`, so many rows to train on, unless it is there already -> corpus.json."""
    installed = sorted(f"{each.name} {each.version}" for each in importlib.metadata.distributions())
    code = Path(__file__).read_text() + inspect.getsource(cut_rows) + inspect.getsource(write_rows)
    words = (tokenizer / "tokenizer.json").read_text()
    identity = digest(json.dumps([installed, code, words, rows, long_rows]))
    manifest_path = folder / "corpus.json"
    if manifest_path.exists() and json.loads(manifest_path.read_text())["identity"] == identity:
        return json.loads(manifest_path.read_text())
    manifest_path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    model = Tokenizer.from_str(words)

    def lengths(texts: list[str]) -> list[int]:
        return [len(found.ids) for found in model.encode_batch(texts, add_special_tokens=False)]

    split: dict[bool, dict[str, list[str]]] = {side: {kind: [] for kind in KINDS} for side in (False, True)}
    for name, documents in packages():
        held_out = int(digest(name), 16) % EVAL_SHARE == 0
        for kind, texts in documents.items():
            split[held_out][kind] += rows_of(texts, lengths)
    known = set().union(*(lines(row) for texts in split[False].values() for row in texts))
    unseen = {kind: [row for row in set(texts) if known.isdisjoint(lines(row))] for kind, texts in split[True].items()}
    found = {kind: list(dict.fromkeys(texts)) for kind, texts in split[False].items()}
    wanted = {"train": (found, rows), "train_long": (found, long_rows), "eval": (unseen, EVAL_ROWS)}
    manifest: dict[str, Any] = {"identity": identity}
    for side, (by_kind, count) in wanted.items():
        taken = in_turn(by_kind, count)
        write_rows(folder / f"{side}.arrayrecord", sorted(taken, key=digest))
        size = {"tokens": sum(lengths(taken)), "bytes": sum(len(row.encode()) for row in taken)}
        there = {kind: len(texts) for kind, texts in by_kind.items()}
        manifest[side] = {"rows": len(taken), **size, "of": there}
    manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="a Hugging Face folder with tokenizer.json in it")
    parser.add_argument("folder", nargs="?", type=Path, default="runs/smollm2/corpus", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=800, help="to train on (default: %(default)s)")
    parser.add_argument("--long-rows", type=int, default=4000, help="of train_long (default: %(default)s)")
    given = parser.parse_args()
    print(json.dumps(build(given.folder, given.tokenizer, given.rows, given.long_rows), indent=2))


if __name__ == "__main__":
    with errors_as_lines(hint="; the same command begins again"):
        main()
