"""Checkpoints on disk: saved while training goes on, checked when read, restored onto any mesh.

Orbax writes and reads the arrays; this file, `arrays.py` and `streamed.py` alone import it. What it does not promise is
added here: a fingerprint of every array (a flipped byte in an array file would otherwise be restored in silence), exact
dtypes and keys, a fall-back to the checkpoint before a damaged one, and retention that survives damaged files.

    WORKDIR/checkpoints/<step>            a finished checkpoint
    WORKDIR/checkpoints/<step>.corrupt    one that was rejected and put aside
"""

import dataclasses
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from llm_jax import distributed
from llm_jax.config import CheckpointConfig
from llm_jax.errors import CorruptCheckpointError, UserError
from llm_jax.sharding import path_name
from llm_jax.training import run_folder
from llm_jax.training.arrays import by_path, in_small_chunks, load, nested, rebuild
from llm_jax.training.fingerprint import Arrays
from llm_jax.training.record import RANK, DamagedCheckpoint, make_record, read_record, root_cause

Tree = Any
Found = TypeVar("Found")

# -------------------------------------------------------------------------------------------- what is there


def steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Steps of the finished checkpoints of a run, ascending."""
    folder = _folder(workdir)
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def best_step(workdir: str | os.PathLike[str]) -> int | None:
    """Step of the checkpoint with the best evaluation, or None where none has one."""
    losses = {step: _loss(_folder(workdir) / str(step)) for step in steps(workdir)}
    best = min(losses, key=lambda step: losses[step], default=None)
    return best if best is not None and losses[best] < math.inf else None


def folder_of(workdir: str | os.PathLike[str], step: int) -> Path:
    """Of one checkpoint."""
    return _folder(workdir) / str(step)


def _folder(workdir: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(workdir)) / "checkpoints"  # a relative path fails in Orbax's background, one save late


def _rank(evaluation: Mapping[str, float]) -> float:
    return evaluation.get(RANK, evaluation.get("eval/loss", math.inf))


def _loss(path: Path) -> float:
    try:
        return _rank(read_record(path)["metrics"])
    except DamagedCheckpoint:
        return math.inf


# ------------------------------------------------------------------------------------------ parameters alone


def restore_params(
    workdir: str | os.PathLike[str], step: int | None, abstract_params: Tree, name: str = "params"
) -> tuple[Tree, int]:
    """The parameters alone of a run's checkpoint, onto whatever mesh `abstract_params` names.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None: the newest that is intact.
      abstract_params: tree of ShapeDtypeStruct, with shardings where it should be split.
      name: the field of the state: "params", or "ema" for their running average.

    Raises:
      UserError: there is no such checkpoint, or its parameters have other keys, shapes or dtypes.
      CorruptCheckpointError: it is damaged (of several: all are).
    """
    abstract = {f"{name}/{key}": x for key, x in by_path(abstract_params).items()}
    check_there(workdir, step)
    tried = [step] if step is not None else steps(workdir)[::-1]
    arrays, _, step = load_newest(workdir, tried, abstract, partial=True)
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[f"{name}/{path_name(path)}"], abstract_params), step


def check_there(workdir: str | os.PathLike[str], step: int | None) -> None:
    there = steps(workdir)
    if not there:
        raise UserError(f"there are no checkpoints in {_folder(workdir)}; is {workdir} the folder of a run that saved?")
    if step is not None and step not in there:
        raise UserError(
            f"there is no checkpoint of step {step} in {_folder(workdir)}; there are {', '.join(map(str, there))}"
        )


def load_newest(
    workdir: str | os.PathLike[str],
    tried: Sequence[int],
    abstract: Mapping[str, Any],
    *,
    partial: bool = False,
    on_damage: Callable[[int, str], None] | None = None,
) -> tuple[Arrays, dict[str, Any], int]:
    """Arrays, record and step of the first step of `tried` that is intact on every process."""
    read = lambda path, step: (*load(path, abstract, partial=partial), step)  # noqa: E731
    return _first_intact(workdir, tried, read, on_damage or _warn_of_damage(workdir))


def first_intact(workdir: str | os.PathLike[str], step: int | None, read: Callable[[Path, int], Found]) -> Found:
    """What `read(folder, step)` gives of a run's checkpoint, or of the one before where that is damaged: it is told.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None: the newest that is intact.
      read: raises DamagedCheckpoint.

    Raises:
      UserError: there is no such checkpoint.
      CorruptCheckpointError: it is damaged (of several: all are).
    """
    check_there(workdir, step)
    tried = [step] if step is not None else steps(workdir)[::-1]
    return _first_intact(workdir, tried, read, _warn_of_damage(workdir))


def _first_intact(
    workdir: str | os.PathLike[str],
    tried: Sequence[int],
    read: Callable[[Path, int], Found],
    on_damage: Callable[[int, str], None],
) -> Found:
    for step in tried:
        try:
            return read(_folder(workdir) / str(step), step)
        except DamagedCheckpoint as error:
            reason = str(error)
        on_damage(step, reason)  # here, where the arrays of the failed load are free
    raise CorruptCheckpointError(
        f"no checkpoint in {_folder(workdir)} can be restored (tried {', '.join(map(str, tried))}). Restore the folder "
        "from a copy, or remove it to start over"
    )


def _warn_of_damage(workdir: str | os.PathLike[str]) -> Callable[[int, str], None]:
    return lambda step, reason: _warn(f"warning: the checkpoint {_folder(workdir) / str(step)} is damaged: {reason}")


def _warn(text: str) -> None:
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ a run's own


class Checkpointer:
    """Saves and restores one run's checkpoints; a context manager, and the lock on the run's folder.

    Make it before anything else writes into the folder. Whatever ends the `with` block (a normal end, an exception,
    a signal that Python sees), the save in flight is finished first.

    Args:
      workdir: the run's folder.
      cfg: which checkpoints to keep: the latest `keep_latest`, the best `keep_best` by "eval/loss", and those whose
        step is a multiple of `keep_every`.

    Raises:
      UserError: the folder cannot be written, or another run uses it.
    """

    def __init__(self, workdir: str | os.PathLike[str], cfg: CheckpointConfig):
        if "://" in os.fspath(workdir):
            raise UserError(f"the work directory {workdir} is a URL; mount that storage and give its path")
        self.workdir, self.cfg = Path(os.path.abspath(workdir)), cfg
        self._folder = _folder(workdir)
        self._lock = run_folder.Lock(self.workdir)
        self._saving: int | None = None
        try:
            self._losses = {step: _loss(self._folder / str(step)) for step in steps(workdir)}
            distributed.on_main(self._prepare_folder)
            self._orbax = ocp.training.Checkpointer(self._folder, preservation_policy=_Keep(cfg, self._losses))
        except BaseException:
            self._lock.release()
            raise

    def _prepare_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder} cannot be made: {error.strerror}") from None
        for left_over in self._folder.glob("*.orbax-checkpoint-tmp*"):  # of a save that was killed
            shutil.rmtree(left_over)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            _warn(f"warning: {error}")  # the exception that ends the run says more

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return steps(self.workdir)

    def save(
        self, step: int, state: Tree, data_state: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begin to save; returns when the state may be changed or donated, and the rest happens in the background.

        A step that is saved already is left as it is.

        Args:
          state: tree of arrays, all finite (the caller's duty).
          data_state: plain JSON; given back by `restore` as it is.
          metrics: evaluation at this step, where there was one; RANK, or "eval/loss", decides which are best.

        Raises:
          UserError: this or the save before could not be written; older checkpoints are intact.
        """
        self.wait()
        if any(checkpoint.step == step for checkpoint in self._orbax.checkpoints):
            return
        arrays = by_path(state)
        record = make_record(step, arrays, data_state, metrics or {})
        self._losses[step] = _rank(record["record"]["metrics"])
        self._saving = step
        with self._named_errors(), in_small_chunks():
            self._orbax.save_checkpointables_async(step, {"state": nested(arrays)}, custom_metadata=record, force=True)

    def wait(self) -> None:
        """Wait until the save in flight is on disk. Raises UserError where it could not be written."""
        with self._named_errors():
            self._orbax.wait()
        self._saving = None

    def close(self) -> None:
        """Finish the save in flight and let the folder go. Safe to call twice."""
        if self._lock is None:
            return
        try:
            with self._named_errors():
                self._orbax.close()
        finally:
            self._lock.release()
            self._lock = None

    def _named_errors(self) -> "_NamedErrors":
        return _NamedErrors(self._folder, self._saving)

    def restore(self, step: int, abstract_state: Tree) -> tuple[Tree, dict[str, Any]]:
        """State and data state of one step, onto the mesh of `abstract_state` (ShapeDtypeStructs with shardings).

        Raises:
          UserError: there is no such step, or it has other keys, shapes or dtypes.
          CorruptCheckpointError: it is damaged.
        """
        check_there(self.workdir, step)
        arrays, record, _ = load_newest(self.workdir, [step], by_path(abstract_state))
        return rebuild(abstract_state, arrays), record["data"]

    def put_aside(self, step: int, reason: str) -> None:
        """Rename a damaged checkpoint, so that training can pass and save its step again."""
        path = self._folder / str(step)
        aside = next(p for n in range(1000) if not (p := path.with_name(f"{step}.corrupt{n or ''}")).exists())
        distributed.barrier(f"all have seen {path}")
        if distributed.is_main():
            path.rename(aside)
        distributed.barrier(f"{path} is put aside")
        self._losses.pop(step, None)
        self._orbax.reload()
        _warn(f"warning: the checkpoint {path} is damaged ({reason}); it is now {aside.name}")


class _NamedErrors:
    """Turns an error of a save, which may come up much later, into one that says which save and what to do."""

    def __init__(self, folder: Path, step: int | None):
        self.folder, self.step = folder, step

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception):
            raise UserError(
                f"the checkpoint of step {self.step} could not be written to {self.folder} ({root_cause(error)}); "
                "older checkpoints are intact. Make room or mend the storage, and run the same command again"
            ) from error


@dataclasses.dataclass
class _Keep:
    """Orbax's preservation policy: latest, best and every so often. Its own `BestN` counts NaN as best."""

    cfg: CheckpointConfig
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        found = sorted(c.step for c in checkpoints)
        ranked = sorted((self.losses.get(step, math.inf), step) for step in found)
        keep = set(found[-self.cfg.keep_latest :])
        keep |= {step for loss, step in ranked[: self.cfg.keep_best] if loss < math.inf}
        keep |= {step for step in found if self.cfg.keep_every and step % self.cfg.keep_every == 0}
        return [c.step in keep for c in checkpoints]
