"""MaxText's model of a preset: its configuration for this machine, and the names and shapes of its arrays."""

from __future__ import annotations

from typing import Any

from MaxText import upstream
from MaxText.checkpoints.stacked_arrays import Shape
from MaxText.config import resolve

# Settings that say nothing of a model: for this machine, without data.
NEUTRAL = {
    "run_name": "conversion", "base_output_directory": "", "metrics_file": "", "dataset_type": "synthetic",
    "hardware": "cpu", "skip_jax_distributed_system": True, "enable_checkpointing": False, "attention": "dot_product",
    "override_model_config": True, "sparse_matmul": False, "megablox": False, "jax_cache_dir": "", "log_config": False,
    "quantization": "", "mtp_num_layers": 0, "eval_interval": -1,
}  # fmt: skip


def maxtext_config(name: str, changed: dict[str, Any], scan_layers: bool) -> Any:
    """MaxText's configuration of the preset `name` with `changed` keys, to take shapes from."""
    keys = NEUTRAL | {"model_name": name, "scan_layers": scan_layers} | changed
    return resolve.initialize(["convert_teacher.py", *(f"{key}={value}" for key, value in keys.items())]).student


def model_info(config: Any) -> tuple[dict[str, tuple[int, Shape]], Any]:
    """Name of each of the model's parameters -> its place in the flattened tree and its shape; and that tree."""
    with upstream.silence():
        upstream.to_maxtext.LazyTensor  # noqa: B018  the first touch imports, and lets absl tell everything
        upstream.set_verbose(False)
        return upstream.to_maxtext.get_maxtext_model_info(config)
