"""Rotary positions: what a config.json says of them, in MaxText's keys."""

from __future__ import annotations

from typing import Any

from etils import epy

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

from MaxText.config.keys import ConfigError
from MaxText.huggingface.families import Family

# MaxText's key -> what config.json calls it among the parameters of Llama 3's scaling of rotary positions.
LLAMA3 = {
    "rope_llama3_factor": "factor",
    "rope_llama3_low_freq_factor": "low_freq_factor",
    "rope_llama3_high_freq_factor": "high_freq_factor",
    "rope_llama3_original_length": "original_max_position_embeddings",
}


def rotary(config: transformers.PreTrainedConfig, family: Family) -> dict[str, Any]:
    """MaxText's keys for rotary positions."""
    if family.is_latent:
        return yarn(config, plainly(config.rope_parameters))
    if family.decoder_block == "gemma3":
        local, given = (plainly(config.rope_parameters[kind]) for kind in ("sliding_attention", "full_attention"))
        keys: dict[str, Any] = {"local_rope_max_timescale": timescale(local)}
        if local["rope_type"] == "default" and "partial_rotary_factor" not in local | given:
            if given["rope_type"] == "default":  # and a factor, if there is one, says nothing
                return keys | {"rope_linear_scaling_factor": 1.0, "rope_max_timescale": timescale(given)}
            if given["rope_type"] == "linear":
                return keys | {"rope_linear_scaling_factor": given["factor"], "rope_max_timescale": timescale(given)}
    else:
        given = plainly(config.rope_parameters)
        keys = {"rope_max_timescale": timescale(given), "rope_type": "default"}
        if given["rope_type"] == "default" and "partial_rotary_factor" not in given:
            return keys
        if family.decoder_block == "llama2" and given["rope_type"] == "llama3":
            return keys | llama3(config, given)
    raise ConfigError(
        f"rope_parameters={config.rope_parameters!r}: MaxText's {family.decoder_block} decoder cannot scale rotary "
        "positions so" + ("; of scalings it has rope_type='llama3'" if family.decoder_block == "llama2" else "")
    )


def llama3(config: transformers.PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The keys of Llama 3's scaling."""
    if given.keys() != {"rope_type", "rope_theta", *LLAMA3.values()}:
        raise ConfigError(
            f"rope_parameters={config.rope_parameters!r}: of rope_type='llama3' MaxText's llama2 decoder has "
            f"{', '.join(LLAMA3.values())}, no fewer and no others"
        )
    return {"rope_type": "llama3.1", "rope_use_scale": True} | {key: given[name] for key, name in LLAMA3.items()}


def llama3_parameters(config: Any) -> dict[str, Any]:
    """Llama 3's scaling by MaxText's configuration, in config.json's words."""
    return {"rope_type": "llama3"} | {name: getattr(config, key) for key, name in LLAMA3.items()}


def plainly(given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of rotary positions without what transformers does not read, or reads as if it were not there.

    `type` is what early models call rope_type; where both are given rope_type counts. Some of transformers' releases
    read the other one: they must be the same.
    """
    kind = given.get("rope_type", "default")
    if given.get("type", kind) != kind:
        raise ConfigError(
            f"rope_parameters={given!r}: type={given['type']!r} beside rope_type={kind!r}, which transformers goes by; "
            "write rope_type alone"
        )
    redundant = {"type": kind, "partial_rotary_factor": 1.0}
    return {name: value for name, value in given.items() if redundant.get(name) != value} | {"rope_type": kind}


def older_names(given: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 reads instead of `rope_parameters`."""
    if "full_attention" in given:
        return older_names(given["full_attention"]) | {"rope_local_base_freq": given["sliding_attention"]["rope_theta"]}
    scaling = {name: value for name, value in given.items() if name != "rope_theta"}
    return {"rope_theta": given["rope_theta"], "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def timescale(given: dict[str, Any]) -> int:
    theta = given["rope_theta"]
    if not isinstance(theta, int | float) or not float(theta).is_integer():
        raise ConfigError(f"rope_theta={theta!r}: MaxText's timescales of rotary positions are whole numbers")
    return int(theta)


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
    keys = {"rope_type": "yarn", "rope_interleave": True, "rope_max_timescale": timescale(given)}
    if given["rope_type"] == "default" and "partial_rotary_factor" not in given:
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
        and "partial_rotary_factor" not in given
        and length > whole["original_max_position_embeddings"]
    ):
        keys |= {"max_position_embeddings": length, "rope_truncate": True, "rope_attention_scaling": False}
        return keys | whole
    raise ConfigError(
        f"rope_parameters={config.rope_parameters!r}: MaxText's deepseek decoder scales rotary positions by YaRN with "
        "whole numbers, equal mscale and mscale_all_dim, and original_max_position_embeddings below "
        f"max_position_embeddings ({length})"
    )


def interleaved(config: Any) -> bool:
    """Whether MaxText rotates pairs of neighbours in a head (its llama3.1 positions) rather than halves of it."""
    return str(getattr(config.rope_type, "value", config.rope_type)) == "llama3.1" or config.model_name.startswith(
        "llama3.1"
    )
