"""The files that a run's data lies in: by their names and sizes a resumed run can tell whether they are others."""

import glob
import json
import os
from typing import Any

from MaxText import upstream

# Names, below the deepest folder that holds them all, -> bytes; None where only the bucket could tell. Of a cache,
# which may be made anew with files as large, it is the SHA-256.
Files = dict[str, int | str | None]


def listed(config: Any) -> dict[str, Files]:
    """The split, "train" or "eval" -> its files; none where the data lies in none that can be listed: the hub."""
    return {split: sized(paths(config, split)) for split in ("train", "eval")}


def paths(config: Any, split: str) -> list[str]:
    """The paths of a split's files, in the order of their names."""
    if split == "eval" and config.eval_interval <= 0:
        return []
    found = {path for pattern in patterns(config, split) for path in matches(pattern)}
    return sorted(found)


def patterns(config: Any, split: str) -> list[str]:
    training = split == "train"
    match config.dataset_type:
        case "grain":
            if training and config.grain_train_mixture_config_path:
                with open(config.grain_train_mixture_config_path, encoding="utf-8") as file:
                    return [part["path"] for part in json.load(file).values()]
            given = config.grain_train_files if training else config.grain_eval_files
            if not given and config.grain_file_type == "tfrecord":
                return tfds_patterns(config, split)
            return [part.split(",")[0] for part in given.split(";")] if ";" in given else [given]
        case "hf":
            given = (config.hf_train_files if training else config.hf_eval_files) or ""
            if not given and os.path.isdir(config.hf_path):
                return [os.path.join(config.hf_path, "**")]
            return [os.path.join(config.hf_data_dir or "", given)]
        case "tfds" | "c4_mlperf":
            return tfds_patterns(config, split)
        case "olmo_grain":
            return [config.olmo_index_path]
    return []


def tfds_patterns(config: Any, split: str) -> list[str]:
    name = config.dataset_name if split == "train" else config.eval_dataset_name
    part = config.train_split if split == "train" else config.eval_split
    return [os.path.join(config.dataset_path or "", name.replace(":", "/"), f"*-{part}.*")]


def matches(pattern: str) -> list[str]:
    if pattern.startswith("gs://"):
        return upstream.gcs_utils.gcs_glob_pattern(pattern)
    found = glob.glob(os.path.abspath(os.path.expanduser(pattern)), recursive=True)
    return [path for path in found if os.path.isfile(path)]


def sized(files: list[str]) -> Files:
    folder = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    return {os.path.relpath(file, folder): None if "://" in file else os.path.getsize(file) for file in files}


def differences(before: dict[str, Files], now: dict[str, Files]) -> list[str]:
    """What changed of the files, a line for each split; that an evaluation was begun or left off is none."""
    lines = []
    for split, title in (("train", "training"), ("eval", "evaluation")):
        old, new = before.get(split, {}), now.get(split, {})
        names = sorted(old.keys() | new.keys())
        others = [name for name in names if described(old, name) != described(new, name)]
        if others and (split == "train" or (old and new)):
            first = f"{others[0]}: {described(old, others[0])} before, {described(new, others[0])} now"
            lines.append(f"{title} files: {len(others)} of {len(names)} differ, the first is {first}")
    return lines


def described(files: Files, name: str) -> str:
    if name not in files:
        return "not there"
    found = files[name]
    return f"SHA-256 {found[:16]}" if isinstance(found, str) else f"{found} bytes"
