"""JAX's process-wide settings, made by the command line before the first array: compile cache, 64 bits, quiet logs."""

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import platform
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

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
    """Set JAX up for this process. Calling it again, once the run's config is known, adds what the config asks for."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only; read when jaxlib is loaded
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what we say in a sentence
    if runs_on_cpu():
        keep_freed_memory(cfg)
    import jax

    keep_compiled_programs()
    if cfg is not None and "float64" in (cfg.precision.params, cfg.precision.compute):
        jax.config.update("jax_enable_x64", True)


@functools.cache
def keep_compiled_programs() -> None:
    """Turn the compile cache on. One that cannot be used costs a warning and the time to compile, never the run."""
    import jax

    folder = compile_cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = "warning: compiled programs cannot be kept in %s (%s), so every start compiles them again"
        logging.getLogger(__name__).warning(text, folder, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_raise_persistent_cache_errors", False)


ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


ONE_ARENA_ABOVE = 48 * 2**20  # bytes: glibc's limit for an arena, less room for what else lies in it


def runs_on_cpu() -> bool:
    """Whether this process will compute on the CPU, told without starting JAX's back ends."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(plugin) for plugin in ACCELERATOR_PLUGINS)


def keep_freed_memory(cfg: Config | None) -> None:
    """Make malloc keep large blocks for the next step (glibc; elsewhere nothing happens).

    XLA:CPU allocates a step's buffers anew each time, and glibc gives blocks above 32 MiB back to the system: ten
    thousand page faults a step, which took a third of a small model's time. All its arenas but the first do so above
    64 MiB whatever they are told; so a step that needs more has one arena, which costs small steps a twentieth of
    their time. All this has to be said before threads start.
    """
    map_threshold, trim_threshold, arena_max = -3, -1, -8  # of glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(map_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        if cfg is not None and activation_bytes(cfg) > ONE_ARENA_ABOVE:
            libc.mallopt(arena_max, 1)


def activation_bytes(cfg: Config) -> int:
    """About what the activations of a step take: some thirty vectors a layer and token, and the logits twice.

    A tokenizer file that is yet to be read counts as a large one.
    """
    tokens = cfg.train.global_batch_size * cfg.data.sequence_length // cfg.train.accumulation
    made_here = {"byte": 257, "char": 256, "bpe": cfg.data.tokenizer_vocab_size}
    made_here["wordpiece"] = made_here["bpe"]
    vocab = cfg.model.vocab_size or made_here.get(cfg.data.tokenizer, 2**16)
    return 4 * tokens * (30 * cfg.model.num_layers * cfg.model.embed_dim + 2 * vocab)


# KiB of a TPU's vector memory that one fusion may take, by the device's kind. The compiler's own limit is 16 MiB; with
# these its estimated cycles of a LLaMA layer's products are a fifth less. v6e and tpu7x: as in their published recipes;
# v5p: the most with which it compiles. LIBTPU_INIT_ARGS may say another.
FUSION_MEMORY = {"TPU v5": 49_152, "TPU v6 lite": 98_304, "TPU7x": 65_536}


def compiled(lowered: Any) -> Any:
    """The program of a step or its evaluation (`jax.stages.Lowered`) for the devices of this process."""
    import jax

    options = compiler_options(jax.default_backend(), jax.devices()[0].device_kind)
    with warnings.catch_warnings():  # programs with oneDNN's products cannot be written into the compile cache
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache.*ToProto is not implemented")
        return lowered.compile(compiler_options=options)


def compiler_options(platform: str, kind: str) -> dict[str, bool | str | int]:
    """What XLA is told when it compiles a training step, or its evaluation, for devices of this platform and kind
    (`device_kind`).

    On CPUs, from jax 0.12 on: oneDNN's matrix products, and vectors of 512 bits. A small model's step takes 5 to 10 %
    less with them, and is compiled at every start, for such programs cannot be kept; before 0.12 they are slower than
    XLA's own.
    """
    import jax

    limit = "xla_tpu_scoped_vmem_limit_kib"
    if platform == "tpu" and kind in FUSION_MEMORY and limit not in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return {limit: str(FUSION_MEMORY[kind])}
    if platform != "cpu" or jax.__version_info__ < (0, 12):
        return {}
    return {
        "xla_cpu_use_onednn": True,
        "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
        "xla_cpu_prefer_vector_width": 512,
    }
