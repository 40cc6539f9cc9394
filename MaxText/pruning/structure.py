"""How a model is laid out in its arrays: which layers an array holds, and which of its axes is which of the model's.

Left out on purpose: decoders whose widths are tied to each other in ways that the axes do not tell (latent attention,
norms over all heads, sinks), and layouts that MaxText offers for speed (fused projections).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from MaxText.config.keys import ConfigError

Path = tuple[str, ...]

# MaxText's decoders that can be cut -> after how many layers their kinds repeat, as in gemma3: five with a window, then
# a global one. (A layer of gemma2 is a pair of both.)
CYCLES = {"llama2": 1, "mistral": 1, "mixtral": 1, "qwen2": 1, "qwen3": 1, "qwen3_moe": 1,
          "gemma": 1, "gemma2": 1, "gemma3": 6}  # fmt: skip

EMB, HEADS, KV_HEADS, MLP, EXPERTS = "emb", "heads", "kv_heads", "mlp", "experts"
Axes = tuple[str | None, ...]

# How an array's name ends -> its axes, the stacked one left out; None: kept whole, as the pairs of rotary positions.
AXES: dict[Path, Axes] = {
    ("token_embedder", "embedding"): (None, EMB),
    ("logits_dense", "kernel"): (EMB, None),
    ("query", "kernel"): (EMB, HEADS, None),
    ("query", "bias"): (HEADS, None),
    ("key", "kernel"): (EMB, KV_HEADS, None),
    ("key", "bias"): (KV_HEADS, None),
    ("value", "kernel"): (EMB, KV_HEADS, None),
    ("value", "bias"): (KV_HEADS, None),
    ("out", "kernel"): (HEADS, None, EMB),
    ("query_norm", "scale"): (None,),
    ("key_norm", "scale"): (None,),
    ("wi_0", "kernel"): (EMB, MLP),
    ("wi_1", "kernel"): (EMB, MLP),
    ("wo", "kernel"): (MLP, EMB),
    ("gate", "kernel"): (EMB, EXPERTS),
    ("wi_0",): (EXPERTS, EMB, None),
    ("wi_1",): (EXPERTS, EMB, None),
    ("wo",): (EXPERTS, None, EMB),
    ("scale",): (EMB,),
}
# Settings under which a supported decoder has other arrays, or shares them otherwise -> as they must be.
PLAIN = {
    "fused_qkv": False, "fused_mlp": False, "attention_sink": False, "attention_type": "global", "mtp_num_layers": 0,
    "global_parameter_scale": 1, "inhomogeneous_layer_cycle_interval": 1, "routed_bias": False, "moba": False,
    "trainable_position_size": -1, "shared_experts": 0,
}  # fmt: skip


class Held(NamedTuple):
    """What an array holds.

    Attributes:
      layers: the layer, or those that are stacked; None: it is no layer's.
      part: its path within a layer, or within the model.
    """

    layers: int | list[int] | None
    part: Path


class Structure(NamedTuple):
    """What of a configuration decides where layers lie.

    Attributes:
      block: MaxText's name of the decoder.
      layers: how many.
      scan_axis: along which layers are stacked.
    """

    block: str
    layers: int
    scan_axis: int

    @property
    def kinds(self) -> list[bool]:
        """Of each layer whether it is the last of its cycle, which is of another kind than the others."""
        cycle = CYCLES[self.block]
        return [layer % cycle == cycle - 1 for layer in range(self.layers)]

    def held(self, path: Path) -> Held:
        """What the array at a path within the model holds, scanned or not."""
        if path[0] != "decoder":
            return Held(None, path)
        if number := re.fullmatch(r"layers_(\d+)", path[1]):
            return Held(int(number[1]), path[2:])
        cycle = CYCLES[self.block]
        whole = self.layers // cycle * cycle
        if path[1] == "layers_remainder":
            return Held(whole + numbered(path[2]), path[3:])
        if path[1] != "layers":
            return Held(None, path)
        if cycle == 1:
            return Held(list(range(self.layers)), path[2:])
        return Held(list(range(numbered(path[2]), whole, cycle)), path[3:])


def numbered(name: str) -> int:
    return int(name.rpartition("_")[2])


def structure_of(config: Any) -> Structure:
    """Raises ConfigError for a decoder that cannot be cut."""
    block = config.decoder_block.value
    if block not in CYCLES:
        raise ConfigError(f"decoder_block={block}: cannot be cut; those that can are {', '.join(CYCLES)}")
    for key, plain in PLAIN.items():
        value = getattr(config, key)
        if getattr(value, "value", value) != plain:
            raise ConfigError(f"{key}={value}: such a model cannot be cut; allowed is {plain}")
    return Structure(block, config.num_decoder_layers, config.param_scan_axis)


def axes_of(part: Path) -> Axes:
    """Of which of the model's widths each axis of an array is, the stacked one left out."""
    found = AXES.get(part[-2:]) or AXES.get(part[-1:])
    if found is None:
        raise ConfigError(f"{'/'.join(part)}: no array of a model that can be cut")
    return found


def is_norm(part: Path) -> bool:
    """Whether it is the scale of a norm over embedding channels."""
    return axes_of(part) == (EMB,)
