"""Tiny models of Hugging Face's, and what transformers computes with them, so that no test needs torch.

    python3.11 -m venv goldens
    goldens/bin/pip install torch==2.13.0 transformers==5.23.0 ml_dtypes
    goldens/bin/python tests/golden/make.py [NAME]          writes tests/golden/*.json and *.npz, or those of one
    goldens/bin/python tests/golden/make.py NAME FOLDER     compares an exported FOLDER with NAME's, in torch

NAME.json is a config.json and the names and shapes of the tensors as transformers saves them, NAME.npz is tokens and
their logits in float32. The weights follow from their names (`weight`): in bfloat16, as models are published.
"""

import json
import math
import pathlib
import sys
import zlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
# Few sizes are equal, few are powers of two: a forgotten scale or transposition shows.
SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA32 = LLAMA31 | {"factor": 32.0}
# Each constant another, and each band of frequencies within a short row.
BANDS = LLAMA31 | {"factor": 5.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0,
                         "original_max_position_embeddings": 96}  # fmt: skip
# A window shorter than the rows. The width is a square: sqrt(width) times a bfloat16 is one again, and MaxText's tied
# head rounds its table to bfloat16. gemma3_odd is for what that does to other widths.
GEMMA = {"sliding_window": 8, "hidden_size": 64}
GEMMA3 = {  # six layers make a cycle, two remain
    "num_hidden_layers": 8,
    "query_pre_attn_scalar": 24,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# One dense layer before experts. No number of YaRN's is that of MaxText's presets.
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 24.0, "beta_fast": 8.0, "beta_slow": 2.0,
                        "mscale": 0.9, "mscale_all_dim": 0.9, "original_max_position_embeddings": 64},
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rms_norm_eps": 1e-5, "rope_theta": 500000.0}),
    "llama3.1": (
        "llama",
        {
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA31,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
    ),
    "llama3.2": (
        "llama",
        {
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA32,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
        },
    ),
    "llama3.2_bands": ("llama", {"rms_norm_eps": 1e-5, "rope_parameters": BANDS}),
    "mistral": ("mistral", {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None}),
    "mixtral": ("mixtral", {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "num_local_experts": 4, "head_dim": 12}),
    "qwen2": ("qwen2", {"rope_theta": 1000000.0}),
    "qwen3": ("qwen3", {"rope_theta": 1000000.0, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "rope_theta": 1000000.0,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "deepseek2": ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None, "routed_scaling_factor": 1.5}),
    "deepseek3": (  # two of four groups of experts; plain positions, as Moonlight's
        "deepseek_v3",
        DEEPSEEK
        | {"q_lora_rank": 28, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    ),
    "gemma2": (  # caps as low as the logits; queries divided by another number than head_dim, as the 27b's
        "gemma2",
        GEMMA
        | {
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("gemma3_text", GEMMA | GEMMA3),
    "gemma3_odd": ("gemma3_text", GEMMA | GEMMA3 | {"hidden_size": 48, "num_hidden_layers": 6}),
}
ROWS = {"llama3.1": (1, 160), "llama3.2": (1, 160)}  # their scaling shows late in a row


def rows(name: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, SMALL["vocab_size"], ROWS.get(name, (2, 24)))


def weight(name: str, shape: tuple[int, ...], gemma: bool) -> np.ndarray:
    """The tensor `name`: random, of a size that keeps activations near one, rounded to bfloat16."""
    value = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        return (0.3 * value).astype(np.float32)  # in float32, as models are published
    if name.endswith("norm.weight"):
        value = 0.2 * value + (not gemma)  # Gemma adds the one itself
    elif name.endswith("bias"):
        value = 0.3 * value
    elif "embed" in name:
        value = (0.3 if gemma else 1.0) * value
    else:
        value = value / math.sqrt(shape[-1])
    return value.astype(ml_dtypes.bfloat16)


def read(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json and the tensors' shapes of a model."""
    stored = json.loads((HERE / f"{name}.json").read_text())
    return stored["config"], {tensor: tuple(shape) for tensor, shape in stored["tensors"].items()}


def write(name: str, folder: pathlib.Path, files: int = 1) -> dict[str, np.ndarray]:
    """Writes the model as a Hugging Face folder of so many files, with an index if more than one -> its tensors."""
    config, shapes = read(name)
    tensors = {tensor: weight(tensor, shape, "gemma" in name) for tensor, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    where = {tensor: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, tensor in enumerate(sorted(tensors))}
    for file in set(where.values()):
        held = {tensor: value for tensor, value in tensors.items() if where[tensor] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


# With torch -----------------------------------------------------------------------------------------------------------


def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def make(name: str) -> None:
    import tempfile

    import torch
    import transformers
    from safetensors import safe_open

    model_type, keys = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | keys))
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        with safe_open(folder / "model.safetensors", framework="np") as file:
            shapes = {tensor: file.get_slice(tensor).get_shape() for tensor in sorted(file.keys())}
        stored = {"config": json.loads((folder / "config.json").read_text()), "tensors": shapes}
        (HERE / f"{name}.json").write_text(json.dumps(stored) + "\n")
        write(name, folder)
        np.savez_compressed(HERE / f"{name}.npz", tokens=rows(name), logits=logits(folder, rows(name)))
    print(name, "of", sum(map(math.prod, shapes.values())), "parameters")


def cross_entropy(values: np.ndarray, tokens: np.ndarray) -> float:
    """Of each next token, in nats."""
    values = values[:, :-1].astype(np.float64)
    chosen = np.take_along_axis(values, tokens[:, 1:, None], -1)[..., 0]
    return float(np.mean(np.log(np.sum(np.exp(values), -1)) - chosen))


def compare(name: str, folder: pathlib.Path) -> None:
    golden = np.load(HERE / f"{name}.npz")
    found = logits(folder, golden["tokens"])
    worst = float(np.max(np.abs(found - golden["logits"])))
    losses = [cross_entropy(values, golden["tokens"]) for values in (golden["logits"], found)]
    print(f"{name}: logits differ by {worst:.1e} at most; cross-entropy {losses[0]:.6f}, exported {losses[1]:.6f}")
    if worst > 1e-4:
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        compare(sys.argv[1], pathlib.Path(sys.argv[2]))
    else:
        for each in sys.argv[1:] or MODELS:
            make(each)
