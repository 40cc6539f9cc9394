"""A batch that lies on the devices before it is asked for: a thread makes and places it while a step is computed.

The position is that of the last batch that was taken: a checkpoint knows nothing of the one ahead. Each host places its
own part and waits for no other. Left out on purpose: evaluations, the options with which a host makes up batches, and
grain's own thread, which stands in its queue until the program ends, and then ends the program with a signal.
"""

import copy
import functools
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grain.python as grain
import jax

from MaxText import upstream


class Ahead(grain.DatasetIterator):
    """An iterator of grain's, whose next element a thread makes from `start_prefetch` on.

    Args:
      reading: where the elements come from. Nothing else reads there.
      made: what becomes of each.
    """

    def __init__(self, reading: grain.DatasetIterator, made: Callable[[Any], Any]):
        super().__init__(reading)
        self.reading, self.made = reading, made
        self.position = copy.deepcopy(reading.get_state())
        self.thread = futures.ThreadPoolExecutor(1, "ahead")
        self.coming: futures.Future[tuple[Any, Any]] | None = None

    def __next__(self) -> Any:
        coming = self.coming or self.thread.submit(self.another)
        self.coming = None
        element, self.position = coming.result()
        return element

    def start_prefetch(self) -> None:
        if self.coming is None:
            self.coming = self.thread.submit(self.another)

    def another(self) -> tuple[Any, Any]:
        element = self.made(next(self.reading))
        return element, copy.deepcopy(self.reading.get_state())

    def get_state(self) -> Any:
        return self.position

    def set_state(self, state: Any) -> None:
        self.give_up()
        self.reading.set_state(state)
        self.position = copy.deepcopy(self.reading.get_state())

    def close(self) -> None:
        self.give_up()
        self.thread.shutdown()
        super().close()

    def give_up(self) -> None:
        """What is ahead, whatever comes of it."""
        if self.coming is not None:
            futures.wait([self.coming])
            self.coming = None


def begin(iterator: Any) -> None:
    """Makes the next batch of the engine's iterator, where it is one of those that do so ahead.

    To be called when a step has been dispatched: before that the thread would hold the interpreter while the loop asks
    for it, and the step would come later.
    """
    if isinstance(iterator, engines_iterator()) and iterator.is_ahead:
        iterator.local_iterator.start_prefetch()


@functools.cache
def engines_iterator() -> Any:
    """In the place of the engine's `MultiHostDataLoadIterator`: the same, of batches that have been placed."""
    loading = upstream.multihost_dataloading
    iterator: Any = loading.MultiHostDataLoadIterator

    class Placed(iterator):
        def __init__(self, batches: Any, mesh: Any, made_up: bool = False, expansion_loading_factor_for_grain: int = 1):
            self.is_ahead = isinstance(batches, grain.IterDataset) and not made_up
            self.is_ahead &= expansion_loading_factor_for_grain <= 1
            super().__init__(batches, mesh, made_up, expansion_loading_factor_for_grain)
            if self.is_ahead:
                self.local_iterator = self.ahead()

        def reset(self) -> None:
            super().reset()
            if self.is_ahead:
                self.local_iterator = self.ahead()

        def ahead(self) -> Ahead:
            form = functools.partial(loading._form_global_array, global_mesh=self.global_mesh)
            return Ahead(self.local_iterator, functools.partial(jax.tree_util.tree_map_with_path, form))

        def _get_next_batch_sharded(self) -> Any:
            return next(self.local_iterator) if self.is_ahead else super()._get_next_batch_sharded()

    return Placed
