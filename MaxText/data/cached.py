"""A student's data out of a cache of its teacher's targets: rows that are made, in the place of documents.

MaxText's grain pipeline reads them: its shuffling, epochs, hosts, workers and saved positions are those of any data.
What is put in its place is the source, rows by their number, and what it does to documents, which is nothing here.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import grain.python as grain
import jax
import numpy as np

from MaxText import upstream
from MaxText.cache import decoding, manifest
from MaxText.config.keys import ConfigError, Distillation
from MaxText.data import ahead, tokens

Shapes = dict[str, jax.ShapeDtypeStruct]
SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class Cached:
    """A cache as a run reads it.

    Attributes:
      folder: where it lies.
      contents: what it holds, of which teacher; None for shapes without values.
      temperature: of the stored weights.
      slots: stored tokens of a position that a batch has room for.
      has_tail: whether a batch tells the mass of the others.
      vocabulary: the student's.
      rows: of the training data, how many are read; 0: all.
      files: of each split that is read, by name, the SHA-256 of each; None for shapes without values.
    """

    folder: Path
    contents: manifest.Contents | None
    temperature: float
    slots: int
    has_tail: bool
    vocabulary: int
    rows: int = 0
    files: dict[str, dict[str, str]] | None = None

    def beside(self, batch: Shapes) -> Shapes:
        """The shapes of a batch, with those of the targets in it."""
        shape, place = batch["targets"].shape, batch["targets"].sharding
        number = functools.partial(jax.ShapeDtypeStruct, shape, np.float32, sharding=place)
        per_slot = (*shape, self.slots)
        targets = {
            "teacher_ids": jax.ShapeDtypeStruct(per_slot, np.int32, sharding=place),
            "teacher_log_weights": jax.ShapeDtypeStruct(per_slot, np.float32, sharding=place),
            "teacher_target_log_prob": number(),
            "teacher_entropy": number(),
        }
        return batch | targets | ({"teacher_log_tail": number()} if self.has_tail else {})


def shaped_batch(config: Any, cached: Cached | None, **how: Any) -> Shapes:
    """The shapes of a run's batches; `how` is the engine's."""
    batch = upstream.maxtext_utils.get_shaped_batch(config, **how)
    return batch if cached is None else cached.beside(batch)


def assumed(config: Any, kd: Distillation) -> Cached | None:
    """A cache as the keys for writing one have it, for a compilation without it.

    Raises:
      ConfigError: it would be none for this run.
    """
    if not kd.is_cached:
        return None
    check_divergence(kd, kd.kd_cache_mode)
    has_tail = kd.kd_cache_mode == "top_k"
    slots = kd.kd_top_k if has_tail else kd.kd_cache_draws
    return Cached(Path(kd.kd_cache_path), None, kd.kd_temperature, slots, has_tail, config.vocab_size)


def find(config: Any, kd: Distillation) -> Cached | None:
    """The cache that a run learns from; None where it learns from a teacher, or from none.

    Raises:
      ConfigError: there is none, it is damaged, or it is not one for this run.
    """
    if not kd.is_cached:
        return None
    folder = Path(kd.kd_cache_path)
    splits = SPLITS if config.eval_interval > 0 else SPLITS[:1]
    try:
        checked = {split: manifest.check(folder, split).splits[split] for split in splits}
    except ConfigError as error:  # of a file
        raise ConfigError(f"kd_cache_path={kd.kd_cache_path}: {error}") from error
    files = {split: {shard.name: shard.sha256 for shard in of.shards} for split, of in checked.items()}
    found = manifest.read(folder)
    check_fits(config, kd, found.contents)
    rows = found.splits["train"].rows
    wanted = {"kd_cache_rows": kd.kd_cache_rows, "global_batch_size_to_load": config.global_batch_size_to_load}
    for key, value in wanted.items():
        if value > rows:
            raise ConfigError(f"{key}={value}: kd_cache_path={kd.kd_cache_path} holds {rows} rows")
    contents = found.contents
    slots = kd.kd_top_k or contents.slots
    has_tail = contents.mode == "top_k"
    return Cached(folder, contents, contents.temperature, slots, has_tail, config.vocab_size, kd.kd_cache_rows, files)


def evaluated_on_less(config: Any, cached: Cached | None) -> str:
    """A warning where evaluations ask for more rows than the cache holds, or "": its own run may have read fewer."""
    if cached is None or cached.contents is None or config.eval_interval <= 0:
        return ""
    wanted = config.eval_steps * config.global_batch_size_to_load_eval
    held = manifest.read(cached.folder).splits["eval"].rows
    if wanted <= held:
        return ""
    return (
        f"eval_steps={config.eval_steps}: {wanted:,} rows are asked for, {cached.folder} holds {held:,} for evaluations"
    )


def learned_from(kd: Distillation, cached: Cached | None) -> Distillation:
    """The settings with the truncation that comes with the cache's targets."""
    return kd if cached is None or not cached.has_tail else kd.model_copy(update={"kd_top_k": cached.slots})


def check_divergence(kd: Distillation, mode: str) -> None:
    if mode == "sample" and kd.kd_divergence != "forward_kl":
        raise ConfigError(
            f"kd_divergence={kd.kd_divergence}: kd_cache_path={kd.kd_cache_path} holds draws, an unbiased teacher for "
            "forward_kl alone, which is linear in it; allowed is forward_kl, or a cache of kd_cache_mode=top_k"
        )


def check_fits(config: Any, kd: Distillation, contents: manifest.Contents) -> None:
    """Raises ConfigError, naming the key, where the cache's targets are none for this student."""
    check_divergence(kd, contents.mode)
    where = f"kd_cache_path={kd.kd_cache_path}"
    wanted = {
        "max_target_length": (config.max_target_length, contents.row_length),
        "kd_vocab_size": (kd.kd_vocab_size, contents.kd_vocab_size),
    }
    if not contents.kd_vocab_size:
        wanted["vocab_size"] = (config.vocab_size, contents.vocab_size)
    for key, (value, stored) in wanted.items():
        if value != stored:
            raise ConfigError(f"{key}={value:g}: {where} was made with {stored:g}; set that, or cache anew")
    is_inside = contents.mode == "top_k" and kd.kd_truncation_strategy == "renormalize"
    if kd.kd_temperature != contents.temperature and not is_inside:
        why = "draws are from that distribution alone"
        if contents.mode == "top_k":
            why = (
                f"kd_truncation_strategy={kd.kd_truncation_strategy} needs the mass outside at T; renormalize does not"
            )
        raise ConfigError(
            f"kd_temperature={kd.kd_temperature:g}: {where} was made with {contents.temperature:g} ({why}); set that, "
            "or cache anew"
        )
    if contents.mode == "sample" and kd.kd_top_k:
        raise ConfigError(f"kd_top_k={kd.kd_top_k}: {where} holds draws, of which none is left out; allowed is 0")
    if contents.mode == "top_k" and kd.kd_top_k > contents.top_k:
        raise ConfigError(f"kd_top_k={kd.kd_top_k}: {where} holds {contents.top_k} tokens a position at most")
    identity = tokens.identity(config)
    if contents.tokenizer and identity and identity != contents.tokenizer:
        raise ConfigError(
            f"tokenizer_path={config.tokenizer_path!r}: {where} was made with another tokenizer: a token id means "
            "another token there"
        )


def check_same_teacher(kd: Distillation, cached: Cached, fingerprint: str) -> None:
    """Raises ConfigError where the teacher that evaluations run is not the one that the student learns from."""
    assert cached.contents is not None
    stored = cached.contents.teacher
    if fingerprint != stored.fingerprint:
        raise ConfigError(
            f"kd_teacher_parameters_path={kd.kd_teacher_parameters_path!r}: fingerprint {fingerprint}, but "
            f"kd_cache_path={kd.kd_cache_path} holds the targets of {manifest.described(stored)}; take that one (and "
            "the kd_teacher_dtype that it was held in), or none"
        )


@contextlib.contextmanager
def read_instead(config: Any, cached: Cached | None) -> Iterator[None]:
    """Around what opens a run's data: the rows of `cached`, if there is one."""
    if cached is None:
        yield
        return
    module, shapes, loading = upstream.grain_data_processing, upstream.maxtext_utils, upstream.multihost_dataloading
    # For each row grain looks at all those that it reads ahead. They lie on this machine: two batches are enough.
    buffered = 2 * upstream.data_processing_utils.get_local_batch_size(config)
    with (
        mock.patch.object(module, "get_datasets", functools.partial(rows_of, cached, buffered)),
        mock.patch.object(module, "pretrain_preprocessing_pipeline", batched),
        mock.patch.object(loading, "MultiHostDataLoadIterator", ahead.engines_iterator()),
        # A host without a row of its own has batches of these shapes.
        mock.patch.object(shapes, "get_shaped_batch", functools.partial(shaped, cached, shapes.get_shaped_batch)),
    ):
        yield


def shaped(cached: Cached, get_shaped_batch: Callable[..., Shapes], *arguments: Any, **how: Any) -> Shapes:
    return cached.beside(get_shaped_batch(*arguments, **how))


def rows_of(
    cached: Cached,
    buffered: int,
    *files: Any,
    split: str,
    dataloading_host_index: int,
    dataloading_host_count: int,
    grain_prefetch_buffer_size: int,
    **settings: Any,
) -> Any:
    """In the place of the engine's `get_datasets`: the rows that this host reads, in the order in which it does."""
    first = cached.rows if split == "train" else 0
    kept = {"slots": cached.slots, "vocabulary": cached.vocabulary}
    source = decoding.StudentRows(cached.folder, split, first=first, hosts=dataloading_host_count, **kept)
    order = {name: settings[name] for name in ("shuffle", "shuffle_seed", "num_epoch", "grain_num_threads")}
    return upstream.grain_data_processing._apply_mapdataset_transforms(
        dataset=grain.MapDataset.source(source),
        dataloading_host_index=dataloading_host_index,
        dataloading_host_count=dataloading_host_count,
        grain_prefetch_buffer_size=min(grain_prefetch_buffer_size, buffered),
        **order,
    )


def batched(
    dataset: Any,
    config: Any,
    data_columns: Any,
    tokenize: bool,
    grain_worker_count: int,
    grain_per_worker_buffer_size: int,
) -> Any:
    """In the place of what the engine does to documents. A last batch is filled up with zeros, which do not count."""
    module = upstream.data_processing_utils
    rows = module.get_local_batch_size(config)
    batch = functools.partial(grain.experimental.batch_and_pad, batch_size=rows, pad_value=0)
    dataset = dataset.batch(rows, batch_fn=batch)
    return module.apply_multiprocessing_and_prefetch(dataset, config, grain_worker_count, grain_per_worker_buffer_size)
