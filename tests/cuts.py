"""Tiny teachers of random numbers, in which parts that add nothing may be planted, and what a checkpoint computes."""

import dataclasses
import json
import math
import pathlib
import zlib
from typing import Any

import init_student
import jax
import numpy as np
import token_rows
from conftest import SMOKE
from flax import nnx
from flax.core.spmd import logical_axis_rules
from orbax.checkpoint.experimental import v1 as ocp

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.teacher import resolve_teacher
from MaxText.huggingface import shapes
from MaxText.loop import step
from MaxText.models import fresh, heads
from MaxText.models import teacher as teacher_lib
from MaxText.pruning.cutting import within_model
from MaxText.pruning.structure import axes_of, structure_of

Path = tuple[str, ...]
Name = tuple[int | None, Path]
Arrays = dict[Path, np.ndarray]

SIZES = {"base_num_decoder_layers": 4, "base_emb_dim": 32, "base_num_query_heads": 4, "base_num_kv_heads": 2,
         "head_dim": 16, "base_mlp_dim": 40, "vocab_size": 256, "normalization_layer_epsilon": 1e-7}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": 24, "base_mlp_dim": 24}
LIVE = {"emb": 24, "kv_heads": 1, "mlp": 30, "experts": 3}  # what is left where the dead is planted
HEIGHT = 4.0  # of a channel that is the same for all tokens: by it a router can tell


@dataclasses.dataclass(frozen=True)
class Dead:
    """What adds nothing, by numbers that another seed draws otherwise.

    Attributes:
      layers: which.
      widths: whether channels, groups of heads, neurons and experts too.
    """

    layers: tuple[int, ...] = ()
    widths: bool = False

    def of(self, width: str, layer: int | None, size: int) -> list[int]:
        if not self.widths:
            return []
        place = None if width == "emb" else layer
        generator = np.random.default_rng(zlib.crc32(f"{width}/{place}".encode()))
        first = 1 if width == "emb" else 0  # the channel by which routers tell lives
        return sorted(generator.choice(np.arange(first, size), size - LIVE[width], replace=False).tolist())


def piece(
    name: Name, shape: tuple[int, ...], dead: Dead = Dead(), table: float = 1.0, routed: bool = False
) -> np.ndarray:
    """Random numbers that follow from the name, of a size that keeps activations near one."""
    layer, part = name
    x = np.random.default_rng(zlib.crc32(repr(name).encode())).standard_normal(shape).astype(np.float32)
    if part[-1] == "scale":
        x = 1 + 0.2 * x
    elif part[-1] == "bias":
        x *= 0.3
    elif part[-1] == "embedding":
        x *= table
    else:
        x /= math.sqrt(math.prod(shape[:-1]) if part[-2] == "out" else shape[-2 if part[-1] != "kernel" else 0])
    if part[-2] == "query":
        x /= 4  # no attention is so sharp that it magnifies rounding
    if routed and part[-1] == "embedding":
        x[:, 0] = HEIGHT
    to_channels = part[-1] == "embedding" or part[-2:] in (("out", "kernel"), ("wo", "kernel")) or part[-1] == "wo"
    if to_channels:
        x[..., dead.of("emb", None, shape[-1])] = 0
        if part[-1] != "embedding" and layer in dead.layers:
            x[...] = 0
    if part[-2:] == ("wi_1", "kernel"):
        x[:, dead.of("mlp", layer, shape[1])] = 0
    if part[-2] == "value":
        x[..., dead.of("kv_heads", layer, shape[-2]), :] = 0
    if part[-2] == "gate":
        x[:, dead.of("experts", layer, shape[1])] = 0
        x[0] = np.where(np.isin(np.arange(shape[1]), dead.of("experts", layer, shape[1])), -50, 0)
    return x


def write(
    folder: pathlib.Path, preset: str, dead: Dead = Dead(), scanned: bool = True, order: Any = None, **changed: Any
) -> pathlib.Path:
    """A teacher as convert_teacher would leave it.

    Args:
      folder: new.
      preset: MaxText's.
      dead: what adds nothing.
      scanned: layers stacked.
      order: (width, layer) -> in what order its parts stand; None: as they are made.
      **changed: keys of the preset.
    """
    changed = SIZES | changed
    config = shapes.maxtext_config(preset, changed, scanned)
    structure = structure_of(config)
    table = 0.2 if fresh.is_tied_unnormalised(config) else 1.0  # such logits are of its size

    def made(name: Name, shape: tuple[int, ...]) -> np.ndarray:
        x = piece(name, shape, dead, table, config.num_experts > 1)
        for axis, width in enumerate(axes_of(name[1])) if order else ():
            if width is not None:
                x = np.take(x, order(width, name[0]), axis)
        return x

    arrays: Arrays = {}
    for name, (_, shape) in shapes.model_info(config)[0].items():
        path = within_model(name)
        layers, part = structure.held(path)
        if isinstance(layers, list):
            rest = tuple(np.delete(shape, structure.scan_axis))
            arrays[path] = np.stack([made((layer, part), rest) for layer in layers], structure.scan_axis)
        else:
            arrays[path] = made((layers, part), tuple(shape))
    tree = {"params": nnx.traversals.unflatten_mapping(arrays)}
    upstream.checkpointing.save_params_to_path(str(folder / "0"), tree)
    (folder / "conversion.json").write_text(json.dumps({"model_name": preset, "overrides": changed}))
    return folder


def rows(folder: pathlib.Path) -> list[str]:
    """Settings whose data are eleven rows of random tokens, of which most have padding."""
    lengths = [33, 20, 9, 2, 31, 12, 25, 7, 18, 33, 28]
    file = token_rows.write(folder / "rows.arrayrecord", lengths, seed=0)
    keys = token_rows.KEYS | {"grain_train_files": file, "base_output_directory": folder}
    return [SMOKE, *(f"{key}={value}" for key, value in keys.items())]


def cut(teacher: pathlib.Path, output: pathlib.Path, *options: str) -> dict[str, Any]:
    """What the command records."""
    init_student.main(["--teacher", str(teacher), "--output", str(output), *options])
    return json.loads((output / "cut.json").read_text())


def arrays(folder: pathlib.Path, step: int = 0) -> Arrays:
    tree = ocp.load(folder / str(step), checkpointable_name="items")["params"]["params"]
    return nnx.traversals.flatten_mapping(tree)


def assert_equal(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for path, array in a.items():
        assert array.dtype == b[path].dtype
        np.testing.assert_array_equal(array, b[path], err_msg="/".join(path))


def logits(folder: pathlib.Path, seed: int = 0) -> np.ndarray:
    """What the checkpoint says of rows of random tokens, by its record."""
    names = [file for file in ("conversion.json", "cut.json") if (folder / file).exists()]
    record = json.loads((folder / names[0]).read_text())
    listed = ", ".join(f"{key}: {json.dumps(value)}" for key, value in record["overrides"].items())
    given = {"use_kd": "true", "kd_teacher_parameters_path": folder, "kd_teacher_model_name": record["model_name"]}
    given |= {"kd_teacher_overrides": f"{{{listed}}}", "base_output_directory": folder, "metrics_file": ""}
    run = resolve.initialize(["train.py", SMOKE, *(f"{key}={value}" for key, value in given.items())])
    checkpoint = teacher_lib.find_checkpoint(run.kd.kd_teacher_parameters_path)
    config = upstream.with_settings(resolve_teacher(run, checkpoint.scan_layers), sparse_matmul=False, megablox=False)
    mesh = upstream.maxtext_utils.get_mesh_from_config(config)
    model = teacher_lib.load(config, checkpoint, mesh, "", 0)
    tokens = np.random.default_rng(seed).integers(0, 256, (4, 32), dtype=np.int32)
    batch = {}
    for side in ("inputs", "targets"):
        batch |= {side: tokens, f"{side}_segmentation": np.ones_like(tokens)}
        batch[f"{side}_position"] = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)

    def projected(state: nnx.State) -> jax.Array:
        restored = nnx.merge(model.graphdef, state, copy=True)
        reported = step.forward(restored, config, batch, enable_dropout=False)
        hidden = heads.normed_hidden_states(restored, reported, enable_dropout=False)
        return heads.project(*heads.head_of(restored), hidden)

    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        exact = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # it rounds less
        return np.asarray(jax.jit(projected, compiler_options=exact)(model.state))
