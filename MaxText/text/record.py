"""What a preparation has done: .work/state.json while it goes on, manifest.json when it has ended."""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from MaxText.text.documents import InputError
from MaxText.text.plan import Plan

BUCKET_BYTES = 64 << 20  # of text that the second pass sorts in memory at a time
EXPANSION = 8  # how much larger than its file the text of a compressed input may be: it only sets the buckets' number

State = dict[str, Any]


def stamp(path: Path) -> dict[str, int]:
    """Changes with the file."""
    status = path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


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
    found = {file.name for file in plan.out.glob("*.arrayrecord")}
    path = plan.work / "state.json"
    state: State = json.loads(path.read_text()) if path.exists() else {}
    if foreign := found - own_shards(plan, state):
        raise InputError(f"--out {plan.out}: holds shards of another origin ({min(foreign)}); take an empty folder")
    if state:
        lost = next((entry["name"] for entry in state["shards"] if not is_whole(plan, entry)), "")
        why = difference(plan, state) or (f"{plan.out / lost} is missing or not as it was written" if lost else "")
        if not why:
            console.print(f"going on: {len(state['inputs'])} inputs read, {len(state['shards'])} shards written")
            return state
        console.print(f"starting afresh: {why}")
        for name in found:
            (plan.out / name).unlink()
    sizes = ((path.stat().st_size, path.suffix in (".gz", ".parquet")) for path in plan.inputs)
    expected = sum(size * (EXPANSION if compressed else 1) for size, compressed in sizes)
    per_shard = max(1, math.ceil(expected / plan.shards / BUCKET_BYTES))
    state = {"settings": plan.settings, "buckets_per_shard": per_shard, "inputs": [], "buckets": {}, "bad_bytes": 0}
    save(path, state | {"shards": []})
    return state | {"shards": []}


def own_shards(plan: Plan, state: State) -> set[str]:
    """The names of all shards that the preparation which left this state may have written."""
    if not state:
        return set()
    then = dataclasses.replace(plan, **{name: state["settings"][name] for name in ("shards", "eval_fraction")})
    return {name for split in then.shard_counts for name in then.shard_names(split)}


def is_whole(plan: Plan, shard: dict[str, Any]) -> bool:
    """Whether a shard is there, as large as it was written."""
    file = plan.out / shard["name"]
    return file.exists() and file.stat().st_size == shard["bytes"]


def difference(plan: Plan, record: dict[str, Any]) -> str:
    """What is not now as a state or a manifest has it, in words; "" for nothing. A file is not its spelling."""
    then = record["settings"]
    for name, value in plan.settings.items():
        if name != "inputs" and then.get(name) != value:
            return f"--{name.replace('_', '-')} was {then.get(name)}"
    before = {os.path.realpath(path): path for path in then["inputs"]}
    now = {os.path.realpath(path): path for path in plan.inputs}
    if new := now.keys() - before.keys():
        return f"{now[min(new)]} was not among the inputs"
    if gone := before.keys() - now.keys():
        return f"{before[min(gone)]} was among the inputs"
    return next((f"{entry['path']} has changed" for entry in record["inputs"] if has_changed(entry)), "")


def has_changed(entry: dict[str, Any]) -> bool:
    """Whether an input is not the one that was read: a copy of it, of another time, is."""
    path = Path(entry["path"])
    if not path.exists() or path.stat().st_size != entry["bytes"]:
        return True
    return stamp(path)["modified_ns"] != entry["modified_ns"] and digest(path) != entry["sha256"]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nothing_in(entry: dict[str, Any]) -> str:
    """Why an input gave no document."""
    lines = " and ".join(f"{entry[kind]:,} {kind}" for kind in ("blank", "bad") if entry[kind])
    return f"{entry['path']}: holds no document, {f'only {lines} lines' if lines else 'there is no text in it'}"


def finished(plan: Plan) -> dict[str, Any] | None:
    """The manifest of a preparation that ended; None without one.

    Raises:
      InputError: it is of other inputs or options, or its shards are not all there.
    """
    if not plan.manifest.exists():
        return None
    manifest = json.loads(plan.manifest.read_text())
    if why := difference(plan, manifest):
        raise InputError(f"--out {plan.out}: holds what other inputs or options gave ({why}); take another")
    for entry in manifest["shards"]:
        if not is_whole(plan, entry):
            raise InputError(
                f"{plan.out / entry['name']}: is missing or not as {plan.manifest} has it; remove {plan.out} and begin "
                "again"
            )
    return manifest
