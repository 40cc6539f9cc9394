"""Evaluation data, whole: every row of it reaches the evaluation step, once, whatever the batch, pipeline or hosts are.

MaxText's pipelines read evaluation data in batches of the training's size (grain) or drop a last batch that is not
full (hf, tfds), and its step keeps the first rows of what was read. Here they read batches of the evaluation's size,
the last one is filled up with rows that do not count, hosts go on until the data of all of them has ended, and what
counts does not depend on how rows were packed. Left out on purpose: synthetic data, which never ends.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import grain.python as grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from MaxText import upstream

Batch = dict[str, Any]

# The pipelines that drop a last batch that is not full -> their modules.
DROPPING = {"hf": "hf_data_processing", "tfds": "tfds_data_processing"}


def within_documents(batch: Batch) -> Batch:
    """The batch without the targets that are the first token of the next document in a packed row.

    How many there are depends on how documents were packed; no document says what comes after it.
    """
    segments = batch["targets_segmentation"]
    return batch | {"targets_segmentation": np.where(segments == batch["inputs_segmentation"], segments, 0)}


def all_of_it(batch: Batch) -> Batch:
    return batch


class FullBatches:
    """A host's batches: each of all its rows, and as many batches as the host with the most data has.

    What fills them up are zeros, which are no target anywhere: their segmentation is 0.

    Args:
      batches: what the pipeline makes.
      empty: a batch in which nothing counts.
      counted: what of a batch's targets counts.
    """

    def __init__(self, batches: Iterable[Batch], empty: Batch, counted: Callable[[Batch], Batch] = within_documents):
        self.batches = batches
        self.empty = empty
        self.counted = counted
        self.reading: Any = None  # what the batches come from
        self.begin: Any = None  # a state of it to go on from

    @property
    def state(self) -> Any:
        """Where the data stands after the last batch, in JSON's types; None for a pipeline that cannot go on there.

        grain's data sets can. Its loaders give the number of a row, of which hf's streams know nothing.
        """
        return self.reading.get_state() if isinstance(self.reading, grain.DatasetIterator) else None

    def __iter__(self) -> Iterator[Batch]:
        # TensorFlow's data sets give tensors otherwise.
        given = self.batches.as_numpy_iterator() if hasattr(self.batches, "as_numpy_iterator") else self.batches
        batches: Any = iter(given)
        self.reading = batches
        if self.begin is not None:
            batches.set_state(self.begin)
        empty = self.empty
        try:
            while True:
                batch = next(batches, None)
                if not any_host(batch is not None):
                    return
                if batch is not None:
                    rows = len(self.empty["targets"])
                    batch = self.counted({key: filled(np.asarray(value), rows) for key, value in batch.items()})
                    empty = {key: np.zeros_like(value) for key, value in batch.items()}
                yield empty if batch is None else batch
        finally:
            upstream.multihost_dataloading._close_iterator(batches)


def filled(value: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(value, [(0, rows - len(value)), *[(0, 0)] * (value.ndim - 1)])


def any_host(has: bool) -> bool:
    """Whether it is so on any host; all of them ask."""
    return has if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(has)).any())


@contextlib.contextmanager
def read_whole(training: bool = False) -> Iterator[None]:
    """Around the set-up of a run's data: evaluation data is made by the rules of this module.

    Args:
      training: the data for training is, too, but that all its targets count.
    """
    interface = upstream.input_pipeline_interface
    original = interface.create_process_specific_iterator

    def create(config: Any, mesh: Any, processes: Any, make: Callable, is_training: bool = True) -> Any:
        if is_training and not training:
            return original(config, mesh, processes, make)
        if is_training:
            with whole_batches(config, is_eval=False):
                return original(config, mesh, processes, make)
        # grain's and olmo's pipelines know no other batch than the training's.
        sized = upstream.with_settings(config, global_batch_size_to_load=config.global_batch_size_to_load_eval)
        with whole_batches(config, is_eval=True):
            return original(sized, mesh, processes, make, is_training=False)

    with mock.patch.object(interface, "create_process_specific_iterator", create):
        yield


@contextlib.contextmanager
def whole_batches(config: Any, is_eval: bool) -> Iterator[None]:
    """While a pipeline is made: a last batch that is not full is kept and filled up."""
    loading = upstream.multihost_dataloading
    iterator = loading.MultiHostDataLoadIterator
    shapes = upstream.maxtext_utils.get_shaped_batch(config, is_eval=is_eval)
    empty = {key: np.zeros((x.shape[0] // jax.process_count(), *x.shape[1:]), x.dtype) for key, x in shapes.items()}
    counted = within_documents if is_eval else all_of_it

    def load(batches: Iterable[Batch], mesh: Any, *settings: Any, **more: Any) -> Any:
        return iterator(FullBatches(batches, empty, counted), mesh, *settings, **more)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loading, "MultiHostDataLoadIterator", load))
        if config.dataset_type in DROPPING:
            pipeline = getattr(upstream, DROPPING[config.dataset_type])
            keeping = functools.partial(pipeline.preprocessing_pipeline, drop_remainder=False)
            stack.enter_context(mock.patch.object(pipeline, "preprocessing_pipeline", keeping))
        yield
