"""Makes a teacher of a Hugging Face model: a checkpoint of MaxText's that holds its parameters alone.

    python scripts/convert_teacher.py --hf meta-llama/Llama-3.1-8B --output gs://bucket/teachers/llama3.1-8b

writes <output>/0/items (what kd_teacher_parameters_path and load_parameters_path take), <output>/tokenizer and
<output>/conversion.json, and prints how to train with it. No accelerator and no torch are needed. Arrays are read,
transformed and written one after the other: memory is a few times the largest tensor of the source, not the model
(docs/convert.md). <output>/0 appears when all is written; after an interruption the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays pass through the host's memory alone

import hugging_face
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath, epy
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from stacked_arrays import Pending, Shape, Stacked, stored_by_piece, written_by_piece

from MaxText import upstream
from MaxText.config import resolve
from MaxText.config.files import absolute
from MaxText.config.keys import ConfigError
from MaxText.console import first_line
from MaxText.loop import failures

with epy.lazy_imports():
    import transformers  # after upstream has quietened it
    from maxtext.checkpoint_conversion import to_maxtext
    from maxtext.checkpoint_conversion.utils import utils as hf_utils
    from orbax.checkpoint.experimental import v1 as ocp

WEIGHTS = "*.safetensors"
TOKENIZER = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
             "vocab.*", "merges.txt", "*.model", "chat_template*")  # fmt: skip
# Settings that say nothing of a model: for this machine, without data.
NEUTRAL = {
    "run_name": "conversion", "base_output_directory": "", "metrics_file": "", "dataset_type": "synthetic",
    "hardware": "cpu", "skip_jax_distributed_system": True, "enable_checkpointing": False, "attention": "dot_product",
    "override_model_config": True, "sparse_matmul": False, "megablox": False, "jax_cache_dir": "", "log_config": False,
    "quantization": "", "mtp_num_layers": 0, "eval_interval": -1,
}  # fmt: skip
BATCH = 1 << 28  # bytes of small arrays that are written at once
PARTIAL = "unfinished.partial_save"  # how Orbax calls the unfinished checkpoint, and each write in it begins
CHUNK = 1 << 27  # bytes of an array that are stored as one: who restores a shard reads the chunks that it touches


# The source -----------------------------------------------------------------------------------------------------------


def fetch(hf: str) -> pathlib.Path:
    """The model's folder: `hf` itself, or the hub's model of that name in Hugging Face's cache, fetched as needed."""
    folder = pathlib.Path(hf).expanduser()
    if folder.is_dir():
        return folder
    if hf.count("/") > 1 or hf.startswith((".", "~", "/")) or folder.exists():
        raise ConfigError(f"--hf {hf!r}: no such folder")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hf, allow_patterns=[WEIGHTS, "*.json", *TOKENIZER]))
    except Exception as error:  # of the hub's own kinds, of its connection's, of the disk's
        reason = first_line(error)
        raise ConfigError(
            f"--hf {hf!r}: no such folder, and as a model on the hub it cannot be fetched ({reason})"
        ) from error


def read_config(folder: pathlib.Path) -> transformers.PreTrainedConfig:
    """The model's configuration; of a model that sees, the one of its language model."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--hf {str(folder)!r}: no config.json in it")
    try:
        return transformers.AutoConfig.from_pretrained(folder).get_text_config()
    except Exception as error:  # a model_type that transformers does not know, or values that it refuses
        raise ConfigError(f"{folder / 'config.json'}: {first_line(error)}") from error


def stored_tensors(folder: pathlib.Path) -> dict[str, Shape]:
    """Name -> shape of every tensor in the folder, from the heads of its files alone.

    Raises:
      ConfigError: there are none, or one that the index names is not there.
    """
    index = folder / "model.safetensors.index.json"
    try:
        where = json.loads(index.read_text())["weight_map"] if index.is_file() else None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{index}: cannot be read ({error})") from error
    files = sorted(set(where.values())) if where else ["model.safetensors"]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing and not where:
        raise ConfigError(f"--hf {str(folder)!r}: no model.safetensors and no index of several files")
    if missing:
        raise ConfigError(f"{index}: names files that are not there: {', '.join(missing)}")
    found: dict[str, Shape] = {}
    for file in files:
        try:
            with safetensors.safe_open(folder / file, framework="np") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"{folder / file}: cannot be read ({first_line(error)})") from error
    lost = sorted(set(where or ()) - set(found))
    if lost:
        raise ConfigError(f"{index}: names tensors that are not there: {', '.join(lost[:5])}")
    return found


def locate(names: set[str], expected: dict[str, Any], stored: dict[str, Shape]) -> dict[str, str]:
    """Name in MaxText's tables -> name on disk.

    Args:
      names: those that the model needs.
      expected: name -> shape, as config.json has it.
      stored: name on disk -> shape.

    Raises:
      ConfigError: a tensor is missing, or has another shape.
    """
    found: dict[str, str] = {}
    problems = []
    for name in sorted(names):
        spelling = next((other for other in hugging_face.spellings(name) if other in stored), None)
        if spelling is None:
            problems.append(f"  {name}: not there")
        elif stored[spelling] != tuple(expected[name]):
            problems.append(f"  {spelling}: {stored[spelling]} stored, config.json makes it {tuple(expected[name])}")
        else:
            found[name] = spelling
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError("the weights are not those of config.json:\n" + "\n".join(problems[:5]) + more)
    return found


# The model ------------------------------------------------------------------------------------------------------------


def maxtext_config(name: str, changed: dict[str, Any], scan_layers: bool) -> Any:
    """MaxText's configuration of the preset `name` with `changed` keys, to take shapes from."""
    keys = NEUTRAL | {"model_name": name, "scan_layers": scan_layers} | changed
    return resolve.initialize(["convert_teacher.py", *(f"{key}={value}" for key, value in keys.items())]).student


def model_info(config: Any) -> tuple[dict[str, tuple[int, Shape]], Any]:
    """Name of each of the model's parameters -> its place in the flattened tree and its shape; and that tree."""
    with upstream.silence():
        to_maxtext.LazyTensor  # noqa: B018  the first touch imports, and lets absl tell everything
        upstream.set_verbose(False)
        return to_maxtext.get_maxtext_model_info(config)


def lazy_arrays(
    folder: pathlib.Path, hf_config: transformers.PreTrainedConfig, config: Any, dtype: str
) -> list[tuple[Any, Stacked]]:
    """Path -> array of MaxText's checkpoint, read and transformed when asked for."""
    tables = hugging_face.tables(hf_config, config, saving=False)
    wanted, treedef = model_info(config)
    with upstream.silence():
        keys = hf_utils.validate_and_filter_param_map_keys(tables.names.keys(), wanted.keys())
    needed = {name for key in keys for name in jax.tree.leaves(tables.names[key])}
    on_disk = locate(needed, tables.shapes, stored_tensors(folder))
    # Transformations multiply and add: in float32, rounded once, when written.
    loader = to_maxtext.LazyHFLoader(str(folder), None, save_dtype="float32")

    def load(hook: Any, name: str, shape: Shape) -> np.ndarray:
        return hf_utils.apply_hook_fns(loader.get_tensor(on_disk[name]), shape, hook)

    leaves = [None] * len(wanted)
    for key in keys:
        place, shape = wanted[key]
        names, hook = tables.names[key], tables.hooks.get(key)
        axes = stacked_axes(key, names, shape, config)
        kind = jnp.dtype("float32" if key.startswith(hugging_face.BIASES) else dtype)  # biases move by small steps
        leaves[place] = Stacked(shape, kind, names, axes, functools.partial(load, hook))
    return jax.tree_util.tree_leaves_with_path({"params": jax.tree.unflatten(treedef, leaves)})


def stacked_axes(key: str, names: Any, shape: Shape, config: Any) -> tuple[int, ...]:
    """Where MaxText stacks: experts and layers in front, layers alone along `param_scan_axis`, but those of biases."""
    depth = hf_utils.nesting_depth(names)
    scanned = config.scan_layers and len(shape) > config.param_scan_axis and not key.startswith(hugging_face.BIASES)
    return (config.param_scan_axis,) if depth == 1 and scanned else tuple(range(depth))


# The checkpoint -------------------------------------------------------------------------------------------------------


def begin(output: epath.Path, record: dict[str, Any]) -> set[tuple[str, ...]]:
    """Makes the output's folder -> paths of the arrays that an interrupted conversion by the same record left there.

    Raises:
      ConfigError: the folder holds anything else.
    """
    file = output / "conversion.json"
    if (output / "0").exists():
        raise ConfigError(f"--output {str(output)!r}: holds a checkpoint already; take another folder")
    if output.exists() and not file.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r}: exists and is not empty; take another folder")
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    written = resume(output / PARTIAL) if file.exists() and file.read_text() == text else set()
    if not written:
        for left in output.glob("unfinished*"):
            left.rmtree()
    file.write_text(text)
    return written


def resume(partial: epath.Path) -> set[tuple[str, ...]]:
    """Paths of the arrays in an unfinished checkpoint, from which the write that was cut off is removed.

    Empty where there is no such checkpoint, or one that was cut off while its writes were being made into one.
    """
    writes = list(partial.iterdir()) if partial.exists() else []
    if not all(write.name.startswith(PARTIAL) for write in writes):
        return set()
    written = set()
    for write in writes:
        if (write / "commit_success.txt").exists():
            arrays = json.loads((write / "state" / "_METADATA").read_text())["tree_metadata"].values()
            written |= {tuple(part["key"] for part in array["key_metadata"]) for array in arrays}
        else:
            write.rmtree()
    return written


def source_files(folder: pathlib.Path) -> dict[str, list[int]]:
    """Name -> size and time of change of the model's files: an interrupted conversion goes on with the same alone."""
    stats = {path.name: path.stat() for pattern in (WEIGHTS, "*.json") for path in sorted(folder.glob(pattern))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def batches(arrays: list[tuple[Any, Stacked]]) -> Iterator[list[tuple[Any, Stacked]]]:
    """Runs of arrays of at most BATCH bytes; a larger array is alone."""
    batch: list[tuple[Any, Stacked]] = []
    size = 0
    for path, array in arrays:
        if batch and size + array.nbytes > BATCH:
            yield batch
            batch, size = [], 0
        batch.append((path, array))
        size += array.nbytes
    if batch:
        yield batch


def save(
    output: epath.Path, arrays: list[tuple[Any, Stacked]], written: set[tuple[str, ...]], config: Any, console: Console
) -> None:
    """Writes the arrays as <output>/0/items, which appears when it is whole; those in `written` lie there already."""
    left = [(path, array) for path, array in arrays if tuple(part.key for part in path) not in written]
    if written:
        console.print(f"going on: {len(arrays) - len(left)} of {len(arrays)} arrays were written before")
    unfinished = output / "unfinished"
    context = upstream.checkpoint_context.build_context(
        use_ocdbt=config.checkpoint_storage_use_ocdbt,
        use_zarr3=config.checkpoint_storage_use_zarr3,
        ocdbt_target_data_file_size_bytes=CHUNK,
    )
    context.memory.deepcopy_host_arrays = False
    context.array.saving.scoped_storage_options_creator = stored_by_piece
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with context, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(array.nbytes for _, array in left))
        with written_by_piece(functools.partial(bar.advance, task)):
            for batch in batches(left):
                tree: dict[str, Any] = {}
                for path, array in batch:
                    *parents, last = (part.key for part in path)
                    node = tree
                    for parent in parents:
                        node = node.setdefault(parent, {})
                    node[last] = Pending.of(array) if array.nbytes > BATCH else array.whole()
                ocp.partial.save(unfinished, tree, custom_metadata={"scan_layers": config.scan_layers})
        ocp.partial.finalize(unfinished)
    (unfinished / "state").rename(unfinished / "items")  # orbax's name for a single tree; MaxText looks for its own
    unfinished.rename(output / "0")


def copy_tokenizer(folder: pathlib.Path, output: epath.Path) -> None:
    target = output / "tokenizer"
    target.mkdir(exist_ok=True)
    for pattern in TOKENIZER:
        for file in folder.glob(pattern):
            if file.is_file():
                (target / file.name).write_bytes(file.read_bytes())


# The command ----------------------------------------------------------------------------------------------------------


def next_commands(output: epath.Path, name: str, changed: dict[str, Any]) -> str:
    """How to train with the teacher, and how a student begins as it."""
    items = output / "0" / "items"
    given = ", ".join(f"{key}: {json.dumps(value)}" for key, value in changed.items())
    overriding = f" kd_teacher_overrides='{{{given}}}'" if changed else ""
    own = " ".join(f"{key}={json.dumps(value)}" for key, value in changed.items())
    own = f" override_model_config=true {own}" if changed else ""
    return (
        f"as a teacher:\n  python MaxText/train.py my_student.yml use_kd=true kd_teacher_parameters_path={items} "
        f"kd_teacher_model_name={name}{overriding}\n"
        f"as a student's beginning:\n  python MaxText/train.py my_student.yml load_parameters_path={items} "
        f"model_name={name}{own}\n"
        f"tokens, in my_student.yml:\n  tokenizer_type: huggingface\n  tokenizer_path: {output / 'tokenizer'}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Makes a teacher of a Hugging Face model: a checkpoint of MaxText's that holds its parameters.",
        epilog=f"Architectures: {', '.join(hugging_face.FAMILIES)}. docs/convert.md has more.",
    )
    parser.add_argument(
        "--hf", required=True, help="the model's folder (config.json, safetensors) or its name on the hub"
    )
    parser.add_argument("--output", required=True, help="a new folder, local or gs://")
    parser.add_argument(
        "--model-name",
        default="",
        help="MaxText's preset; by default the one that fits, and what differs is overridden",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="what the parameters are stored in; float32 (the default) loses nothing, bfloat16 takes half the disk",
    )
    parser.add_argument(
        "--unscanned",
        action="store_true",
        help="store layer by layer, for a student with scan_layers=false; as a teacher it compiles slowly",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    output = epath.Path(absolute(arguments.output))
    folder = fetch(arguments.hf)
    hf_config = read_config(folder)
    name, changed = hugging_face.choose(hf_config, arguments.model_name)
    config = maxtext_config(name, changed, not arguments.unscanned)
    arrays = lazy_arrays(folder, hf_config, config, arguments.dtype)
    record = {"hf": arguments.hf, "model_name": name, "overrides": changed, "dtype": arguments.dtype}
    record |= {"scan_layers": config.scan_layers, "files": source_files(folder)}
    try:
        written = begin(output, record)
        copy_tokenizer(folder, output)
        save(output, arrays, written, config, console)
    except (OSError, ValueError) as error:  # tensorstore's are of the second kind
        reason = first_line(error)
        raise failures.RunError(f"{output}: not converted ({reason}); the same command goes on from here") from error
    size = sum(array.nbytes for _, array in arrays)
    console.print(
        f"{hf_config.model_type} -> {name}, {size / 1e9:.3g} GB in {arguments.dtype}, {output / '0' / 'items'}"
    )
    console.print(next_commands(output, name, changed), markup=False)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """What went wrong as one line; status 2 for bad input, else 1."""
    try:
        yield
    except KeyboardInterrupt:
        leave("interrupted; start it again with the same command", 1)
    except ConfigError as error:
        leave(f"error: {error}", 2)
    except failures.RunError as error:
        leave(f"error: {error}", 1)


def leave(message: str, status: int) -> NoReturn:
    """At once: Orbax's threads would first go on with what they write, and tell of it."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    with errors_as_messages():
        main(sys.argv[1:])
