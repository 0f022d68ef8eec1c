"""Where a run's numbers go: metrics.jsonl, the terminal and trackers.

Writing metrics never stops a run: after the start, a tracker that fails or a full disk costs one warning.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
import rich.table

from llm_jax.errors import UserError
from llm_jax.metrics.trackers import Record, RunInfo, Writer, started


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
                self._writers[tracker] = started(tracker, run)
            self._writers["terminal"] = Terminal(total_steps, restored_step, console)
        except BaseException:
            self.close()
            raise

    def write(self, step: int, values: Mapping[str, Any], *, file_only: bool = False) -> None:
        """One record: Python numbers or scalar arrays (which are fetched), under names such as "loss", "eval/loss".

        `file_only` keeps it from the terminal and the trackers.
        """
        values = {name: _number(value) for name, value in values.items()} if self._writers else {}
        for name, writer in list(self._writers.items()):
            if name == "metrics.jsonl" or not file_only:
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

    def _guard(self, name: str, act: Callable[[], None]) -> None:
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

BAR = ("loss", "bits_per_byte", "tokens_per_second_per_device")  # what fits beside a progress bar


def _memory(size: float) -> str:
    return f"memory {size / 2**30:.2f} GiB"


SHOWN = {  # name of a record's value: how it looks on the terminal
    "loss": "loss {:.4f}".format,
    "bits_per_byte": "{:.4f} bits/byte".format,
    "accuracy": "accuracy {:.3f}".format,  # of encoders' tasks
    "pair_loss": "pair loss {:.4f}".format,
    "pair_accuracy": "pair accuracy {:.3f}".format,
    "generator_loss": "generator's loss {:.4f}".format,
    "generator_accuracy": "its accuracy {:.3f}".format,
    "eval/loss": "evaluation loss {:.4f}".format,
    "eval/bits_per_byte": "{:.4f} bits/byte".format,
    "eval/accuracy": "accuracy {:.3f}".format,
    "eval/pair_accuracy": "pair accuracy {:.3f}".format,
    "eval/generator_accuracy": "generator's accuracy {:.3f}".format,
    "eval/exact_match": "exact match {:.3f}".format,
    "eval/f1": "F1 {:.3f}".format,
    "eval/f1_macro": "macro F1 {:.3f}".format,
    "eval/matthews": "Matthews {:.3f}".format,
    "eval/spearman": "Spearman {:.3f}".format,
    "learning_rate": "rate {:.2e}".format,
    "grad_norm": "gradient {:.3g}".format,
    "tokens_per_second_per_device": "{:,.0f} tokens/s/device".format,
    "mfu": "MFU {:.1%}".format,
    "data_wait_share": "data wait {:.0%}".format,
    "padding_share": "padding {:.0%}".format,
    "device_bytes_in_use": _memory,
    "process_bytes_in_use": _memory,  # where devices do not say
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
        shown = {name: show(values[name]) for name, show in SHOWN.items() if name in values}
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
