"""`llm-jax doctor`: is this machine ready? One line a finding, marked ok, warn or fail, with what to do in words."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llm_jax import __version__
from llm_jax.backend import cache_folder, compile_cache_folder, start_backend

Finding = tuple[str, str]  # ("ok" | "warn" | "fail", sentence)

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections", "numpy", "tokenizers",
            "safetensors", "rich", "tensorboardX", "etils")  # fmt: skip
EXTRAS = {  # extra: (what it is for, modules)
    "data": ("parquet files and .zst compression", ("pyarrow", "zstandard")),
    "hf": ("hub datasets and sentencepiece tokenizers", ("datasets", "sentencepiece")),
    "tracking": ("Weights & Biases and MLflow", ("wandb", "mlflow")),
    "qwix": ("int8 and fp8 training", ("qwix",)),
    "parity": ("comparisons with PyTorch", ("torch", "transformers")),
    "test": ("the tests", ("pytest",)),
}
GIB = 2**30
LOW_MEMORY, LOW_DISK = 4 * GIB, 5 * GIB


def examine() -> int:
    """Print every finding; 1 if one of them stops training, else 0."""
    marks = []
    for find in (versions, devices, memory, folders, compile_cache, extras):
        for mark, sentence in find():
            print(f"{mark:<4}  {sentence}", flush=True)
            marks.append(mark)
    failed, warned = marks.count("fail"), marks.count("warn")
    verdict = f"{failed} to repair before training" if failed else "ready to train"
    print(f"\n{verdict}; {warned} warning{'' if warned == 1 else 's'}")
    return 1 if failed else 0


def versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield ("ok", f"llm_jax {__version__}, Python {python} ({sys.executable})") if supported else (
        "fail", f"Python {python} is not supported; install Python 3.11, 3.12 or 3.13")  # fmt: skip
    found, missing = [], []
    for name in REQUIRED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if found:
        yield "ok", ", ".join(found)
    if missing:
        yield "fail", f"missing packages: {', '.join(missing)}; install them with: pip install llm-jax"


def devices() -> Iterator[Finding]:
    try:
        start_backend()
        import jax

        found = jax.devices()
        total = float(jax.jit(lambda x: (x * x).sum())(jax.numpy.arange(4.0)))
    except Exception as error:  # whatever a broken driver or plug-in raises is the finding
        first_line = str(error).strip().split("\n")[0]
        yield "fail", f"JAX cannot use this machine's devices: {type(error).__name__}: {first_line}"
        return
    if total != 14.0:
        yield "fail", f"the sum of the squares of 0 to 3 came out as {total} instead of 14: do not train on this device"
    limit = (found[0].memory_stats() or {}).get("bytes_limit")
    each = f", {limit / GIB:.1f} GiB each" if limit else ""
    yield "ok", f"{len(found)} {found[0].platform} device{'s' * (len(found) > 1)} ({found[0].device_kind}){each}"
    if found[0].platform == "cpu" and shutil.which("nvidia-smi"):
        yield "warn", "there is an NVIDIA driver, but JAX uses the CPU; install: pip install 'llm-jax[cuda]'"
    elif found[0].platform == "cpu" and os.path.exists("/dev/accel0"):
        yield "warn", "there is a TPU, but JAX uses the CPU; install: pip install 'llm-jax[tpu]'"


def memory() -> Iterator[Finding]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not on this operating system
        return
    words = f"memory: {free / GIB:.1f} of {total / GIB:.1f} GiB free, {os.cpu_count()} CPU cores"
    yield ("ok", words) if total >= LOW_MEMORY else ("warn", f"{words}; small for more than the quickstart")


def folders() -> Iterator[Finding]:
    for purpose, folder, remedy in (
        ("cache", cache_folder(), "set LLM_JAX_CACHE to a folder of yours"),
        ("runs", Path("runs").absolute(), "change to a folder of yours or give --workdir"),
    ):
        problem = write_problem(folder)
        if problem:
            yield "fail", f"{purpose}: cannot write to {folder} ({problem}); {remedy}"
            continue
        free = shutil.disk_usage(nearest_existing(folder)).free
        words = f"{purpose}: {folder} is writable, {free / GIB:.1f} GiB free"
        yield ("ok", words) if free >= LOW_DISK else ("warn", f"{words}; checkpoints of larger models need more")


def compile_cache() -> Iterator[Finding]:
    folder = compile_cache_folder()
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    yield "ok", f"compile cache: {folder} holds {len(files)} files, {size / 2**20:.0f} MiB"


def extras() -> Iterator[Finding]:
    for extra, (purpose, modules) in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            fix = f"pip install 'llm-jax[{extra}]' if you need it"
            yield "ok", f"optional, for {purpose}: {', '.join(missing)} not installed; {fix}"
        else:
            yield "ok", f"optional, for {purpose}: {', '.join(modules)} installed"


def nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def write_problem(folder: Path) -> str:
    """Why nothing can be written to `folder`, or ""; leaves no trace."""
    existing = nearest_existing(folder)
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            return ""
    except OSError as error:
        return error.strerror or str(error)
