"""Names, transformations and shapes of a model's tensors: MaxText's tables, corrected where they are wrong.

Used both ways. docs/convert.md tells what is corrected and how each was found.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Set
from typing import Any

from etils import epy

with epy.lazy_imports():
    import transformers  # after upstream has quietened it

from MaxText import upstream
from MaxText.config.keys import ConfigError
from MaxText.huggingface.families import family_of, head_dim
from MaxText.huggingface.rotary import interleaved


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

    def parameters(self, wanted: Set[str]) -> list[Any]:
        """Those of `names` that a model with the parameters `wanted` has.

        Raises:
          ConfigError: it has one that is nowhere in Hugging Face's model.
        """
        known = {part for key in self.names for part in (key if isinstance(key, tuple) else (key,))}
        foreign = sorted(wanted - known)
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise ConfigError(f"{', '.join(foreign[:5])}{more}: Hugging Face's model of this kind has no such tensor")
        with upstream.silence():
            return upstream.hf_utils.validate_and_filter_param_map_keys(self.names.keys(), wanted)


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
        whole = upstream.hf_model_configs.HF_MODEL_CONFIGS[family.table].to_dict() | {"text_config": text}
    layers = config.scan_layers
    names = upstream.param_mapping.PARAM_MAPPING[family.table](whole, config, layers)
    hooks = functools.partial(
        upstream.param_mapping.HOOK_FNS.__getitem__(family.table), scan_layers=layers, saving_to_hf=saving
    )
    made = hooks(whole, config)
    if family.decoder_block == "gemma2":  # they divide queries by sqrt(head_dim); the 27b's are by another number
        made = hooks(whole | {"head_dim": text["query_pre_attn_scalar"]}, config)
    if family.decoder_block == "gemma3":  # theirs rounds sqrt(width) to bfloat16; MaxText scales logits back exactly
        embedding = "params-token_embedder-embedding"
        exact = upstream.param_mapping.HOOK_FNS["gemma2-2b"](text, config, scan_layers=layers, saving_to_hf=saving)
        made |= {embedding: exact[embedding]}
    if family.own.get("routed_bias"):  # in the checkpoint they are no parameters, which theirs does not know
        names = {apart(key): value for key, value in names.items()}
    if family.table == "llama3.1-8b" and not interleaved(config):
        # Theirs interleave the halves of a head, as MaxText's llama3.1 positions want it; its plain ones do not.
        plain = upstream.param_mapping.HOOK_FNS["mixtral-8x7b"](text, config, scan_layers=layers, saving_to_hf=saving)
        made |= {key: hook for key, hook in plain.items() if key.endswith(("query-kernel", "key-kernel"))}
    return Tables(names, made, upstream.hf_shape.HF_SHAPE[family.table](whole))


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
