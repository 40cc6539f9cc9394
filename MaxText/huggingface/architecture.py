"""A model's architecture in both languages: config.json -> MaxText's keys, MaxText's configuration -> config.json."""

from __future__ import annotations

from typing import Any

from etils import epy

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.huggingface.families import FAMILIES, GROUPS, family_of, gemma3_scalar, head_dim, layer_types
from MaxText.huggingface.rotary import YARN, interleaved, llama3_parameters, older_names, rotary

# MaxText's keys that change what a decoder computes but none of its arrays -> as they are in Hugging Face's models.
UNSAID = {
    "attn_logits_soft_cap": 0,
    "final_logits_soft_cap": 0,
    "mlp_activations_limit": -1.0,
    "moba": False,
    "rope_linear_scaling_factor": 1.0,
    "rope_min_timescale": 1,
    "use_mrope": False,
    "use_untrainable_positional_embedding": False,
}


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
            # transformers 4 warns of a factor or a beta that is a whole number
            scaled: dict[str, Any] = {name: float(getattr(config, key)) for key, (name, _) in YARN.items()}
            scaled |= {"rope_type": "yarn", "mscale": config.mscale}
            scaled["original_max_position_embeddings"] = config.original_max_position_embeddings
            settings["rope_parameters"] |= scaled
            settings["max_position_embeddings"] = config.max_position_embeddings
    else:
        settings["head_dim"] = config.head_dim
    if block == "gemma2":
        settings["num_hidden_layers"] *= 2
        settings["query_pre_attn_scalar"] = config.head_dim
    if block == "gemma3":
        settings["query_pre_attn_scalar"] = gemma3_scalar(config.model_name, settings)
        linear = {"rope_type": "linear", "factor": config.rope_linear_scaling_factor}
        settings["rope_parameters"] = {
            "full_attention": settings["rope_parameters"] | (linear if linear["factor"] != 1 else {}),
            "sliding_attention": {"rope_type": "default", "rope_theta": float(config.local_rope_max_timescale)},
        }
    if family.pattern:
        settings["layer_types"] = layer_types(family, settings["num_hidden_layers"])
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            settings[name] = settings[name] or None
    if interleaved(config) and config.rope_use_scale:
        settings["rope_parameters"] |= llama3_parameters(config)
    made = transformers.AutoConfig.for_model(model_type, **settings)
    check_same(config, architecture(made))
    with upstream.silence():  # the first touch imports, and TensorFlow greets
        made.architectures = [upstream.hf_utils.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return made


def spelled(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """config.json for transformers 5, with what 4 calls otherwise by those names too, and no default left out.

    Defaults are not the same in each release. Where 5 finds both names it reads what is written here.
    """
    written = config.to_diff_dict() | older_names(config.rope_parameters)
    written |= {name: getattr(config, name) for name in config.attribute_map}
    return written | {"torch_dtype": written["dtype"]}


def held(config: Any, key: str) -> Any:
    """A base_* key is multiplied by what global_parameter_scale says; the model has the product."""
    return getattr(config, {"base_moe_mlp_dim": "moe_mlp_dim"}.get(key, key.removeprefix("base_")))


def check_same(config: Any, settings: dict[str, Any]) -> None:
    """Whatever of the model config.json has no word for would be lost without a word."""
    activation = "gelu" if config.decoder_block.value.startswith("gemma") else "silu"
    settings = UNSAID | {"mlp_activations": [activation, "linear"]} | settings
    for key, value in settings.items():
        own = held(config, key)
        own = getattr(own, "value", own)
        if key == "rope_type" and interleaved(config):  # llama3.1 without its scaling is plain
            continue
        if (own or 0) != (value or 0):
            raise ConfigError(f"{key}={own!r}: Hugging Face's model of this kind has {value!r}")
