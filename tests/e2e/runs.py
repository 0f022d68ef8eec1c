"""Real `llm-jax` processes for the tests beside this file, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from llm_jax import metrics

ROOT = Path(__file__).resolve().parents[2]
# XLA's optimizer is most of a first start, and has no bearing on what these tests ask.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
TINY = f"--config={Path(__file__).with_name('tiny_config.py')}"


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    """`llm-jax` with these arguments, as its own process."""
    command = [sys.executable, "-m", "llm_jax.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | QUICK | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*arguments: object, code: int = 0, **environment: str) -> tuple[str, str]:
    """Its stdout and stderr; asserts the exit code, and that no traceback was printed."""
    process = start(*arguments, **environment)
    return outcome(process, code)


def outcome(process: subprocess.Popen, code: int) -> tuple[str, str]:
    """Wait for the end of a process; asserts its exit code."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{out}\n{err}"
    assert "Traceback" not in err, err
    return out, err


def wait_until(process: subprocess.Popen, happened) -> None:
    """Return as soon as `happened()`; fails where the process ends before."""
    deadline = time.monotonic() + 240
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"ended or hung before it happened: {process.communicate()}")
        time.sleep(0.002)


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> tuple[str, str]:
    process.send_signal(number)
    return process.communicate(timeout=240)


def records(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return metrics.read_jsonl(path) if path.exists() else []


def last_step(workdir: Path) -> int:
    return max((record["step"] for record in records(workdir)), default=0)


EXACT = ("loss", "z_loss", "grad_norm", "learning_rate", "tokens", "eval/loss", "eval/accuracy", "eval/bits_per_byte")


def numbers(workdir: Path) -> list[tuple]:
    """Every number of every record that must not depend on kills and restarts, in the order of the file."""
    return [(r["step"], *(r.get(name) for name in EXACT)) for r in records(workdir)]


def losses(workdir: Path) -> dict[int, float]:
    """The training loss of every step; asserts that none is missing and none is there twice."""
    found = [(record["step"], record["loss"]) for record in records(workdir) if "loss" in record]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return dict(found)
