"""What ends a conversion or an export early, as one message."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from MaxText.config.keys import ConfigError
from MaxText.console import RunError


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """What went wrong as one line; status 2 for bad input, else 1."""
    try:
        yield
    except KeyboardInterrupt:
        leave("interrupted; start it again with the same command", 1)
    except ConfigError as error:
        leave(f"error: {error}", 2)
    except RunError as error:
        leave(f"error: {error}", 1)


def leave(message: str, status: int) -> NoReturn:
    """At once: Orbax's threads would first go on with what they write, and tell of it."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
