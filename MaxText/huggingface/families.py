"""Which architectures of Hugging Face's MaxText has too, and how their settings are called in each.

Left out on purpose: architectures that no test compares with transformers (tests/huggingface/test_convert.py), and
whatever MaxText's decoder of a family cannot be set to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

from MaxText.config.keys import ConfigError

SIZES = {
    "base_emb_dim": "hidden_size",
    "base_num_query_heads": "num_attention_heads",
    "base_num_kv_heads": "num_key_value_heads",
    "base_mlp_dim": "intermediate_size",
    "base_num_decoder_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "logits_via_embedding": "tie_word_embeddings",
}
EPSILON = {"normalization_layer_epsilon": "rms_norm_eps"}
WINDOWS = {
    "sliding_window_size": "sliding_window",
    "attn_logits_soft_cap": "attn_logit_softcapping",
    "final_logits_soft_cap": "final_logit_softcapping",
}
SILU = {"hidden_act": "silu"}
NO_WINDOW = {"sliding_window": None}
LATENTS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
SHARED_EXPERTS = {
    "base_moe_mlp_dim": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "shared_experts": "n_shared_experts",
    "first_num_dense_layers": "first_k_dense_replace",
    "routed_scaling_factor": "routed_scaling_factor",
}
DEEPSEEK = SIZES | EPSILON | SHARED_EXPERTS | dict(zip(LATENTS, LATENTS, strict=True))
GROUPS = {"n_routing_groups": "n_group", "topk_routing_group": "topk_group"}
NO_OTHER_DEEPSEEK = {"attention_type": "mla", "use_indexer": False, "engram_layers": [], "mhc_expansion_rate": 1}
DEEPSEEK_BUILT_IN = SILU | {"attention_bias": False, "rms_norm_eps": 1e-6}  # norms of latents have no other
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False,
         "use_bidirectional_attention": False, "tie_word_embeddings": True}  # fmt: skip
# Which norms and biases there are; how a router scores: by the softmax over the experts that it has chosen.
GEMMA_NORMS = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
PLAIN_ROUTER = {"routed_score_func": "", "routed_bias": False}
QWEN3_NORMS = {"use_qk_norm": True, "use_mrope": False}


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
      decoder_block: what MaxText calls it.
      table: the preset whose entries in MaxText's tables of names and transformations serve the whole family.
      keys: MaxText's key -> the attribute of a Hugging Face configuration that says the same.
      built_in: attribute -> the one value that MaxText's decoder can have.
      pattern: after how many layers with a sliding window a global one follows; 0 = no layer has a window.
      own: MaxText's keys that make its decoder this one rather than another architecture.
      names: how a preset's name must begin, where MaxText goes by it.
    """

    decoder_block: str
    table: str
    keys: dict[str, str]
    built_in: dict[str, Any]
    pattern: int = 0
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ("",)

    @property
    def is_latent(self) -> bool:
        """Whether keys and values are made of latents, in heads of sizes of their own."""
        return "kv_lora_rank" in self.keys


FAMILIES = {
    "llama": Family("llama2", "llama3.1-8b", SIZES | EPSILON, SILU | {"attention_bias": False, "mlp_bias": False}),
    "mistral": Family("mistral", "llama3.1-8b", SIZES | EPSILON, SILU | NO_WINDOW),
    "mixtral": Family(
        "mixtral",
        "mixtral-8x7b",
        SIZES
        | EPSILON
        | {
            "base_moe_mlp_dim": "intermediate_size",
            "num_experts": "num_local_experts",
            "num_experts_per_tok": "num_experts_per_tok",
        },
        SILU | NO_WINDOW,
        own=PLAIN_ROUTER,
    ),
    "qwen2": Family(
        "qwen2",
        "qwen2.5-7b",
        SIZES | EPSILON,
        SILU | NO_WINDOW,
        own={"attention_bias": True, "use_qk_norm": False, "use_mrope": False},
    ),
    "qwen3": Family(
        "qwen3", "qwen3-8b", SIZES | EPSILON, SILU | NO_WINDOW | {"attention_bias": False}, own=QWEN3_NORMS
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        "qwen3-30b-a3b",
        SIZES
        | EPSILON
        | {
            "base_mlp_dim": "moe_intermediate_size",
            "base_moe_mlp_dim": "moe_intermediate_size",
            "num_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok",
        },
        SILU
        | NO_WINDOW
        | {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        own=QWEN3_NORMS | PLAIN_ROUTER,
    ),
    "deepseek_v2": Family(
        "deepseek",
        "deepseek2-16b",
        DEEPSEEK,
        DEEPSEEK_BUILT_IN | {"topk_method": "greedy", "norm_topk_prob": False, "mlp_bias": False},
        own={"routed_score_func": "softmax", "routed_bias": False} | NO_OTHER_DEEPSEEK,
        names=("deepseek2",),
    ),
    "deepseek_v3": Family(
        "deepseek",
        "deepseek3-671b",
        DEEPSEEK | GROUPS,
        DEEPSEEK_BUILT_IN | {"norm_topk_prob": True, "rope_interleave": True},
        own={"routed_score_func": "sigmoid", "routed_bias": True} | NO_OTHER_DEEPSEEK,
        names=("deepseek3", "kimi-k2"),  # by which MaxText chooses experts, and keeps biases apart
    ),
    "gemma2": Family(
        "gemma2",
        "gemma2-2b",
        SIZES | EPSILON | WINDOWS,
        GEMMA,
        pattern=1,
        own=GEMMA_NORMS | {"local_rope_max_timescale": -1},
    ),
    "gemma3_text": Family("gemma3", "gemma3-4b", SIZES | EPSILON | WINDOWS, GEMMA, pattern=5, own=GEMMA_NORMS),
}


def family_of(config: transformers.PreTrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model_type={config.model_type!r}: not supported; supported are {', '.join(FAMILIES)}, and the language "
            "model of gemma3"
        )
    return FAMILIES[config.model_type]


def head_dim(config: transformers.PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_types(family: Family, layers: int) -> list[str]:
    period = family.pattern + 1
    return ["full_attention" if i % period == family.pattern else "sliding_attention" for i in range(layers)]


def gemma3_scalar(name: str, settings: dict[str, Any]) -> int:
    by_width = name == "gemma3-27b"
    return settings["hidden_size"] // settings["num_attention_heads"] if by_width else settings["head_dim"]
