"""A run's folder: what it holds besides checkpoints and metrics, and the lock that keeps it to one run at a time.

config.json       the resolved config; `--config=RUN/config.json` runs it again
tokenizer/        as the tokenizer saves itself
labels.json       names of the labels by id, of a task that has labels
parameters.json   path, shape, dtype and logical axes of every parameter
sessions.json     one entry a start: versions, git revision, machine
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llm_jax import __version__, distributed
from llm_jax import config as configs
from llm_jax.errors import ConfigError, UserError
from llm_jax.sharding import path_name

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu")

MAY_CHANGE = (  # keys (with *) that a run may go on with changed
    "name", "log.*", "eval.*", "checkpoint.*", "generate.*", "mesh.*", "data.prefetch", "data.workers",
    "data.cache_dir", "train.max_bad_steps", "train.per_device_batch_size", "train.accumulation", "model.remat",
    "model.remat_save", "model.attention_kernel", "optim.offload", "train.loss_chunk",
)  # fmt: skip
MAY_GROW = ("train.steps", "train.tokens", "train.epochs")


@dataclasses.dataclass(frozen=True)
class Description:
    """What `read` finds: the config as nested dicts, {path: {"shape", "dtype", "axes"}}, and the sessions so far."""

    config: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    sessions: list[dict[str, Any]]


def write(workdir: str | os.PathLike[str], config: Mapping[str, Any], tokenizer: Any, shapes: Any, axes: Any,
          labels: Sequence[str] = ()) -> None:  # fmt: skip
    """Describe the run in its folder (the main process does); every file is whole or not there.

    Args:
      config: the resolved config (`config.to_dict`).
      tokenizer: has `save(folder)` and `identity()`; kept as it is when the run goes on.
      shapes: parameters as a tree of ShapeDtypeStruct.
      axes: the same tree of logical axes.
      labels: their names by id, where the task has labels.

    Raises:
      UserError: the folder cannot be written, or holds another tokenizer.
    """
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(shapes),
        jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    )
    parameters = {
        path_name(path): {"shape": x.shape, "dtype": str(x.dtype), "axes": names} for (path, x), names in leaves
    }
    distributed.on_main(lambda: _write(Path(workdir), config, parameters, tokenizer, labels))


def _write(
    folder: Path, config: Mapping[str, Any], parameters: Mapping[str, Any], tokenizer: Any, labels: Sequence[str]
) -> None:
    sessions = _read_json(folder / "sessions.json") if (folder / "sessions.json").exists() else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
        write_json(folder / "parameters.json", parameters)
        if labels:
            write_json(folder / "labels.json", list(labels))
        write_json(folder / "sessions.json", [*sessions, _session()])
        _write_tokenizer(folder / "tokenizer", tokenizer)
    except OSError as error:
        raise UserError(f"the work directory {folder} cannot be written: {error}") from None


def read(workdir: str | os.PathLike[str]) -> Description:
    """The description of a run. Raises UserError where a file is missing or damaged, naming it."""
    folder = Path(workdir)
    return Description(*(_read_json(folder / f"{name}.json") for name in ("config", "parameters", "sessions")))


def read_labels(workdir: str | os.PathLike[str]) -> tuple[str, ...]:
    """The labels' names by id; none where the run's task has none."""
    path = Path(workdir) / "labels.json"
    return tuple(_read_json(path)) if path.exists() else ()


def check_same_config(
    workdir: str | os.PathLike[str], config: Mapping[str, Any], allowed: Sequence[str] = MAY_CHANGE
) -> None:
    """Refuse to go on in a folder whose run had another config.

    Args:
      config: the resolved config that is to run there.
      allowed: keys that may differ, "log.*" standing for all of a group. Durations may grow.

    Raises:
      UserError: with each key that differs, its old and its new value.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        return
    try:
        old, new = configs.from_dict(_read_json(path)), configs.from_dict(config)
    except ConfigError as error:
        raise UserError(f"{path} cannot be read by this version: {error}") from None
    changed = [
        f"  {key}: {before!r} there, {now!r} here"
        for key, before, now in configs.differences(old, new)
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed)
        and not (key in MAY_GROW and before and now and now >= before)
    ]
    if changed:
        listed = "\n".join(changed)
        raise UserError(
            f"{path.parent} belongs to a run with another config:\n{listed}\nGive that run's values to go on with it, "
            "or another work directory for a new run. A run may be made longer, and it may change "
            f"{', '.join(allowed)}."
        )


def write_json(path: Path, value: Any) -> None:
    """Replace a file as a whole: a reader, or a crash, never sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run's folder: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or cannot be read: {error}") from None


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    if folder.exists():
        saved = _read_json(folder / "tokenizer_info.json").get("identity")
        if saved != tokenizer.identity():
            raise UserError(
                f"the tokenizer in {folder} is not the one that the data uses now; go on with the data that the run "
                "began with, or choose another work directory"
            )
        return
    temporary = folder.with_name(f"tokenizer.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    os.replace(temporary, folder)


def _session() -> dict[str, Any]:
    versions = {"llm-jax": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = jax.devices()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions,
        "git": _git_revision(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def _git_revision() -> str | None:
    """The revision of this package's own repository, "+changes" where files differ from it; None when installed."""
    package = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *command], capture_output=True, text=True, timeout=10)
        done.check_returncode()
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# -------------------------------------------------------------------------------------------------- the lock

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 120.0


class Lock:
    """Holds WORKDIR/run.lock for as long as a run writes there; only the main process takes it.

    On one machine the operating system's lock decides, and it ends with the process however that ends. Between
    machines, whose file systems may not pass locks on, the file's time tells: its holder renews it.

    Raises:
      UserError: another live run holds the folder, or the folder cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._file = None
        distributed.on_main(lambda: self._take(Path(workdir) / "run.lock"))

    def _take(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 held until release()
            age = time.time() - os.fstat(self._file.fileno()).st_mtime
            self._file.seek(0)
            held_by = self._file.read()
        except OSError as error:
            raise UserError(f"the work directory {path.parent} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder_lives = _elsewhere(held_by) and age < STALE_SECONDS
        except BlockingIOError:
            holder_lives = True
        except OSError:  # this file system has no locks
            holder_lives = bool(held_by) and age < STALE_SECONDS
        if holder_lives:
            self._file.close()
            self._file = None
            raise UserError(
                f"another run is using {path.parent} ({held_by.strip() or 'it has just started'}). Wait for it to end "
                f"or choose another work directory. If you are sure that it is dead, remove {path}."
            )
        self._file.truncate(0)
        self._file.write(f"run {uuid.uuid4().hex[:8]} on host {socket.gethostname()}, process {os.getpid()}\n")
        self._file.flush()
        self._released = threading.Event()
        threading.Thread(target=_renew, args=(path, self._released), daemon=True).start()

    def release(self) -> None:
        """Let the folder go. The emptied file stays: removing it could pull it from under the next run's lock."""
        if self._file is not None:
            self._released.set()
            self._file.truncate(0)
            self._file.close()
            self._file = None


def _renew(path: Path, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def _elsewhere(held_by: str) -> bool:
    return bool(held_by) and f"on host {socket.gethostname()}," not in held_by
