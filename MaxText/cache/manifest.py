"""manifest.json of a cache: what it holds, of which teacher and data, and in which files.

It is written when caching begins, so that another cache cannot go on in the same folder, and a split stands in it when
its last row is written. Left out on purpose: what a student needs of a cache, which config/ compares with its keys.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pydantic

from MaxText.cache.codec import VERSION
from MaxText.cache.row import Mode
from MaxText.config.keys import ConfigError, describe
from MaxText.console import RunError

NAME = "manifest.json"
# What the user calls a field of `Contents`.
KEYS = {
    "mode": "kd_cache_mode",
    "draws": "kd_cache_draws",
    "top_k": "kd_top_k",
    "temperature": "kd_temperature",
    "row_length": "max_target_length",
}


class Part(pydantic.BaseModel, frozen=True, extra="forbid"):
    pass


class Teacher(Part):
    path: str
    step: int | None  # None: the checkpoint does not tell
    fingerprint: str  # of its parameters, wherever they lie


class Contents(Part):
    """What decides the cache's rows. Two caches with the same are the same."""

    teacher: Teacher
    tokenizer: str  # hash
    vocab_size: int
    kd_vocab_size: int  # tokens that teacher and student share; 0: all of them
    temperature: float
    mode: Mode
    draws: int  # mode sample; else 0
    top_k: int  # mode top_k; else 0
    log_prob_bound: float | None  # mode top_k: of the error of a log-probability
    row_length: int
    seed: int  # of the draws
    data: dict[str, Any]  # the settings and files that the rows are made of, as JSON has them
    computed_with: dict[str, Any] = {}  # the teacher's preset and overrides, which its parameters do not tell

    @property
    def slots(self) -> int:
        """Ids that a position has at most."""
        return self.draws or self.top_k


class Shard(Part):
    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


class Split(Part):
    rows: int
    tokens: int  # that count
    bytes: int
    bytes_per_token: float
    shards: list[Shard]

    @classmethod
    def of(cls, shards: list[Shard]) -> "Split":
        rows, tokens, size = (sum(getattr(shard, name) for shard in shards) for name in ("rows", "tokens", "bytes"))
        return cls(rows=rows, tokens=tokens, bytes=size, bytes_per_token=round(size / max(tokens, 1), 2), shards=shards)


class Manifest(Part):
    version: int = VERSION
    contents: Contents
    splits: dict[str, Split] = {}


# Writing ------------------------------------------------------------------------------------------------------------


def begin(folder: Path, contents: Contents) -> Manifest:
    """The manifest of a cache that is begun or goes on in `folder`: by one process, before the others write there.

    Raises:
      ConfigError: the folder holds another cache, or files without a manifest, or cannot be written.
    """
    if (folder / NAME).exists():
        manifest = read(folder)
        if difference := first_difference(manifest.contents, contents):
            raise ConfigError(
                f"kd_cache_path={folder}: holds another cache ({difference}). Take another folder, or set back what "
                "changed."
            )
        return manifest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in folder.iterdir() if path.name != NAME + ".tmp")
    except OSError as error:
        raise ConfigError(f"kd_cache_path={folder}: cannot be written ({error.strerror or error})") from error
    if foreign:
        raise ConfigError(f"kd_cache_path={folder}: holds {foreign[0]} and is no cache; take an empty folder")
    manifest = Manifest(contents=contents)
    write(folder, manifest)
    return manifest


def finish(folder: Path, split: str, shards: list[Shard]) -> Manifest:
    """Says that a split is whole: by one process, when all have written their last row."""
    before = read(folder)
    manifest = before.model_copy(update={"splits": before.splits | {split: Split.of(shards)}})
    write(folder, manifest)
    return manifest


def reopen(folder: Path, split: str) -> None:
    """Says that a split is no longer whole: by one process, before files that the manifest names are given up."""
    before = read(folder)
    if split in before.splits:
        others = {name: of for name, of in before.splits.items() if name != split}
        write(folder, before.model_copy(update={"splits": others}))


def write(folder: Path, manifest: Manifest) -> None:
    try:
        write_whole(folder / NAME, manifest.model_dump(mode="json"))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from error


def write_whole(file: Path, content: Any) -> None:
    """Writes all of a file or nothing."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w") as opened:
        opened.write(json.dumps(content, indent=2) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)


def first_difference(before: Contents, now: Contents) -> str | None:
    """The first setting that differs, with both values. A teacher that only lies elsewhere is the same."""
    if before.teacher.fingerprint != now.teacher.fingerprint:
        return f"teacher: {described(before.teacher)} there, {described(now.teacher)} now"
    old, new = (flat(contents.model_dump(mode="json", exclude={"teacher"})) for contents in (before, now))
    for name in [*new, *(old.keys() - new.keys())]:
        if old.get(name) != new.get(name):
            return f"{KEYS.get(name, name)}: {old.get(name)!r} there, {new.get(name)!r} now"
    return None


def described(teacher: Teacher) -> str:
    return f"{teacher.path} at step {teacher.step} (fingerprint {teacher.fingerprint})"


def flat(contents: dict[str, Any]) -> dict[str, Any]:
    grouped = contents["data"] | contents["computed_with"]
    return {name: value for name, value in contents.items() if name not in ("data", "computed_with")} | grouped


# Reading ------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Manifest:
    """The manifest, whatever became of the files that it names.

    Raises:
      ConfigError: there is none that can be read.
    """
    file = folder / NAME
    try:
        found = json.loads(file.read_text())
        version = found["version"]
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: is missing; {folder} is no cache, which cache_teacher.py would make") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file}: is no manifest of a cache ({error or type(error).__name__})") from error
    if version != VERSION:
        raise ConfigError(f"{file}: its format is version {version}, this program reads version {VERSION}; cache anew")
    try:
        return Manifest.model_validate(found)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{file}: is no manifest of a cache:\n{describe(error)}") from error


def check(folder: Path, split: str) -> Manifest:
    """The manifest, of which a split is complete and its files there, as large as they were written.

    Raises:
      ConfigError: it is not so.
    """
    manifest = read(folder)
    if split not in manifest.splits:
        begun = f"; cache_teacher.py with the settings of {folder / NAME} goes on" if (folder / split).is_dir() else ""
        raise ConfigError(f"{folder / split}: holds no complete rows{begun}")
    for shard in manifest.splits[split].shards:
        file = folder / split / shard.name
        if not file.is_file():
            raise ConfigError(f"{file}: is missing, {folder / NAME} names it")
        if file.stat().st_size != shard.bytes:
            raise ConfigError(f"{file}: has {file.stat().st_size:,} bytes, {folder / NAME} says {shard.bytes:,}")
    return manifest


def verify_checksums(folder: Path, host: int = 0, hosts: int = 1) -> Manifest:
    """Reads every byte of the cache; of several hosts each reads its own files.

    Raises:
      ConfigError: as `check`.
      RunError: a file is not as it was written.
    """
    manifest = read(folder)
    for split in manifest.splits:
        for shard in check(folder, split).splits[split].shards[host::hosts]:
            file = folder / split / shard.name
            if sha256(file) != shard.sha256:
                raise RunError(f"{file}: is damaged, its SHA-256 is not that of {folder / NAME}")
    return manifest


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
