"""Which architectures of Hugging Face's MaxText has too, and how their settings are called in each.

Used both ways: convert_teacher.py reads a config.json, export_student.py writes one. Names and transformations of the
weights are MaxText's own (maxtext.checkpoint_conversion). Left out on purpose: architectures that no test compares
with transformers (tests/huggingface/test_convert.py), and whatever MaxText's decoder of a family cannot be set to.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from etils import epy

with epy.lazy_imports():
    import transformers  # after upstream has quietened it
    from maxtext.checkpoint_conversion.utils import hf_model_configs, hf_shape, param_mapping

from MaxText import upstream
from MaxText.config.files import CONFIGS, load_yml
from MaxText.config.keys import ConfigError
from MaxText.config.presets import preset_folder, preset_places

# The scaling of rotary positions that MaxText's `rope_type: llama3.1` has built in.
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

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
CAPS = ("attn_logits_soft_cap", "final_logits_soft_cap")
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
NO_OTHER_DEEPSEEK = {"use_indexer": False, "engram_layers": [], "mhc_expansion_rate": 1}
DEEPSEEK_BUILT_IN = SILU | {"attention_bias": False, "rms_norm_eps": 1e-6}  # norms of latents have no other
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False,
         "use_bidirectional_attention": False}  # fmt: skip


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
    ),
    "qwen2": Family("qwen2", "qwen2.5-7b", SIZES | EPSILON, SILU | NO_WINDOW),
    "qwen3": Family("qwen3", "qwen3-8b", SIZES | EPSILON, SILU | NO_WINDOW | {"attention_bias": False}),
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
            "norm_topk_prob": "norm_topk_prob",
        },
        SILU | NO_WINDOW | {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
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
    "gemma2": Family("gemma2", "gemma2-2b", SIZES | WINDOWS, GEMMA, pattern=1),
    "gemma3_text": Family("gemma3", "gemma3-4b", SIZES | WINDOWS, GEMMA, pattern=5),
}


# config.json -> MaxText's keys ----------------------------------------------------------------------------------------


def family_of(config: transformers.PreTrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model_type={config.model_type!r}: not supported; supported are {', '.join(FAMILIES)}, and the language "
            "model of gemma3"
        )
    return FAMILIES[config.model_type]


def architecture(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """MaxText's keys of the model that a Hugging Face configuration (of text alone) describes.

    Raises:
      ConfigError: MaxText has no decoder of that kind.
    """
    family = family_of(config)
    if getattr(config, "quantization_config", None):
        raise ConfigError("quantization_config: quantized weights are not supported; use the original ones")
    built_in = family.built_in | (
        {"layer_types": layer_types(family, config.num_hidden_layers)} if family.pattern else {}
    )
    for name, only in built_in.items():
        value = getattr(config, name)
        if value != only and not (only is False and value is None):
            raise ConfigError(f"{name}={value!r}: MaxText's {family.decoder_block} decoder has {only!r} built in")
    settings = {key: getattr(config, name) or 0 for key, name in family.keys.items()} | family.own
    if not family.is_latent:
        settings["head_dim"] = head_dim(config)
    if settings.get("n_routing_groups") == 1:  # all experts
        settings |= dict.fromkeys(GROUPS, -1)
    settings["logits_via_embedding"] = bool(settings["logits_via_embedding"])
    if family.pattern:  # MaxText scales Gemma's embedding table itself by sqrt(width), and the logits back
        settings["normalize_embedding_logits"] = True
    elif settings["logits_via_embedding"]:
        settings["normalize_embedding_logits"] = False
    if family.decoder_block == "gemma2":  # a layer of MaxText's is a pair of Hugging Face's
        settings["base_num_decoder_layers"] //= 2
    return settings | rotary(config, family)


def head_dim(config: transformers.PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_types(family: Family, layers: int) -> list[str]:
    period = family.pattern + 1
    return ["full_attention" if i % period == family.pattern else "sliding_attention" for i in range(layers)]


def rotary(config: transformers.PreTrainedConfig, family: Family) -> dict[str, Any]:
    """MaxText's keys for rotary positions."""
    given = dict(config.rope_parameters)
    if family.is_latent:
        return yarn(config, given)
    if family.decoder_block == "gemma3":
        local, given = dict(given["sliding_attention"]), dict(given["full_attention"])
        if local.get("rope_type", "default") == "default":
            keys: dict[str, Any] = {"local_rope_max_timescale": int(local["rope_theta"])}
            keys["rope_linear_scaling_factor"] = given.get("factor", 1.0)
            if given.get("rope_type", "default") in ("default", "linear"):
                return keys | {"rope_max_timescale": int(given["rope_theta"])}
    scaling = {name: value for name, value in given.items() if name not in ("rope_theta", "partial_rotary_factor")}
    keys = {"rope_max_timescale": int(given["rope_theta"]), "rope_type": "default"}
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        if scaling.get("rope_type", "default") == "default":
            return keys
        if scaling == LLAMA31 and family.decoder_block == "llama2":
            return keys | {"rope_type": "llama3.1", "rope_use_scale": True}
    raise ConfigError(
        f"rope_parameters={config.rope_parameters!r}: MaxText's {family.decoder_block} decoder cannot scale rotary "
        "positions so" + (f"; of Llama's scalings it has {LLAMA31!r}" if family.decoder_block == "llama2" else "")
    )


# MaxText's key -> what config.json calls it among its parameters of rotary positions, and its value if left out.
YARN = {
    "rope_factor": ("factor", 1),
    "original_max_position_embeddings": ("original_max_position_embeddings", 4096),
    "beta_fast": ("beta_fast", 32),
    "beta_slow": ("beta_slow", 1),
    "mscale": ("mscale_all_dim", 1),
}


def yarn(config: transformers.PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """MaxText's keys for DeepSeek's rotary positions, which turn neighbours in a head; plain ones are YaRN's by 1.

    MaxText's `rope_type: default` turns halves of a head instead.
    """
    keys = {"rope_type": "yarn", "rope_interleave": True, "rope_max_timescale": int(given["rope_theta"])}
    if given.get("rope_type", "default") == "default":
        return keys | {"rope_factor": 1}
    values = {key: given.get(name) or default for key, (name, default) in YARN.items()}
    whole = {key: value if key == "mscale" else int(value) for key, value in values.items()}
    length = config.max_position_embeddings
    if (
        given["rope_type"] == "yarn"
        and whole == values
        and (given.get("mscale") or 0) == (given.get("mscale_all_dim") or 0) != 0
        and given.get("truncate", True)
        and given.get("attention_factor") is None
        and given.get("partial_rotary_factor", 1) == 1
        and length > whole["original_max_position_embeddings"]
    ):
        keys |= {"max_position_embeddings": length, "rope_truncate": True, "rope_attention_scaling": False}
        return keys | whole
    raise ConfigError(
        f"rope_parameters={config.rope_parameters!r}: MaxText's deepseek decoder scales rotary positions by YaRN with "
        "whole numbers, equal mscale and mscale_all_dim, and original_max_position_embeddings below "
        f"max_position_embeddings ({length})"
    )


# MaxText's configuration -> config.json -------------------------------------------------------------------------------


def configuration(config: Any) -> transformers.PreTrainedConfig:
    """The Hugging Face configuration of the model that MaxText's `config` describes.

    Raises:
      ConfigError: Hugging Face has no such architecture, or not with these settings.
    """
    block = config.decoder_block.value
    of_block = {name: family for name, family in FAMILIES.items() if family.decoder_block == block}
    if not of_block:
        blocks = ", ".join(dict.fromkeys(family.decoder_block for family in FAMILIES.values()))
        raise ConfigError(f"decoder_block={block}: not supported; supported are {blocks}")
    model_type = next((name for name in of_block if config.model_name.startswith(of_block[name].names)), None)
    if model_type is None:
        names = " or ".join(start for family in of_block.values() for start in family.names)
        raise ConfigError(f"model_name={config.model_name}: MaxText's {block} presets begin with {names}")
    family = of_block[model_type]
    settings: dict[str, Any] = {name: held(config, key) for key, name in family.keys.items()}
    settings |= family.built_in
    settings["max_position_embeddings"] = config.max_target_length
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": float(config.rope_max_timescale)}
    if model_type == "deepseek_v3":
        settings["num_mtp_layers"] = 0  # they stay behind
    if family.is_latent:
        settings["q_lora_rank"] = settings["q_lora_rank"] or None
        settings |= {name: 1 for key, name in GROUPS.items() if settings.get(name) == -1}
        if config.rope_factor != 1:
            scaled = {name: getattr(config, key) for key, (name, _) in YARN.items()}
            settings["rope_parameters"] |= scaled | {"rope_type": "yarn", "mscale": config.mscale}
            settings["max_position_embeddings"] = config.max_position_embeddings
    else:
        settings["head_dim"] = config.head_dim
    if block == "gemma2":
        settings["num_hidden_layers"] *= 2
        settings["query_pre_attn_scalar"] = config.head_dim
    if block == "gemma3":
        settings["query_pre_attn_scalar"] = gemma3_scalar(config.model_name, settings)
        scaled = {"rope_type": "linear", "factor": config.rope_linear_scaling_factor}
        settings["rope_parameters"] = {
            "full_attention": settings["rope_parameters"] | (scaled if scaled["factor"] != 1 else {}),
            "sliding_attention": {"rope_type": "default", "rope_theta": float(config.local_rope_max_timescale)},
        }
    if family.pattern:
        settings["layer_types"] = layer_types(family, settings["num_hidden_layers"])
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            settings[name] = settings[name] or None
    if interleaved(config) and config.rope_use_scale:
        settings["rope_parameters"] |= LLAMA31
    made = transformers.AutoConfig.for_model(model_type, **settings)
    check_same(config, architecture(made))
    return made


def held(config: Any, key: str) -> Any:
    """A base_* key is multiplied by what global_parameter_scale says; the model has the product."""
    return getattr(config, {"base_moe_mlp_dim": "moe_mlp_dim"}.get(key, key.removeprefix("base_")))


def check_same(config: Any, settings: dict[str, Any]) -> None:
    """Whatever of the model config.json has no word for would be lost without a word."""
    activation = "gelu" if config.decoder_block.value.startswith("gemma") else "silu"
    settings = dict.fromkeys(CAPS, 0) | {"mlp_activations": [activation, "linear"]} | settings
    for key, value in settings.items():
        own = held(config, key)
        own = getattr(own, "value", own)
        if key == "rope_type" and interleaved(config):  # llama3.1 without its scaling is plain
            continue
        if (own or 0) != (value or 0):
            raise ConfigError(f"{key}={own!r}: Hugging Face's model of this kind has {value!r}")


# Presets --------------------------------------------------------------------------------------------------------------

# How a model is stored or padded rather than what it is: a preset that differs in these alone fits. MaxText's preset of
# DeepSeek V3 leaves its groups of experts out.
ADJUSTED = ("vocab_size", "rope_type", "rope_use_scale", *GROUPS)


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """Name -> settings of every preset of MaxText's and of ours, on MaxText's defaults."""
    found: dict[str, dict[str, Any]] = {}
    defaults = dict(load_yml(upstream.base_yml()))
    for folder in preset_places(CONFIGS):
        for file in sorted(folder.glob("*.yml")):
            found.setdefault(file.stem, defaults | dict(load_yml(str(file))))
    for name, settings in found.items():
        if name.startswith("llama3.1"):  # the one architecture that MaxText tells by the preset's name
            settings["rope_type"] = "llama3.1"
    return found


def overrides(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What of `settings` the preset `name` has otherwise."""
    if name.startswith("llama3.1") and settings["rope_type"] == "default":
        settings = settings | {"rope_type": "llama3.1", "rope_use_scale": False}
    return {key: value for key, value in settings.items() if presets()[name][key] != value}


def candidates(config: transformers.PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The presets of a configuration's family -> what each would have to be overridden with, the nearest first."""
    family, settings = family_of(config), architecture(config)
    found = {
        name: overrides(name, settings)
        for name, preset in presets().items()
        if preset["decoder_block"] == family.decoder_block
        and name.startswith(family.names)
        and all(preset[key] == value for key, value in family.own.items())
        and not preset["use_batch_split_schedule"]  # another schedule of a model that has a preset
        and has_scalar(name, config, family)
    }
    return dict(sorted(found.items(), key=lambda item: (len(item[1].keys() - set(ADJUSTED)), len(item[1]), item[0])))


def has_scalar(name: str, config: transformers.PreTrainedConfig, family: Family) -> bool:
    """MaxText's Gemma 3 knows by which number queries are divided from the preset's name, and refuses other names."""
    if family.decoder_block != "gemma3":
        return True
    return gemma3_scalar(name, config.to_dict() | {"head_dim": head_dim(config)}) == config.query_pre_attn_scalar


def gemma3_scalar(name: str, settings: dict[str, Any]) -> int:
    by_width = name == "gemma3-27b"
    return settings["hidden_size"] // settings["num_attention_heads"] if by_width else settings["head_dim"]


def choose(config: transformers.PreTrainedConfig, name: str) -> tuple[str, dict[str, Any]]:
    """The preset for a configuration, and the keys that must be overridden.

    Args:
      config: the Hugging Face configuration, of text alone.
      name: the preset that the user wants; "": the one that fits.

    Raises:
      ConfigError: none fits, or the wanted one is of another family.
    """
    fitting = candidates(config)
    if name:
        if name not in fitting:
            folder = CONFIGS
            preset_folder("--model-name", name, folder)
            raise ConfigError(
                f"--model-name={name!r}: is no {config.model_type}; presets of this family are {', '.join(fitting)}"
            )
        return name, fitting[name]
    nearest = next(iter(fitting), None)
    if nearest is None:
        raise ConfigError(f"model_type={config.model_type!r}: MaxText has no preset of this kind")
    if fitting[nearest].keys() <= set(ADJUSTED):
        return nearest, fitting[nearest]
    listed = "\n".join(
        f"  {near}, which would need {', '.join(f'{key}={value}' for key, value in changed.items())}"
        for near, changed in list(fitting.items())[:3]
    )
    raise ConfigError(
        f"no preset is a {config.model_type} of this shape. The nearest are\n{listed}\n"
        f"Take one with --model-name, such as --model-name {nearest}: what differs is overridden."
    )


# Weights --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tables:
    """MaxText's tables for one model.

    Attributes:
      names: its parameter, or several that make one -> the tensor or the (nested) list of tensors it is stacked from.
      hooks: its parameter -> what is done to the tensor.
      shapes: tensor -> shape.
    """

    names: dict[Any, Any]
    hooks: dict[Any, Any]
    shapes: dict[str, Any]


def tables(hugging_face: transformers.PreTrainedConfig, config: Any, saving: bool) -> Tables:
    """What MaxText's converters would do with this model, where it is right.

    Args:
      hugging_face: the configuration, of text alone.
      config: MaxText's configuration of the same model.
      saving: from MaxText to Hugging Face rather than back.
    """
    family = family_of(hugging_face)
    text = hugging_face.to_dict() | {"head_dim": head_dim(hugging_face)}
    if family.decoder_block == "qwen2":
        text["attention_bias"] = True
    whole = text
    if family.decoder_block == "gemma3":  # the tables are those of the model that sees: its vision goes unused
        whole = hf_model_configs.HF_MODEL_CONFIGS[family.table].to_dict() | {"text_config": text}
    layers = config.scan_layers
    names = param_mapping.PARAM_MAPPING[family.table](whole, config, layers)
    hooks = functools.partial(param_mapping.HOOK_FNS.__getitem__(family.table), scan_layers=layers, saving_to_hf=saving)
    made = hooks(whole, config)
    if family.decoder_block == "gemma2":  # they divide queries by sqrt(head_dim); the 27b's are by another number
        made = hooks(whole | {"head_dim": text["query_pre_attn_scalar"]}, config)
    if family.decoder_block == "gemma3":  # theirs rounds sqrt(width) to bfloat16; MaxText scales logits back exactly
        embedding = "params-token_embedder-embedding"
        exact = param_mapping.HOOK_FNS["gemma2-2b"](text, config, scan_layers=layers, saving_to_hf=saving)
        made |= {embedding: exact[embedding]}
    if family.own.get("routed_bias"):  # in the checkpoint they are no parameters, which theirs does not know
        names = {apart(key): value for key, value in names.items()}
    if family.table == "llama3.1-8b" and not interleaved(config):
        # Theirs interleave the halves of a head, as MaxText's llama3.1 positions want it; its plain ones do not.
        plain = param_mapping.HOOK_FNS["mixtral-8x7b"](text, config, scan_layers=layers, saving_to_hf=saving)
        made |= {key: hook for key, hook in plain.items() if key.endswith(("query-kernel", "key-kernel"))}
    return Tables(names, made, hf_shape.HF_SHAPE[family.table](whole))


def interleaved(config: Any) -> bool:
    """Whether MaxText rotates pairs of neighbours in a head (its llama3.1 positions) rather than halves of it."""
    return str(getattr(config.rope_type, "value", config.rope_type)) == "llama3.1" or config.model_name.startswith(
        "llama3.1"
    )


BIASES = "MoEBiasVar-"  # of routers: MaxText's collection of them


def apart(key: str) -> str:
    return key.replace("params-", BIASES, 1) if key.endswith("gate-bias") else key


# How the language model of a model that sees is called: in MaxText's tables, on disk as published, on its own.
PREFIXES = ("model.language_model.", "language_model.model.", "model.")


def spellings(name: str) -> list[str]:
    """The names under which a tensor of MaxText's tables may be stored."""
    if not name.startswith(PREFIXES[0]):
        return [name]
    return [prefix + name.removeprefix(PREFIXES[0]) for prefix in PREFIXES]
