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
import sys
from pathlib import Path

from rich.console import Console

from MaxText import console
from MaxText.text.documents import SUFFIXES, InputError
from MaxText.text.plan import Plan
from MaxText.text.preparation import prepare
from MaxText.text.record import nothing_in


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
            parser.error(f"{path}: is a folder; name the files in it" if path.is_dir() else f"{path}: no such file")
        if not path.name.endswith(SUFFIXES):
            parser.error(f"{path}: unknown kind of file; allowed are {', '.join(SUFFIXES)}")
    files: dict[tuple[int, int], Path] = {}
    for path in given.inputs:
        status = path.stat()
        first = files.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            parser.error(f"{path}: is named twice" if first == path else f"{first} and {path}: are one file")
    names = ("out", "text_key", "sample_by", "shards", "eval_fraction", "seed")
    return Plan(inputs=tuple(sorted(given.inputs)), **{name: getattr(given, name) for name in names}), given.max_bad


def main(arguments: list[str]) -> None:
    output = Console(highlight=False, markup=False, soft_wrap=True)
    plan, max_bad = parse_arguments(arguments)
    with console.errors_as_lines(failed=InputError, hint="; the same command goes on"):
        manifest = prepare(plan, max_bad, output)
    for entry in manifest["inputs"]:
        if not entry["documents"]:
            output.print(f"note: {nothing_in(entry)}")
    for split in ("train", "eval"):
        if split in manifest:
            entry = manifest[split]
            output.print(
                f"{split:>5}  {entry['documents']:,} documents, {entry['text_bytes']:,} bytes  {entry['files']}"
            )
    bad, blank = (sum(entry[name] for entry in manifest["inputs"]) for name in ("bad", "blank"))
    output.print(f"left out: {bad:,} bad lines ({plan.bad_lines}), {blank:,} blank")


if __name__ == "__main__":
    main(sys.argv[1:])
