"""A student cut from its teacher: a checkpoint of MaxText's that holds its parameters alone.

Arrays are read, cut and written one after the other, stacked ones layer by layer: memory is a few times the largest
array of one layer (or the embedding table), not the model. Where channels are left out, the scale of each norm is
multiplied so that what leaves it has the size that it had: the mean square is now taken over fewer channels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console

from MaxText import upstream
from MaxText.checkpoints import reading, writing
from MaxText.checkpoints.stacked_arrays import Shape, Stacked
from MaxText.config.keys import ConfigError
from MaxText.console import RunError, first_line
from MaxText.huggingface import shapes, tokenizer
from MaxText.models import teacher as teacher_lib
from MaxText.pruning import calibration, target
from MaxText.pruning.choice import WAYS, Kept, Module, Scored, choose
from MaxText.pruning.structure import (
    EMB,
    EXPERTS,
    HEADS,
    KV_HEADS,
    MLP,
    Path,
    Structure,
    axes_of,
    is_norm,
    structure_of,
)
from MaxText.pruning.target import Model

Name = tuple[int | None, Path]  # of a piece: its layer, None for none, and its path within the layer or the model


@dataclasses.dataclass(frozen=True)
class Student:
    """What a cut made.

    Attributes:
      teacher, model: what it was cut from, and what it is.
      scan_layers: how its layers are stored.
      items: its checkpoint; the teacher's.
      tokenizer: its folder; None where the teacher's had none.
      layers: which of the teacher's.
      parameters: how many it has, of how many.
      measured: in words, on what; "" where nothing was.
    """

    teacher: Model
    model: Model
    scan_layers: bool
    items: epath.Path
    teacher_items: epath.Path
    tokenizer: epath.Path | None
    layers: list[int]
    parameters: tuple[int, int]
    measured: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for, as the command line says it.

    Attributes:
      teacher: a checkpoint.
      model_name, overrides: of the teacher; "" and None: those of the record beside it.
      target, sizes: of the student.
      by: of WAYS.
      scan_layers: how the student's layers are stored; None: as the teacher's.
      rows, settings: of the calibration.
    """

    teacher: str
    model_name: str
    overrides: dict[str, Any] | None
    target: str
    sizes: dict[str, int]
    by: str
    scan_layers: bool | None
    rows: int
    settings: list[str]


def cut(request: Request, output: epath.Path, console: Console) -> Student:
    """Writes <output>/0/items, <output>/cut.json and, where the teacher has one, <output>/tokenizer.

    Raises:
      ConfigError: no such student is in the teacher; nothing was written.
      RunError: something could not be read or written; the same command goes on from there.
    """
    upstream.set_verbose(False)  # orbax would tell how it finds its way in the checkpoint
    checkpoint = find_teacher(request.teacher)
    teacher = target.teacher_of(checkpoint.root, request.model_name, request.overrides)
    config = shapes.maxtext_config(teacher.preset, teacher.overrides, checkpoint.scan_layers)
    structure = structure_of(config)
    student = target.student_of(teacher, request.target, request.sizes)
    scanned = checkpoint.scan_layers if request.scan_layers is None else request.scan_layers
    student_config = shapes.maxtext_config(student.preset, student.overrides, scanned)
    check_arrays(config, checkpoint)
    writing.check_free(output, target.RECORD)

    source = Source(checkpoint, structure)
    record = source.identity | {"teacher_model_name": teacher.preset, "teacher_overrides": teacher.overrides}
    record |= {"model_name": student.preset, "overrides": student.overrides, "scan_layers": scanned, "by": request.by}
    if request.by in MEASURED:
        record |= {"rows_asked": request.rows, "settings": request.settings}
    found = resumed(output, record)
    if found is None:
        found = decided(request, teacher, checkpoint, structure, student, structure_of(student_config).kinds, console)
    kept, factors = Kept.from_json(found["kept"]), found["norm_factors"]
    arrays = lazy_arrays(student_config, source, kept, factors)
    words = target.tokenizer_beside(checkpoint.root)
    try:
        written = writing.begin(output, target.RECORD, record | found)
        if words is not None:
            tokenizer.copy_files(words, output / "tokenizer")
        writing.save(output, arrays, written, student_config, console, "cutting")
    except (OSError, ValueError) as error:  # tensorstore's are of the second kind
        raise RunError(f"{output}: not cut ({first_line(error)}); the same command goes on from here") from error
    count = sum(math.prod(array.shape) for _, array in arrays)
    whole = sum(math.prod(shape) for where, shape, _ in checkpoint.arrays.values() if where[0] == "params")
    return Student(
        teacher=teacher,
        model=student,
        scan_layers=scanned,
        items=output / "0" / "items",
        teacher_items=source.folder,
        tokenizer=None if words is None else output / "tokenizer",
        layers=kept.layers,
        parameters=(count, whole),
        measured=found.get("measured", ""),
    )


# What is kept ---------------------------------------------------------------------------------------------------------

MEASURED = ("importance", "loss")  # the ways that want rows


def find_teacher(path: str) -> teacher_lib.Checkpoint:
    try:
        return teacher_lib.find_checkpoint(path)
    except ConfigError as error:  # the search is a run's, and so is the key in its words
        raise ConfigError(str(error).replace("kd_teacher_parameters_path=", "--teacher ")) from error


def check_arrays(config: Any, checkpoint: teacher_lib.Checkpoint) -> None:
    """Raises ConfigError where the checkpoint does not hold the model of the configuration."""
    wanted = {within_model(name): shape for name, (_, shape) in shapes.model_info(config)[0].items()}
    try:
        teacher_lib.check_shapes(config, checkpoint, wanted, 0)
    except ConfigError as error:
        flags = {"kd_teacher_parameters_path=": "--teacher ", "kd_teacher_model_name": "--model-name",
                 "kd_teacher_overrides": "--overrides"}  # fmt: skip
        message = str(error)
        for key, flag in flags.items():
            message = message.replace(key, flag)
        raise ConfigError(message) from error


def within_model(name: str) -> Path:
    """params-decoder-layers-mlp-wo-kernel, as conversion calls an array -> its path within the model."""
    return tuple(name.split("-")[1:])


def resumed(output: epath.Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted cut by the same record had decided: the teacher need not read its rows again."""
    file = output / target.RECORD
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError:
        return None
    asked = {name: found.pop(name, None) for name in record}
    return found if asked == json.loads(json.dumps(record)) else None


def decided(
    request: Request,
    teacher: Model,
    checkpoint: teacher_lib.Checkpoint,
    structure: Structure,
    student: Model,
    student_kinds: list[bool],
    console: Console,
) -> dict[str, Any]:
    """What is kept and why, as the record says it."""
    own = teacher.sizes
    sizes = student.sizes | {"group": own["heads"] // own["kv_heads"]}
    kinds = structure.kinds
    if request.by not in MEASURED:
        kept = choose(of_no_worth(checkpoint, structure, own), WAYS[request.by], kinds, student_kinds, sizes)
        return {"kept": kept.to_json(), "norm_factors": {}}
    asked = calibration.Asked(request.settings, request.rows, request.by == "loss")
    found = calibration.measure(teacher, checkpoint, structure, asked, console)
    kept = choose(found.scored, WAYS[request.by], kinds, student_kinds, sizes)
    factors = {}
    if sizes["emb"] < own["emb"]:
        factors = {
            norm_name(norm): factor(square, kept.emb) for norm, square in sorted(found.unscaled.items(), key=str)
        }
    return {
        "measured": f"{found.rows} rows, {found.tokens} tokens: the teacher's cross-entropy is {found.ce:.4f}",
        "kept": kept.to_json(),
        "norm_factors": factors,
        "scores": scores_to_json(found.scored),
    }


def of_no_worth(checkpoint: teacher_lib.Checkpoint, structure: Structure, sizes: dict[str, int]) -> Scored:
    """The teacher's parts, of which nothing is known but how many there are."""
    modules: dict[str, dict[Module, np.ndarray]] = {HEADS: {}, MLP: {}, EXPERTS: {}}
    for path in checkpoint.arrays:
        layers, part = structure.held(path)
        if layers is None or "rngs" in path:
            continue
        for width in {HEADS, MLP, EXPERTS}.intersection(axes_of(part)):
            for layer in layers if isinstance(layers, list) else [layers]:
                modules[width][layer, module_of(part)] = np.zeros(sizes[width])
    return Scored(np.zeros(sizes["layers"]), np.zeros(sizes["emb"]), modules[HEADS], modules[MLP], modules[EXPERTS])


def module_of(part: Path) -> str:
    """Of an array's path within a layer, the attention, MLP or mixture of experts that it belongs to."""
    return part[0]


def norm_name(norm: tuple[int | None, Path]) -> str:
    layer, part = norm
    return "/".join(part if layer is None else (str(layer), *part))


def factor(unscaled: np.ndarray, kept: list[int]) -> float:
    """What a norm's scale is multiplied by when it sees these channels alone.

    A norm over D' of D channels divides by another root, sqrt(mean' + epsilon) for sqrt(mean + epsilon). The square of
    their ratio is, on average, the mean over the kept channels of the squares before the scale, and the part of epsilon
    in the teacher's, which is what those squares of all channels lack of 1. It is 1 where the kept are like the others.
    """
    return float(np.sqrt(unscaled[kept].mean() + 1 - unscaled.mean()))


def scores_to_json(scored: Scored) -> dict[str, Any]:
    def rounded(x: np.ndarray) -> list[float]:
        return [float(f"{value:.6g}") for value in x]

    found: dict[str, Any] = {"layers": rounded(scored.layers), "emb": rounded(scored.emb)}
    for width in (HEADS, MLP, EXPERTS):
        found[width] = {f"{layer}/{module}": rounded(own) for (layer, module), own in getattr(scored, width).items()}
    return found


# The arrays -----------------------------------------------------------------------------------------------------------


class Source:
    """The teacher's arrays, layer by layer, however they are stored."""

    def __init__(self, checkpoint: teacher_lib.Checkpoint, structure: Structure):
        items = checkpoint.root / "items"
        self.folder = items if items.exists() else checkpoint.root
        self.reader = reading.Reader(self.folder)
        self.places: dict[Name, tuple[Path, tuple[Any, ...], np.dtype]] = {}  # where, which region, of what type
        for path, (where, _, dtype) in checkpoint.arrays.items():
            layers, part = structure.held(path)
            if isinstance(layers, list):
                for i, layer in enumerate(layers):
                    self.places[layer, part] = where, (slice(None),) * structure.scan_axis + (i, ...), dtype
            else:
                self.places[layers, part] = where, (...,), dtype

    @property
    def identity(self) -> dict[str, Any]:
        """Which checkpoint it is: another at the same path is not gone on with."""
        index = (self.folder / "_METADATA").stat()
        return {"teacher": str(self.folder), "teacher_index": [index.length, index.mtime]}

    def read(self, name: Name) -> np.ndarray:
        where, region, _ = self.places[name]
        return self.reader.read(where, region)

    def dtype(self, name: Name) -> np.dtype:
        return self.places[name][2]


def lazy_arrays(config: Any, source: Source, kept: Kept, factors: dict[str, float]) -> list[tuple[Any, Stacked]]:
    """Path -> array of the student's checkpoint, read and cut when asked for."""
    structure = structure_of(config)
    wanted, treedef = shapes.model_info(config)
    leaves: list[Any] = [None] * len(wanted)
    load = functools.partial(piece, source, kept, factors, last_factor(config, source))
    for name, (place, shape) in wanted.items():
        layers, part = structure.held(within_model(name))
        names: Any = (layers, part)
        axes: tuple[int, ...] = ()
        if isinstance(layers, list):
            names, axes = [(layer, part) for layer in layers], (structure.scan_axis,)
        kind = source.dtype(in_teacher(kept, names[0] if axes else names))
        leaves[place] = Stacked(tuple(shape), kind, names, axes, load)
    return jax.tree_util.tree_leaves_with_path({"params": jax.tree.unflatten(treedef, leaves)})


def in_teacher(kept: Kept, name: Name) -> Name:
    layer, part = name
    return (None if layer is None else kept.layers[layer]), part


def last_factor(config: Any, source: Source) -> float:
    """Of the last norm, where the decoder divides its logits by the root of a width that is another now."""
    if not (config.logits_via_embedding and config.normalize_embedding_logits):
        return 1.0
    before = source.places[None, ("decoder", "decoder_norm", "scale")]
    return math.sqrt(config.emb_dim / source.reader.read(before[0]).shape[0])


def piece(source: Source, kept: Kept, factors: dict[str, float], last: float, name: Name, shape: Shape) -> np.ndarray:
    """A layer's part of an array, or an array of no layer, as the student has it."""
    layer, part = in_teacher(kept, name)
    found = source.read((layer, part))
    indices = {EMB: kept.emb}
    if layer is not None:
        widths = {HEADS: kept.heads, KV_HEADS: kept.kv_heads, MLP: kept.mlp, EXPERTS: kept.experts}
        indices |= {width: of[layer, module_of(part)] for width, of in widths.items() if (layer, module_of(part)) in of}
    for axis, width in enumerate(axes_of(part)):
        if width is not None and len(indices[width]) < found.shape[axis]:
            found = np.take(found, indices[width], axis=axis)
    if is_norm(part):
        by = factors.get(norm_name((layer, part)), 1.0) * (last if layer is None else 1.0)
        found = found if by == 1 else (found.astype(np.float32) * np.float32(by)).astype(found.dtype)
    return found
