"""Writing a cache: batches of rows to the teacher, what it says of them to the disk.

Batches n and n + 1 are on the devices while batch n - 1 is packed and written. Each host writes the rows that it
has read, and all complete a file after the same batch, so that a killed caching goes on with all hosts at one place.
Left out on purpose: rows in which no token counts, which teach nothing.
"""

import collections
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

from MaxText.cache import codec, manifest, quantiser, row, shards
from MaxText.config.keys import Distillation
from MaxText.console import readable
from MaxText.data import evaluation, files, once, templates, tokens
from MaxText.distill.targets import Targets
from MaxText.loop import course, sanity, targets
from MaxText.loop import header as header_lib
from MaxText.loop import manifest as run_manifest
from MaxText.models.teacher import Teacher

# Of one host, in a file: what a kill costs at most.
TOKENS_PER_SHARD = 1 << 21
# In the position of a batch of which kd_cache_rows left rows out. It is a shard of its own, which is given up where
# more rows are wanted.
CUT = "cut"
# Bytes a token takes, roughly, by what is stored: for an estimate before there is any.
DRAWN, LIKELIEST = 0.55, 2.3

# Batches that are computed while one is packed. With one alone the devices wait wherever a batch takes long to read.
AHEAD = 2

# The settings that decide what the rows are, beside the files.
OF_DATA = ("dataset_type", "packing", "grain_packing_type", "max_segments_per_seq", "use_truncation", "use_sft",
           "sft_train_on_completion_only", "add_bos", "add_eos", "enable_data_shuffling", "data_shuffle_seed",
           "global_batch_size_to_load", "global_batch_size_to_load_eval", "train_data_columns", "eval_data_columns",
           "tokenize_train_data", "tokenize_eval_data", "formatting_func_path")  # fmt: skip


def contents_of(config: Any, kd: Distillation, teacher: Teacher) -> manifest.Contents:
    """What the cache will hold: the same for the same teacher, data and settings."""
    is_drawn = kd.kd_cache_mode == "sample"
    settings = {key: getattr(config, key) for key in OF_DATA}
    data = {key: getattr(value, "value", value) for key, value in settings.items()}
    data["chat_template"] = templates.identity(config)
    return manifest.Contents(
        teacher=manifest.Teacher(**run_manifest.identity(teacher)),
        tokenizer=tokens.identity(config),
        vocab_size=config.vocab_size,
        kd_vocab_size=kd.kd_vocab_size,
        temperature=kd.kd_temperature,
        mode=kd.kd_cache_mode,
        draws=kd.kd_cache_draws if is_drawn else 0,
        top_k=kd.kd_top_k,
        log_prob_bound=None if is_drawn else quantiser.BOUND,
        row_length=config.max_target_length,
        seed=config.data_shuffle_seed,
        data=data | {"files": files.listed(config)},
        computed_with={
            "kd_teacher_model_name": kd.kd_teacher_model_name or config.model_name,
            "kd_teacher_overrides": kd.kd_teacher_overrides,
        },
    )


def header(config: Any, kd: Distillation, teacher: Teacher, mesh: jax.sharding.Mesh, contents: Any) -> str:
    """What will be written, in a few lines."""
    rows, held_out = (rows_of_split(config, kd, split) for split in ("train", "eval"))
    extent = f"{rows:,} rows" if rows else "rows until the data ends"
    if config.eval_interval > 0:
        extent += f", {held_out:,} for evaluations" if held_out else ", all of the data for evaluations"
    kept = f"{contents.draws} draws" if contents.draws else f"the {contents.top_k} likeliest tokens"
    each = DRAWN * contents.draws + 6 if contents.draws else LIKELIEST * contents.top_k
    size = f"some {each:.0f} bytes a token"
    if rows:
        size += f", {readable(each * rows * config.max_target_length)} bytes for training at most"
    assert teacher.checkpoint is not None
    at = "" if teacher.checkpoint.step is None else f", step {teacher.checkpoint.step}"
    lines = [
        ("teacher", header_lib.model_text(teacher.config, nnx.filter_state(teacher.state, nnx.Param))),
        ("", f"from {teacher.checkpoint.root}{at}"),
        ("targets", f"{kept} a position at T = {contents.temperature:g} ({contents.mode})"),
        ("rows", f"{extent}; {header_lib.data_text(config)}"),
        ("cache", f"{kd.kd_cache_path}: {size}"),
        ("devices", header_lib.layout_text(mesh)),
    ]
    return "\n".join(f"{title:>8}  {text}" for title, text in lines)


# The step -------------------------------------------------------------------------------------------------------------

Step = Callable[[dict[str, np.ndarray]], Targets]


def jitted_step(config: Any, kd: Distillation, teacher: Teacher, mesh: jax.sharding.Mesh) -> Step:
    """A host's rows of a batch -> what the teacher says of all hosts' rows; returns before it is computed."""
    jitted = targets.jitted(config, kd, teacher, mesh)
    placed = targets.whole_rows(mesh)

    def step(batch: dict[str, np.ndarray]) -> Targets:
        keyed = batch | {targets.ROW_KEY: row_keys(batch)}
        with jax.set_mesh(mesh):
            return jitted(
                teacher.state,
                {name: jax.make_array_from_process_local_data(placed, array) for name, array in keyed.items()},
            )

    return step


def row_keys(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Of each row a number that is the same wherever in the data it stands: [B], uint32."""
    arrays = [np.ascontiguousarray(batch[name], dtype=np.int32) for name in row.TOKENS]
    return np.array([zlib.crc32(b"".join(part.tobytes() for part in parts)) for parts in zip(*arrays, strict=True)],
                    dtype=np.uint32)  # fmt: skip


def own_rows(found: Targets) -> Targets:
    """This host's rows, in the order in which it gave them."""

    def of(array: jax.Array) -> np.ndarray:
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(of, found)


def rows_of(batch: dict[str, np.ndarray], found: Targets) -> Iterator[row.Row]:
    """The rows of a batch in which a token counts."""
    for index in np.flatnonzero((batch["targets_segmentation"] != 0).any(axis=1)):
        yield row_of(batch, found, int(index))


def row_of(batch: dict[str, np.ndarray], found: Targets, index: int) -> row.Row:
    own = {name: batch[name][index] for name in row.TOKENS}
    said = jax.tree.map(lambda array: array[index], found)
    both = said.target_log_prob, said.entropy
    if said.log_probs is None:
        return row.of_draws(own, said.ids, *both)
    return row.of_top_k(own, said.ids, said.log_probs, said.log_tail, *both)


# The rows -------------------------------------------------------------------------------------------------------------


def write_split(config: Any, kd: Distillation, split: str, reader: Any, step: Step, folder: Path) -> None:
    """Writes what is missing of a split.

    Raises:
      ConfigError: the folder holds what cannot be gone on with; or the teacher is broken.
      RunError: the data cannot be read, or the folder not written.
    """
    hosts, host = jax.process_count(), jax.process_index()
    limit = share_of(rows_of_split(config, kd, split), host, hosts)
    per_shard = max(TOKENS_PER_SHARD // reader.empty["targets"].size, 1)
    writer = shards.Writer(folder, split, batches_per_shard=per_shard, host=host, hosts=hosts)
    if limit and common(limit - writer.rows, largest=True) <= 0:
        return
    go_back(writer)
    is_first = writer.batches == 0
    with course.shown(split, limit * hosts, writer.rows * hosts) as advance:
        for read, found in launched_ahead(once.batches(config, split, reader, writer.position), step):
            said = own_rows(found)
            if is_first:
                look(config, kd, read.batch, said)
                is_first = False
            rows = list(rows_of(read.batch, said))
            room = limit - writer.rows if limit else len(rows)
            if room > 0 or not limit:  # a host that has its share only keeps the others company
                is_cut = len(rows) > room
                records = [codec.encode(each) for each in rows[:room]]
                counted = [int(each.counts_at.sum()) for each in rows[:room]]
                if is_cut:
                    writer.close()
                writer.write(records, counted, read.position | ({CUT: True} if is_cut else {}))
                advance(hosts, counted, records)
            if limit and common(limit - writer.rows, largest=True) <= 0:
                break
    writer.close()


def rows_of_split(config: Any, kd: Distillation, split: str) -> int:
    """How many rows of all hosts are written: those of the batches that an evaluation reads; 0: all that there are."""
    if split == "train":
        return kd.kd_cache_rows
    return max(config.eval_steps, 0) * config.global_batch_size_to_load_eval


def go_back(writer: shards.Writer) -> None:
    """To where all hosts can go on: behind a batch of which all rows were written, the same on each."""
    is_cut = writer.position is not None and CUT in writer.position
    if evaluation.any_host(is_cut):
        # The manifest names what is given up; killed before it is written again, the split would lack a file.
        if jax.process_index() == 0:
            manifest.reopen(writer.folder.parent, writer.folder.name)
        evaluation.any_host(False)  # the others wait for that
    if is_cut:
        writer.go_back_to(writer.batches - 1)
    while (least := common(writer.batches)) < common(writer.batches, largest=True):
        writer.go_back_to(least)


def launched_ahead(batches: Iterator[once.Read], step: Step) -> Iterator[tuple[once.Read, Targets]]:
    """Each batch with what the teacher says of it, the next ones being computed meanwhile."""
    launched: collections.deque[tuple[once.Read, Targets]] = collections.deque()
    for read in batches:
        launched.append((read, step(read.batch)))
        if len(launched) > AHEAD:
            yield launched.popleft()
    yield from launched


def common(number: int, *, largest: bool = False) -> int:
    """The least, or the largest, of all hosts' numbers."""
    if jax.process_count() == 1:
        return number
    found = multihost_utils.process_allgather(np.array(number))
    return int(found.max() if largest else found.min())


def share_of(rows: int, host: int, hosts: int) -> int:
    return rows // hosts + (host < rows % hosts)


def look(config: Any, kd: Distillation, batch: dict[str, np.ndarray], said: Targets) -> None:
    """At the first batch: is the teacher one?"""
    counts = batch["targets_segmentation"] != 0
    if counts.any():
        sanity.check(config, kd, None, float(-said.target_log_prob[counts].mean()), "the first batch")


def show(found: manifest.Manifest) -> None:
    """The table of what has been written."""
    table = Table("split", "rows", "tokens", "bytes", "bytes a token", "files", box=None, pad_edge=False)
    for name, split in found.splits.items():
        table.add_row(
            name,
            f"{split.rows:,}",
            f"{split.tokens:,}",
            f"{split.bytes:,}",
            f"{split.bytes_per_token:.1f}",
            f"{len(split.shards)}",
        )
    Console(soft_wrap=True).print(table)
