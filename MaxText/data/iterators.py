"""The end of the input pipelines: their worker processes and shared memory go with the run, without a word."""

import contextlib
import sys
import warnings
from collections.abc import Iterator

from MaxText import upstream

TRACKER_IS_SILENT = "ignore:resource_tracker:UserWarning"


@contextlib.contextmanager
def closed_at_the_end() -> Iterator[None]:
    """Around a run: every iterator that it opened is closed when it ends, unless it fails.

    MaxText closes them in a finalizer, which runs when the interpreter is half gone and fails on grain's iterators. A
    reader that has failed may never end, so after a failure nothing is waited for.
    """
    # Batches that workers have made and nobody has read are cleaned up by Python's tracker, which gets these options.
    if TRACKER_IS_SILENT not in sys.warnoptions:
        sys.warnoptions.append(TRACKER_IS_SILENT)
    loading = upstream.multihost_dataloading
    loading.MultiHostDataLoadIterator.__del__ = lambda self: None
    with warnings.catch_warnings():
        # An iterator that is collected as garbage is closed at any time, that of the tracker's own work too.
        warnings.filterwarnings("ignore", message="ResourceTracker called reentrantly")
        try:
            yield
        except Exception:
            raise
        except BaseException:  # interrupted
            close_all()
            raise
        close_all()


def close_all() -> None:
    loading = upstream.multihost_dataloading
    for opened in list(loading._GLOBAL_MULTIHOST_ITERATORS):
        loading._close_iterator(opened.local_iterator)
        opened.last_local_data = None  # lies in shared memory
