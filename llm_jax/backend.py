"""JAX's process-wide settings, made by the command line before the first array: compile cache, 64 bits, quiet logs."""

import logging
import os
import platform
import zlib
from pathlib import Path

from llm_jax.config.schema import Config

MIN_COMPILE_SECONDS = 0.5  # what compiles faster is not worth a file


def cache_folder() -> Path:
    """Where everything that can be made again is kept: $LLM_JAX_CACHE, else ~/.cache/llm_jax."""
    return Path(os.environ.get("LLM_JAX_CACHE") or "~/.cache/llm_jax").expanduser().absolute()


def compile_cache_folder() -> Path:
    """One folder for each kind of CPU: XLA compiles for the instructions of the machine it runs on."""
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return cache_folder() / "xla" / f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


def start_backend(cfg: Config | None = None) -> None:
    """Set JAX up for this process. Calling it again, once the run's config is known, adds what the config asks for.

    A compile cache that cannot be read or written costs a warning and the time to compile, never the run.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only; read when jaxlib is loaded
    logging.getLogger("absl").setLevel(logging.ERROR)
    import jax

    jax.config.update("jax_compilation_cache_dir", str(compile_cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_raise_persistent_cache_errors", False)
    if cfg is not None and "float64" in (cfg.precision.params, cfg.precision.compute):
        jax.config.update("jax_enable_x64", True)
