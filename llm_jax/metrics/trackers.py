"""TensorBoard, Weights & Biases and MLflow behind one face; a library is imported when its tracker is asked for."""

import dataclasses
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llm_jax.config.resolve import flatten
from llm_jax.errors import UserError

Record = Mapping[str, float | int]


class Writer(Protocol):
    def write(self, step: int, values: Record) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class RunInfo:
    workdir: Path
    name: str
    config: dict[str, Any]
    restored_step: int


class TensorBoard:
    """Event files in WORKDIR/tensorboard, written in this thread: the library's own writer thread hangs on errors."""

    def __init__(self, run: RunInfo):
        writer = _imported("tensorboardX.event_file_writer", "tensorboardX", "tensorboard")
        events = importlib.import_module("tensorboardX.proto.event_pb2")
        self._event, self._summary = events.Event, importlib.import_module("tensorboardX.proto.summary_pb2").Summary
        folder = run.workdir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = writer.EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
        first = run.restored_step + 1 if run.restored_step else 0
        start = events.SessionLog(status=events.SessionLog.START)  # what follows replaces later steps of old files
        self._file.write_event(self._event(wall_time=time.time(), step=first, session_log=start))

    def write(self, step: int, values: Record) -> None:
        for name, value in values.items():
            scalar = self._summary(value=[self._summary.Value(tag=name, simple_value=value)])
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=scalar))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandB:
    """Weights & Biases; the account, project and mode come from its own environment variables."""

    def __init__(self, run: RunInfo):
        wandb = _imported("wandb", "wandb", "wandb")
        project = os.environ.get("WANDB_PROJECT", "llm-jax")
        run_id = _remembered(run, "wandb", lambda: hashlib.sha256(os.urandom(16)).hexdigest()[:16])
        self._run = wandb.init(
            project=project, name=run.name, id=run_id, resume="allow", config=run.config, dir=str(run.workdir)
        )
        self._run.define_metric("*", step_metric="step")  # its own step may not go back, ours does after a restore

    def write(self, step: int, values: Record) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; the server and experiment come from its own environment variables."""

    def __init__(self, run: RunInfo):
        self._mlflow = _imported("mlflow", "mlflow", "mlflow")
        old = _remembered(run, "mlflow", lambda: "")
        active = self._mlflow.start_run(run_id=old or None, run_name=run.name)
        _remember(run, "mlflow", active.info.run_id)
        if not old:
            self._mlflow.log_params(flatten(run.config))

    def write(self, step: int, values: Record) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def started(tracker: str, run: RunInfo) -> Writer:
    """The tracker of this name, ready to write. Raises UserError where it cannot start."""
    try:
        return TRACKERS[tracker](run)
    except UserError:
        raise
    except Exception as error:  # whatever its library raises: no account, no server, ...
        words = " ".join(str(error).split())[:300]
        raise UserError(f"log.trackers: {tracker} cannot start ({type(error).__name__}: {words})") from error


def _imported(module: str, package: str, tracker: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"log.trackers names {tracker!r} but the package {package} is not installed; "
            f"pip install {package}, or leave {tracker!r} out"
        ) from None


def _remembered(run: RunInfo, tracker: str, make: Callable[[], str]) -> str:
    """The tracker's id for this run: the stored one when the run goes on, else a new one."""
    path = run.workdir / "trackers.json"
    if run.restored_step and path.exists():
        known = json.loads(path.read_text())
        if tracker in known:
            return known[tracker]
    new = make()
    _remember(run, tracker, new)
    return new


def _remember(run: RunInfo, tracker: str, value: str) -> None:
    path = run.workdir / "trackers.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {tracker: value}))
