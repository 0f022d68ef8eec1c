"""A folder that is there whole or not at all, and what conversions that were killed have left beside it."""

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from llm_jax.errors import UserError
from llm_jax.training.streamed import flush

LOCK = "converting.lock"  # in the folder round a half-made one: locked for as long as its process lives


def refuse_existing(to: str) -> None:
    if os.path.lexists(to):
        raise UserError(f"--to={to}: it exists already; give a new folder, nothing is overwritten")


@contextlib.contextmanager
def new_folder(to: str) -> Iterator[Path]:
    """A folder beside `to` that gets its name when all has gone well, and goes when anything has not.

    It lies in one of a name that nobody else has: other conversions, and what the user keeps there, stay as they are.
    """
    parent, name = os.path.split(to)
    try:
        os.makedirs(parent or ".", exist_ok=True)
        remove_dead(Path(parent or "."), name)
        around = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=parent or "."))
    except OSError as error:
        raise UserError(f"--to={to}: nothing can be written there ({error.strerror})") from None
    try:
        with _locked(around):
            folder = around / name
            folder.mkdir()  # with the usual permissions: mkdtemp's are its owner's alone
            yield folder
            flush(folder)
            refuse_existing(to)
            os.rename(folder, to)
    except OSError as error:
        raise UserError(f"--to={to}: it could not be written ({error}); nothing was kept") from error
    finally:
        shutil.rmtree(around, ignore_errors=True)


@contextlib.contextmanager
def _locked(around: Path) -> Iterator[None]:
    """Hold the folder's lock: the system drops it when this process ends, however it ends."""
    with open(around / f"{LOCK}.new", "w", encoding="utf-8") as stream:
        stream.write(f"{socket.gethostname()}\n{os.getpid()}\n")
        stream.flush()
        with contextlib.suppress(OSError):  # this file system has no locks, so what a killed process leaves stays
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(around / f"{LOCK}.new", around / LOCK)  # nobody finds it before it is locked
        yield


def remove_dead(parent: Path, name: str) -> None:
    """Remove what conversions to `name` that were killed have left, and say so; one that lives is not touched."""
    for path in sorted(path for path in parent.iterdir() if path.name.startswith(f"{name}.partial-")):
        if not (path / LOCK).exists():  # not ours, or not locked yet
            continue
        try:
            with open(path / LOCK, "r+", encoding="utf-8") as stream:  # NFS gives locks to those who may write alone
                told = _remove_if_dead(path, stream)
        except FileNotFoundError:  # it has ended since
            continue
        except OSError as error:  # another user's, or locks that do not work
            told = f"note: {path} is a half-made conversion, and stays ({error.strerror}): remove it if that has ended"
        if told:
            print(told, file=sys.stderr)


def _remove_if_dead(path: Path, stream: TextIO) -> str:
    """What there is to say of it."""
    host, _, process = stream.read().strip().partition("\n")
    if host != socket.gethostname():  # whose locks may not be seen here
        why = f"it is of process {process} on {host}: remove it if that has ended"
        return f"note: {path} is a half-made conversion, and stays: {why}"
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # it lives
        return ""
    shutil.rmtree(path)
    return f"note: removed {path}, left by a conversion that was killed (process {process})"
