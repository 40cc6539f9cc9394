"""What a preparation has done: .work/state.json while it goes on, manifest.json when it has ended."""

import json
import math
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
