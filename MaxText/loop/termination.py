"""A termination signal is noted, and obeyed after the step at hand: the loop saves that step and leaves with status 0.

Schedulers send SIGTERM some time before they take a machine away. Where several hosts run under jax.distributed, its
coordination service takes the signal and agrees with the other hosts on the step to stop after; upstream asks it at
every step. A single process has no such service, and would die where it stands: for it the handler here is set. Left
out on purpose: signals that arrive before the loop, when there is nothing to save.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax


class Notice:
    """Whether the signal has come."""

    received = False


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """Notes SIGTERM instead of dying of it, as long as the context lasts."""
    notice = Notice()
    # Handlers belong to the main thread; and jax.distributed has one of its own.
    if jax.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield notice
        return
    owner = os.getpid()

    def note(number: int, frame: Any) -> None:
        if os.getpid() == owner:
            notice.received = True
            return
        # A data worker, forked with this handler in it: it must die when the pipeline terminates it.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, before)
