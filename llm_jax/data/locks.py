"""One writer at a time for a folder of the cache, across processes and, where the file system allows it, machines."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator

from llm_jax.errors import DataError


@contextlib.contextmanager
def locked(path: str, note: Callable[[str], None]) -> Iterator[None]:
    """Waits for the lock file's lock. The system drops it when its owner ends, however that ends, so a lock is never
    stale; the process id in the file is only for the message."""
    with open(path, "a+", encoding="utf-8") as stream:
        if not _try_lock(stream, path):
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            note(f"Waiting for {owner}, which is preparing the same data ({path}).")
            while not _try_lock(stream, path):
                time.sleep(0.2)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def _try_lock(stream, path: str) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise DataError(
                f"The file system of {path} has no locks, so that two runs could spoil each other's data: "
                "set data.cache_dir to a folder on another one."
            ) from error
        raise
    return True
