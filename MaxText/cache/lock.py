"""One caching at a time in a folder, on one machine: two would write each other's files.

The lock is on the folder itself: it leaves no file, and goes with the process that has it. Left out on purpose: other
machines, and file systems without locks, where nobody is stopped.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from MaxText.config.keys import ConfigError


@contextlib.contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """While no other process writes a cache in `folder`, which is made if need be; else raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"kd_cache_path={folder}: cannot be written ({error.strerror or error})") from error
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"kd_cache_path={folder}: {holder(opened)} is writing it; wait for that, or take another folder"
            ) from error
        except OSError:  # there are no locks here
            pass
        yield
    finally:
        os.close(opened)


def holder(opened: int) -> str:
    """The process that has the lock, where Linux tells: "1: FLOCK ADVISORY WRITE <process> <device>:<inode> 0 EOF"."""
    inode = os.fstat(opened).st_ino
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            kind, process, place = (line.split()[index] for index in (1, 4, 5))
            if kind == "FLOCK" and place.rpartition(":")[2] == str(inode) and int(process) > 0:
                return f"process {process}"
    return "another process"
