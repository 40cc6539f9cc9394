"""Text into shuffled shards, in two passes.

The first pass appends every document to the bucket of its place, the second sorts bucket after bucket: memory holds a
buffer, one bucket and one document. An interrupted preparation goes on after the last input that was read to its end,
or at the first unfinished shard. A shard gets its name when it is whole.
"""

import fcntl
import itertools
import os
import shutil
from typing import Any

from rich.console import Console
from rich.progress import Progress

from MaxText.text import documents, shards
from MaxText.text.buckets import Buckets, bucket_name, sorted_bucket
from MaxText.text.documents import Bad, InputError
from MaxText.text.plan import PLACES, Plan
from MaxText.text.record import State, begin, digest, finished, nothing_in, save, stamp

REPORT_EVERY = 1000  # documents between two looks at the progress bar


def distribute(plan: Plan, state: State, progress: Progress) -> None:
    """Appends the documents of every input that is not done to their buckets."""
    buckets = Buckets(plan.work, state["buckets"])
    counts_of = {split: count * state["buckets_per_shard"] for split, count in plan.shard_counts.items()}
    plan.bad_lines.touch()
    os.truncate(plan.bad_lines, state["bad_bytes"])
    done = {os.path.realpath(entry["path"]) for entry in state["inputs"]}
    task = progress.add_task("reading", total=sum(path.stat().st_size for path in plan.inputs))
    before = 0  # bytes of the inputs before this one
    for path in plan.inputs:
        if os.path.realpath(path) not in done:
            as_begun = stamp(path)
            entry: dict[str, Any] = {"path": str(path), **as_begun, "documents": 0, "blank": 0, "bad": 0}
            with path.open("rb") as file, plan.bad_lines.open("a") as bad_lines, documents.refusals(path, entry):
                for line, text in documents.read(path, file, plan.text_key, plan.sample_by):
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
            entry["sha256"] = digest(path)
            if stamp(path) != as_begun:
                raise InputError(f"{path}: has changed while it was read; the same command reads it again")
            buckets.flush()
            state["inputs"].append(entry)
            state |= {"buckets": buckets.sizes, "bad_bytes": plan.bad_lines.stat().st_size}
            save(plan.work / "state.json", state)
        before += path.stat().st_size
        progress.update(task, completed=before)


def write_shards(plan: Plan, state: State, progress: Progress) -> None:
    """Writes what is missing of the shards, each under its name only when it is whole."""
    per_shard = state["buckets_per_shard"]
    done = {entry["name"] for entry in state["shards"]}
    task = progress.add_task("writing shards", total=sum(plan.shard_counts.values()))
    for split in plan.shard_counts:
        for index, name in enumerate(plan.shard_names(split)):
            if name not in done:
                files = [plan.work / bucket_name(split, index * per_shard + part) for part in range(per_shard)]
                texts = itertools.chain.from_iterable(map(sorted_bucket, files))  # a bucket at a time
                written = shards.write_shard(plan.out / name, plan.work / name, texts)
                state["shards"].append({"name": name, "split": split} | written)
                save(plan.work / "state.json", state)
                for file in files:
                    file.unlink(missing_ok=True)
            progress.update(task, advance=1)


def check_there_are_documents(state: State) -> None:
    if not any(entry["documents"] for entry in state["inputs"]):
        raise InputError("; ".join(map(nothing_in, state["inputs"])))


def check_shards_are_filled(plan: Plan, state: State) -> None:
    """A shard without a document cannot be read."""
    found = sum(entry["documents"] for entry in state["inputs"])
    per_shard = state["buckets_per_shard"]
    for split, count in plan.shard_counts.items():
        filled = {int(name.split("-")[1].removesuffix(".bucket")) // per_shard
                  for name in state["buckets"] if name.startswith(split)}  # fmt: skip
        if count and not filled and split == "eval":
            raise InputError(
                f"--eval-fraction {plan.eval_fraction}: none of {found} documents is held out; raise it, or "
                "give 0 for none"
            )
        if len(filled) < count:
            raise InputError(
                f"--shards {plan.shards}: {found} documents leave {count - len(filled)} of {count} {split} shards "
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
            check_there_are_documents(state)
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
