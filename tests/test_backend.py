"""JAX's settings for a process: each in a process of its own, because they last."""

import os
import subprocess
import sys
from pathlib import Path

from llm_jax.backend import (
    FUSION_MEMORY,
    ONE_ARENA_ABOVE,
    activation_bytes,
    cache_folder,
    compile_cache_folder,
    compiler_options,
)
from llm_jax.config import load
from llm_jax.plan.hardware import HARDWARE

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import sys
from llm_jax import backend
from llm_jax.config import load
backend.MIN_COMPILE_SECONDS = 0.0
backend.start_backend()
backend.start_backend(load("", sys.argv[1:]))
import jax
print(float(jax.jit(lambda x: (x * x).sum())(jax.numpy.arange(5.0))), jax.numpy.ones(()).dtype)
"""


def compute(cache: Path, *overrides: str) -> tuple[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LLM_JAX_CACHE": str(cache)}
    command = [sys.executable, "-c", PROGRAM, *overrides]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


def test_compiled_programs_are_kept_and_damaged_ones_made_again(tmp_path):
    assert compute(tmp_path) == ("30.0 float32", "")
    kept = [path for path in tmp_path.rglob("*-cache") if path.is_file()]
    assert kept
    assert compute(tmp_path) == ("30.0 float32", "")
    for path in kept:
        path.write_bytes(b"damaged")
    out, err = compute(tmp_path)
    assert out == "30.0 float32" and "cache" in err


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    out, err = compute(tmp_path / "file")
    assert out == "30.0 float32"
    assert err.count("warning: compiled programs cannot be kept in") == 1 and "Traceback" not in err


def test_float64_turns_on_64_bits(tmp_path):
    assert compute(tmp_path, "precision.params=float64") == ("30.0 float64", "")


def test_one_arena_where_a_step_needs_much():
    """The sizes on which both ways were measured; and a vocabulary that is not known yet counts as large."""
    small = load("shakespeare_char:cpu")
    assert activation_bytes(small) < ONE_ARENA_ABOVE < activation_bytes(load("quickstart"))
    assert activation_bytes(load("shakespeare_char:cpu", ["data.tokenizer=a/tokenizer.json"])) > ONE_ARENA_ABOVE


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert compile_cache_folder().parent == tmp_path / "xla"
    monkeypatch.setenv("LLM_JAX_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "llm_jax"


def test_a_tpus_fusions_may_take_more_memory_where_its_size_is_known():
    assert compiler_options("tpu", "TPU v5") == {"xla_tpu_scoped_vmem_limit_kib": "49152"}
    assert compiler_options("tpu", "TPU v4") == compiler_options("gpu", "NVIDIA H100 80GB HBM3") == {}
    assert all(any(kind == one.kind for one in HARDWARE.values()) for kind in FUSION_MEMORY)
