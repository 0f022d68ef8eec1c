"""What a run reports: metrics.jsonl, the terminal and trackers; peak FLOP/s and memory; a loss curve as text.

Writing metrics never stops a run: after the start, a tracker that fails or a full disk costs one warning.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import rich.console
import rich.progress
import rich.table

from llm_jax.errors import UserError

Record = Mapping[str, float | int]


class Metrics:
    """Where the loop sends its numbers. A context manager; processes other than the main one write nothing.

    Args:
      workdir: the run's folder.
      trackers: of "tensorboard", "wandb", "mlflow"; metrics.jsonl and the terminal always get everything.
      name: the run's name, for trackers.
      config: the resolved config as nested dicts, for trackers.
      total_steps: the run's length, for progress and the time left.
      restored_step: step at which the run goes on; records of later steps are dropped, they will come again.
      main: whether this process writes (`distributed.is_main()`).
      console: where lines and the progress bar go; stdout by default.

    Raises:
      UserError: metrics.jsonl cannot be written, or a tracker cannot start (its package is missing, its server away).
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        trackers: Sequence[str] = (),
        *,
        name: str = "run",
        config: Mapping[str, Any] | None = None,
        total_steps: int = 0,
        restored_step: int = 0,
        main: bool = True,
        console: rich.console.Console | None = None,
    ):
        self._writers: dict[str, Writer] = {}
        self._path = Path(workdir) / "metrics.jsonl"
        if not main:
            return
        run = RunInfo(Path(workdir), name, dict(config or {}), restored_step)
        try:
            self._writers["metrics.jsonl"] = JsonLines(self._path, restored_step)
            for tracker in trackers:
                self._writers[tracker] = _started(tracker, run)
            self._writers["terminal"] = Terminal(total_steps, restored_step, console)
        except BaseException:
            self.close()
            raise

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One record: Python numbers or scalar arrays (which are fetched), under names such as "loss", "eval/loss"."""
        values = {name: _number(value) for name, value in values.items()} if self._writers else {}
        for name, writer in list(self._writers.items()):
            self._guard(name, lambda: writer.write(step, values))  # noqa: B023 called at once

    def say(self, text: str) -> None:
        """A line for the reader, above the progress bar."""
        if "terminal" in self._writers:
            self._writers["terminal"].say(text)

    def history(self) -> list[dict[str, float]]:
        """All records of the run so far, those of earlier sessions too."""
        return read_jsonl(self._path) if self._path.exists() else []

    def close(self) -> None:
        """Finish trackers and the progress bar. Safe to call twice."""
        for name, writer in list(self._writers.items())[::-1]:  # the terminal first: warnings follow its bar
            self._guard(name, writer.close)
        self._writers.clear()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guard(self, name: str, act: Any) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker's library raises
            if name == "metrics.jsonl":
                if not self._writers[name].warned:
                    self.say(
                        f"warning: {self._path} cannot be written ({error}); training goes on, its records are lost"
                    )
                self._writers[name].warned = True  # and tried again: a full disk may be emptied
            else:
                self._writers.pop(name, None)
                self.say(f"warning: {name} failed ({type(error).__name__}: {error}); it gets nothing more in this run")


class Writer(Protocol):
    def write(self, step: int, values: Record) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class RunInfo:
    workdir: Path
    name: str
    config: dict[str, Any]
    restored_step: int


def _number(value: Any) -> float | int:
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, bool) else value


# ------------------------------------------------------------------------------------------------- metrics.jsonl


class JsonLines:
    """One JSON object a line, with "step", on the disk's way as soon as written.

    JSON has no NaN or infinity: they are the strings "NaN", "Infinity" and "-Infinity", which `float` reads.
    """

    def __init__(self, path: Path, restored_step: int):
        self.warned = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_later_records(path, restored_step)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 closed by close()
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose a work directory that can") from None
        self._end = self._file.tell()

    def write(self, step: int, values: Record) -> None:
        line = json.dumps({"step": step} | {name: _json_number(value) for name, value in values.items()}) + "\n"
        data = line.encode()
        if self._file.tell() != self._end:  # part of a line that did not fit on the disk
            self._file.truncate(self._end)
        if self._file.write(data) != len(data):
            raise OSError("no space left on the device")
        self._end += len(data)

    def close(self) -> None:
        self._file.close()


def _json_number(value: float | int) -> float | int | str:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_later_records(path: Path, restored_step: int) -> None:
    """Keep the records up to the restored step (of a fresh start: none), without a torn last line."""
    temporary = path.with_name(path.name + ".tmp")
    with open(path, "rb") as old, open(temporary, "wb") as new:
        for line in old:
            if restored_step and line.endswith(b"\n") and _step_of(line) <= restored_step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(temporary, path)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # damaged


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, numbers as numbers again. A torn last line is left out."""
    with open(path, "rb") as file:
        records = [json.loads(line) for line in file if line.endswith(b"\n") and _step_of(line) < math.inf]
    return [{name: float(v) if isinstance(v, str) else v for name, v in record.items()} for record in records]


# ------------------------------------------------------------------------------------------------ the terminal

BAR = ("loss", "bits_per_byte", "tokens_per_second")  # what fits beside a progress bar
SHOWN = {  # name of a record's value: how it looks on the terminal
    "loss": "loss {:.4f}",
    "bits_per_byte": "{:.4f} bits/byte",
    "eval/loss": "evaluation loss {:.4f}",
    "eval/bits_per_byte": "{:.4f} bits/byte",
    "learning_rate": "rate {:.2e}",
    "grad_norm": "gradient {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


class StubbornConsole(rich.console.Console):
    """A console whose reader may leave (`| head`): rich would end the process, we go on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere. Evaluations are lines on both."""

    def __init__(self, total_steps: int, restored_step: int, console: rich.console.Console | None):
        self._console = console or StubbornConsole(highlight=False, soft_wrap=True)
        self._total = total_steps
        self._start: tuple[int, float] | None = None  # step and time of the first record: compiling does not count
        self._progress, self._task = None, None
        if self._console.is_terminal and total_steps:
            columns = (
                rich.progress.BarColumn(bar_width=None),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.description}", table_column=rich.table.Column(no_wrap=True)),
            )
            self._progress = rich.progress.Progress(*columns, console=self._console, expand=True, refresh_per_second=4)
            self._task = self._progress.add_task("compiling", total=total_steps, completed=restored_step)
            self._progress.start()

    def write(self, step: int, values: Record) -> None:
        shown = {name: form.format(values[name]) for name, form in SHOWN.items() if name in values}
        if any(name.startswith("eval/") for name in values):
            left = ""
        else:
            left = self._time_left(step)
            if self._progress is not None:
                beside = [shown[name] for name in BAR if name in shown]
                self._progress.update(self._task, completed=step, description="  ".join([*beside, left]))
                return
        if shown:
            total = f"/{self._total}" if self._total else ""
            self.say("  ".join([f"step {step}{total}", *shown.values(), *([left] if left else [])]))

    def _time_left(self, step: int) -> str:
        now = time.monotonic()
        self._start = self._start or (step, now)
        first, then = self._start
        if not self._total or step <= first:
            return ""
        seconds = round((now - then) / (step - first) * (self._total - step))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}:{minutes:02}:{seconds % 60:02} left"

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


# ---------------------------------------------------------------------------------------------------- trackers


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
            self._mlflow.log_params(_flat(run.config))

    def write(self, step: int, values: Record) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def _started(tracker: str, run: RunInfo) -> Writer:
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


def _remembered(run: RunInfo, tracker: str, make: Any) -> str:
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


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


# ------------------------------------------------------------------------------------------- what the machine can

PEAK_FLOPS = {  # jax's device_kind: dense bfloat16 FLOP/s of a chip, and devices a chip (makers' data sheets)
    "TPU v4": (275e12, 2),
    "TPU v5 lite": (197e12, 1),
    "TPU v5e": (197e12, 1),
    "TPU v5p": (459e12, 1),
    "TPU v5": (459e12, 1),
    "TPU v6 lite": (918e12, 1),
    "TPU v6e": (918e12, 1),
    "TPU7x": (2307e12, 2),
    "NVIDIA A100": (312e12, 1),
    "NVIDIA H100 80GB HBM3": (989e12, 1),  # SXM; the PCIe and NVL cards are slower and not in this table
    "NVIDIA H200 NVL": (836e12, 1),
    "NVIDIA H200": (989e12, 1),
    "NVIDIA B200": (2250e12, 1),
    "NVIDIA B300": (2250e12, 1),
}


def peak_flops(device_kind: str, devices_a_chip: int | None = None) -> float | None:
    """Dense bfloat16 FLOP/s of one device as JAX counts devices, or None for a kind that is not known (or a CPU).

    Args:
      device_kind: `jax.Device.device_kind`.
      devices_a_chip: as `devices_a_chip` finds them; by default as the table says.
    """
    for kind, (flops, devices) in PEAK_FLOPS.items():
        card_of = kind.startswith("NVIDIA") and device_kind.startswith((kind + " ", kind + "-"))  # with its form factor
        if device_kind == kind or card_of:
            return flops / (devices_a_chip or devices)
    return None


def devices_a_chip(devices: Iterable[jax.Device]) -> int | None:
    """How many of these devices share a chip (TPU v4 shows one or two, by its mode); None where they do not say."""
    coordinates = [getattr(device, "coords", None) for device in devices]
    if not coordinates or None in coordinates:
        return None
    return len(coordinates) // len({tuple(c) for c in coordinates})


def memory_stats(devices: Sequence[jax.Device] | None = None) -> dict[str, int]:
    """Bytes in use: the fullest local device's, now and at most, or this process's where devices do not say (CPU).

    Returns:
      {"device_bytes_in_use", "device_bytes_peak"}, or {"process_bytes_in_use", "process_bytes_peak"} (resident set;
      the first is left out where the system does not tell).
    """
    stats = [s for device in devices or jax.local_devices() if (s := device.memory_stats())]
    if stats:
        most = {name: max(s.get(name, 0) for s in stats) for name in ("bytes_in_use", "peak_bytes_in_use")}
        return {"device_bytes_in_use": most["bytes_in_use"], "device_bytes_peak": most["peak_bytes_in_use"]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else None
    return ({} if now is None else {"process_bytes_in_use": now}) | {"process_bytes_peak": peak}


# ------------------------------------------------------------------------------------------------ a loss curve

BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of the two columns of dots, from the top


def plot(
    history: Sequence[Mapping[str, float]], *, width: int = 60, height: int = 12, unicode: bool | None = None
) -> str:
    """Training and evaluation loss over steps, as lines of text; "" where there is nothing to draw.

    Args:
      history: records with "step" and "loss" or "eval/loss"; those that are not finite are left out.
      width, height: of the drawing, in characters.
      unicode: draw training loss in dots of braille, else in full stops; by default where stdout can show them.
    """
    if unicode is None:
        unicode = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
    train, evaluation = _points(history, "loss"), _points(history, "eval/loss")
    if len({step for step, _ in train + evaluation}) < 2:
        return ""
    train = _means(train, 2 * width)
    steps = [step for step, _ in train + evaluation]
    low, high = _range([loss for _, loss in train + evaluation])
    across, down = (2, 4) if unicode else (1, 1)

    def place(step: float, loss: float) -> tuple[int, int]:
        x = (step - min(steps)) / (max(steps) - min(steps)) * (width * across - 1)
        y = (high - min(max(loss, low), high)) / (high - low) * (height * down - 1)
        return round(x), round(y)

    dots = set()
    for (x0, y0), (x1, y1) in _pairs([place(*point) for point in train]):
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        dots |= {(round(x0 + (x1 - x0) * i / n), round(y0 + (y1 - y0) * i / n)) for i in range(n + 1)}
    canvas = [[" "] * width for _ in range(height)]
    for row in range(height):
        for column in range(width):
            bits = [
                BRAILLE[i][j] if unicode else 1
                for i in range(across)
                for j in range(down)
                if (column * across + i, row * down + j) in dots
            ]
            if bits:
                canvas[row][column] = chr(0x2800 + sum(bits)) if unicode else "."
    for x, y in [place(*point) for point in evaluation]:
        canvas[y // down][x // across] = "o"
    return _with_axes(canvas, (low, high), (min(steps), max(steps)), bool(train), bool(evaluation), unicode)


def _points(history: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(r["step"], r[name]) for r in history if name in r and math.isfinite(r[name])]


def _means(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours: a long noisy curve would fill the drawing."""
    size = -(-len(points) // most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _pairs(places: list[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return list(zip(places, places[1:], strict=False)) or [(place, place) for place in places]


def _range(losses: list[float]) -> tuple[float, float]:
    """From the least to the greatest loss, so that a first spike does not flatten the rest: at most the 98th of 100."""
    ordered = sorted(losses)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 50:
        high = min(high, ordered[int(0.98 * len(ordered))] + (ordered[int(0.98 * len(ordered))] - low) * 0.5)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _with_axes(
    canvas: list[list[str]],
    losses: tuple[float, float],
    steps: tuple[float, float],
    has_train: bool,
    has_evaluation: bool,
    unicode: bool,
) -> str:
    side, corner, bottom = ("│", "└", "─") if unicode else ("|", "+", "-")
    height, width = len(canvas), len(canvas[0])
    low, high = losses
    labels = {round(i * (height - 1) / 3): high - (high - low) * i / 3 for i in range(4)}
    digits = max(0, 2 - math.floor(math.log10(high - low)))
    pad = max(len(f"{label:.{digits}f}") for label in labels.values())
    lines = [
        (f"{labels[row]:.{digits}f}" if row in labels else "").rjust(pad) + f" {side}" + "".join(canvas[row]).rstrip()
        for row in range(height)
    ]
    first, last = f"{steps[0]:.0f}", f"step {steps[1]:.0f}"
    drawn = {"⠤⠤ training" if unicode else ".. training": has_train, "o evaluation": has_evaluation}
    title = " " * (pad + 2) + "loss:  " + "   ".join(name for name, there in drawn.items() if there)
    axis = " " * pad + f" {corner}" + bottom * width
    return "\n".join([title, *lines, axis, " " * (pad + 2) + first + " " + last.rjust(width - len(first) - 1)])
