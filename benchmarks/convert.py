"""Memory and time of converting a checkpoint shaped like LLaMA 3 8B, with fewer layers where the disk is small.

    python -m benchmarks.convert --folder=/big/disk [--layers=32] [--json=OUT]

A checkpoint of random bf16 numbers is made (1.05 GB each for embedding and head, 0.44 GB a layer; 32 layers: 16 GB). In
the same run it is copied file by file, which is what the disk can do at best, and converted to a run's folder; both
are written through to the disk; then the run is converted back. The seconds of processor time, of all threads, say how
much of the time was waiting, for the disk or for a core. Each conversion is a process of its own, whose largest
resident size is told beside that of the same process before it opened the checkpoint. The logits are not compared.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llm_jax.convert import families, safetensors
from llm_jax.convert.safetensors import Planned

CONFIG: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128_256, hidden_size=4096,
    intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
    rms_norm_eps=1e-5, rope_theta=500_000.0, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
SHARD_BYTES = 5 * 10**9


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint, one random tensor after another."""
    from llm_jax.convert import rules
    from llm_jax.models import registry
    from llm_jax.precision import Precision
    from llm_jax.sharding import Layout

    config = CONFIG | {"num_hidden_layers": layers}
    family = families.of_config(config, "config.json")
    cfg = family.config(config, "config.json")
    model = registry.build(cfg, Layout(), Precision())
    moves = rules.plan(list(family.rules(cfg, ())), cfg, model.shapes(), model.axes(), cfg.vocab_size)
    kind = np.dtype(ml_dtypes.bfloat16)
    planned = [Planned(move.theirs[0], kind, move.their_shapes[0]) for move in moves]
    draw = np.random.default_rng(0)

    def random(tensor: Planned) -> np.ndarray:
        bits = draw.integers(0, 1 << 16, tensor.shape, np.uint16)
        return (bits & np.uint16(0x807F) | np.uint16(0x3D00)).view(kind)  # sign and fraction random: 0.03 to 0.06

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.write_folder(folder, planned, random, largest=SHARD_BYTES)


def copy(source: Path, to: Path) -> tuple[float, float]:
    """Seconds, and of processor time, to copy the files through to the disk."""
    began, busy = time.monotonic(), time.process_time()
    to.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, to / path.name)
        with open(to / path.name, "rb") as stream:
            os.fsync(stream.fileno())
    return time.monotonic() - began, time.process_time() - busy


def convert(source: str, to: str, *, back: bool) -> tuple[float, float, int, int]:
    """In a process of its own: seconds, those of processor time, and resident bytes before and at most."""
    from llm_jax.errors import Unproven
    from llm_jax.training import convert

    before = resident()
    began, busy = time.monotonic(), time.process_time()
    with contextlib.suppress(Unproven):
        (convert.to_hub if back else convert.from_hub)(source, to, check=False)
    return time.monotonic() - began, time.process_time() - busy, before, peak()


def resident() -> int:
    """Bytes of this process in memory, once JAX has started."""
    import jax

    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(3, np.float32)))
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Most bytes so far; getrusage would tell the parent's, from before this process was made of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the files, so that both readers begin from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, layers: int) -> dict[str, Any]:
    source = folder / "source"
    make(source, layers)
    size = sum(path.stat().st_size for path in source.iterdir())
    largest = max(tensor.nbytes for tensor in safetensors.read_folder(source).values())
    drop_cache(source)
    copying, copying_cpu = copy(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    drop_cache(source)
    found = {
        "layers": layers,
        "source_GB": size / 1e9,
        "largest_tensor_GB": largest / 1e9,
        "copy_s": copying,
        "copy_cpu_s": copying_cpu,
        "copy_GB_s": size / 1e9 / copying,
    }
    for name, ends in (("convert", (source, folder / "run")), ("back", (folder / "run", folder / "back"))):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, busy, before, most = pool.submit(convert, *map(str, ends), back=name == "back").result()
        found |= {
            f"{name}_s": seconds,
            f"{name}_cpu_s": busy,
            f"{name}_share_of_copying": copying / seconds,
            f"{name}_resident_before_GB": before / 1e9,
            f"{name}_resident_peak_GB": most / 1e9,
            f"{name}_extra_over_largest": (most - before) / largest,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to measure")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for layers in args.layers:
        place = args.folder / f"{layers}_layers"
        try:
            rows.append(measure(place, layers))
        finally:
            shutil.rmtree(place, ignore_errors=True)
        print("  ".join(f"{key} {value:.3g}" for key, value in rows[-1].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
