"""What a conversion is compared with: logits of the source, stored beside it or taken from transformers.

`llm_jax_reference.safetensors` in a checkpoint's folder holds
  tokens     (B, T) int32   prompts
  positions  (P,) int32     the places whose logits are kept
  logits     (B, P, V) float32
and is written by `python -m llm_jax.convert.torch_reference FOLDER`, where torch and transformers are installed.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from llm_jax.convert import safetensors
from llm_jax.errors import ConversionMismatch, DataError

STORED = "llm_jax_reference.safetensors"
LONGEST = 512  # tokens of a prompt
TOLERANCE = 1e-4  # of the logits' spread, in float32


@dataclasses.dataclass(frozen=True)
class Reference:
    """Logits of the source. `origin`: where they come from, in words."""

    tokens: np.ndarray
    positions: np.ndarray
    logits: np.ndarray
    origin: str


@dataclasses.dataclass(frozen=True)
class Missing:
    """There is no reference, for this reason."""

    reason: str


def read(path: Path, origin: str) -> Reference:
    """Raises DataError where the file is not one of these."""
    tensors = safetensors.read_header(path)
    expected = {"tokens": ("int32", 2), "positions": ("int32", 1), "logits": ("float32", 3)}
    found = {name: (tensor.dtype.name, len(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise DataError(f"{path} is no stored reference: it holds {found}, and should hold {expected}")
    return Reference(*(tensors[name].read() for name in expected), origin)


def of_checkpoint(
    folder: Path, parameters: int, rounded: str | None, *, adapter: Path | None = None, merge: bool = False
) -> Reference | Missing:
    """The reference of a checkpoint's folder: what is stored there, else transformers, where it is installed.

    With an `adapter` what is stored in its folder counts.
    """
    stored = (adapter or folder) / STORED
    if stored.is_file() and not rounded:
        return read(stored, str(stored))
    return from_transformers(folder, parameters, rounded, adapter=adapter, merge=merge)


def from_transformers(
    folder: Path, parameters: int, rounded: str | None = None, *, adapter: Path | None = None, merge: bool = False
) -> Reference | Missing:
    """Logits that transformers computes in float32, in a process of its own: torch never enters this one.

    Args:
      rounded: the parameters are first rounded to this dtype, as the conversion did; not those of an adapter.
      adapter: a folder of the library peft, which is needed then too.
      merge: the adapter is merged before rounding.
    """
    needs = ("torch", "transformers", "peft") if adapter else ("torch", "transformers")
    lacking = [name for name in needs if importlib.util.find_spec(name) is None]
    if lacking:
        return Missing(f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed here")
    needed, there = 4 * parameters, available_memory()
    if there is not None and 1.2 * needed > there:
        return Missing(f"in float32 the model takes {needed / 1e9:.1f} GB, and {there / 1e9:.1f} GB of memory are free")
    path = folder.parent / f".{folder.name}.{os.getpid()}.{STORED}"
    command = [sys.executable, "-m", "llm_jax.convert.torch_reference", str(folder), f"--to={path}"]
    command += [f"--rounded={rounded}"] if rounded else []
    command += [f"--adapter={adapter}"] if adapter else []
    command += ["--merge"] if merge else []
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        if done.returncode:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            return Missing(f"transformers could not run the model ({lines[-1] if lines else 'no reason given'})")
        return read(path, "transformers and peft" if adapter else "transformers")
    finally:
        path.unlink(missing_ok=True)


def available_memory() -> int | None:
    """Bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def prompts(vocab_size: int, max_length: int, rows: int = 2) -> np.ndarray:
    """(rows, T) int32: the same random tokens everywhere."""
    return np.random.RandomState(0).randint(0, vocab_size, (rows, min(LONGEST, max_length))).astype(np.int32)


def kept_positions(length: int, vocab_size: int, budget: int = 64 << 20) -> np.ndarray:
    """Which places' logits are kept: all, or evenly spread ones up to the last, in `budget` bytes a row."""
    count = max(min(length, budget // (4 * vocab_size)), 1)
    return np.unique(np.linspace(length - 1, 0, count).round().astype(np.int32))


def compare(ours: np.ndarray, reference: Reference) -> str:
    """The largest difference relative to the logits' spread, as a sentence: their standard deviation, or a hundredth of
    their size where that is more.

    Raises ConversionMismatch where it is above `TOLERANCE`, or anything is not finite.
    """
    theirs = reference.logits.astype(np.float64)
    difference, spread = float(np.abs(ours - theirs).max()), float(theirs.std())
    spread = max(spread, 0.01 * float(np.sqrt(np.square(theirs).mean())))  # a few texts' scores may hardly differ
    relative = difference / max(spread, 1e-30)
    told = (
        f"largest difference of the logits {difference:.3g}, {relative:.2g} of their spread ({spread:.3g}), over "
        f"{len(theirs)} prompts of {reference.tokens.shape[1]} tokens against {reference.origin}"
    )
    if not relative <= TOLERANCE:  # NaN too
        raise ConversionMismatch(
            f"the converted model is not the source: {told}; at most {TOLERANCE:g} is allowed. Nothing was kept"
        )
    return f"checked: {told}"
