"""The settings that say where the data lies."""

from typing import Any

# The keys that say where the data lies, by dataset_type.
DATA_KEYS: dict[str, tuple[str, ...]] = {
    "grain": ("grain_file_type", "grain_train_files", "grain_eval_files", "grain_train_mixture_config_path"),
    "hf": ("hf_path", "hf_name", "hf_data_dir", "hf_train_files", "hf_eval_files"),
    "olmo_grain": ("olmo_index_path",),
    "tfds": ("dataset_path", "dataset_name", "eval_dataset_name"),
    "c4_mlperf": ("dataset_path", "dataset_name", "eval_dataset_name"),
}


def data_settings(config: Any) -> str:
    """What says where the data lies, as key=value ...: for errors about it."""
    kind = getattr(config.dataset_type, "value", config.dataset_type)
    values = {"dataset_type": kind} | {key: getattr(config, key) for key in DATA_KEYS.get(kind, ())}
    return " ".join(f"{key}={value!r}" for key, value in values.items() if value)


def cached_data(folder: str) -> dict[str, Any]:
    """The settings of a run whose data is a cache of its teacher's targets: rows, which no text is made into."""
    return {
        "dataset_type": "grain",
        "grain_file_type": "arrayrecord",
        "grain_train_files": f"{folder}/train/*.arrayrecord",
        "grain_eval_files": f"{folder}/eval/*.arrayrecord",
        "grain_train_mixture_config_path": "",
        "tokenize_train_data": False,
        "tokenize_eval_data": False,
        "use_sft": False,
    }
