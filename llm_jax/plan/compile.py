"""Compiles the real train step with the real compiler of a machine that is not there, and keeps what it says.

Results are kept in a folder named by everything that goes into them, so that the same plan is never compiled twice.
"""

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_jax.backend import cache_folder
from llm_jax.config import to_dict
from llm_jax.errors import UserError
from llm_jax.plan import hlo, worker
from llm_jax.plan.setting import Setting
from llm_jax.training.executable import source_fingerprint

POLL = 0.2  # seconds between looks at a process


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a setting.

    Attributes:
      result: of `worker.compile_step`.
      text: of the program; "" where it was refused for want of memory.
    """

    result: dict[str, Any]
    text: str

    @property
    def refused(self) -> str:
        return self.result.get("refused", "")

    @property
    def program(self) -> hlo.Program:
        return hlo.parse(self.text)


class Job:
    """One compilation: finished already, or running in a process of its own."""

    def __init__(self, setting: Setting, options: dict[str, Any] | None = None, save: str = ""):
        request = {
            "config": to_dict(setting.cfg),
            "topology": setting.machine.name,
            "slices": setting.machine.slices,
            "options": options or {},
            "save": save,
        }
        self.folder = cache_folder() / "plan" / fingerprint(request)
        self.process: subprocess.Popen | None = None
        self.began = time.monotonic()
        if not self.finished or (save and not Path(save).exists()):
            require_compiler(setting)
            self.start(request, setting.machine.hardware.tpu)

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    def start(self, request: dict[str, Any], tpu: bool) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.working = Path(tempfile.mkdtemp(prefix="working-", dir=self.folder.parent))
        (self.working / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "llm_jax.plan.worker", str(self.working)]
        with open(self.working / "log.txt", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | worker.environment(tpu), stdout=log, stderr=subprocess.STDOUT
            )

    def poll(self) -> bool:
        """Whether it is done. Raises UserError where the compiler failed."""
        if self.process is None:
            return True
        if self.process.poll() is None:
            return False
        if not (self.working / "result.json").exists():
            said = (self.working / "log.txt").read_text(encoding="utf-8", errors="replace")
            shutil.rmtree(self.working, ignore_errors=True)
            raise UserError(f"the compiler ended with exit code {self.process.returncode}: {last_words(said)}")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self.working, self.folder)
        self.process = None
        return True

    def result(self) -> Compiled:
        result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        program = self.folder / "program.txt.gz"
        text = gzip.decompress(program.read_bytes()).decode() if program.exists() else ""
        return Compiled(result, text)

    def stop(self) -> None:
        """End a compilation that is no longer wanted."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        if self.process is not None:
            shutil.rmtree(self.working, ignore_errors=True)


def compile_setting(
    setting: Setting, *, options: dict[str, Any] | None = None, save: str = "", waiting: Callable[[float], None]
) -> Compiled:
    """The compiled step, of this or an earlier process. `waiting` is told the seconds that have passed."""
    job = Job(setting, options, save)
    try:
        while not job.poll():
            waiting(time.monotonic() - job.began)
            time.sleep(POLL)
        return job.result()
    finally:
        job.stop()


def fingerprint(request: dict[str, Any]) -> str:
    """A name for all that decides what comes out: the request, this package's code, and the compiler's version."""
    parts = [json.dumps(request | {"save": ""}, sort_keys=True), source_fingerprint()]
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    parts.append(os.environ.get("TPU_LIBRARY_PATH", ""))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def require_compiler(setting: Setting) -> None:
    """Raises UserError where the machine's compiler is not installed."""
    generator = getattr(setting.cfg.model, "generator_divisor", 0)  # which the quick estimate does not know
    quick = "" if generator else ", or take --quick, which compiles nothing"
    if setting.machine.hardware.tpu:
        if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"{setting.machine}: the TPU compiler is not installed; pip install 'llm-jax[plan-tpu]' (Linux){quick}"
            )
    elif not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (13, 12)):
        raise UserError(
            f"{setting.machine}: the CUDA plugin is not installed; pip install 'llm-jax[plan-cuda]' (Linux){quick}"
        )


def last_words(said: str) -> str:
    """What a failed process says in the end, in one sentence."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and "symbolize" not in line]
    errors = [line for line in lines if "Error" in line or "ERROR" in line] or lines[-1:] or ["it said nothing"]
    return errors[-1][:600]
