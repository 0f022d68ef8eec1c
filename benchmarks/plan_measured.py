"""What `llm-jax plan` predicts for settings of one GPU beside what they take on it.

    python -m benchmarks.plan_measured --json=OUT [--only=N,...]

Each setting is compiled from shapes alone for the card by name, as on a machine without it, and its step is then run on
the card, in a process of its own so that peak memory starts from nothing (benchmarks/measured.py).
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from llm_jax.config import load
from llm_jax.plan.compile import Job
from llm_jax.plan.estimate import Estimate, estimate_compiled
from llm_jax.plan.hardware import HARDWARE, topology
from llm_jax.plan.setting import make_setting

ROWS = ("mesh.fsdp=1", "mesh.data=1", "checkpoint.every=0")
SETTINGS = {
    "GPT-2 124M, 32 rows of 1,024, layers in a loop": (
        "gpt2/124m:openwebtext", "train.global_batch_size=32", "train.accumulation=1", "model.scan_layers=True",
    ),
    "the same, 4 documents a row": (
        "gpt2/124m:openwebtext", "train.global_batch_size=32", "train.accumulation=1", "model.scan_layers=True",
        "data.mask_documents=True", "data.packing=concat",
    ),
    "LLaMA-2 7B's width, 8 layers, 4 rows of 4,096, remat dots": (
        "llama2/7b", "model.num_layers=8", "train.global_batch_size=4", "train.accumulation=1", "model.remat=dots",
        "data.mask_documents=False",
    ),
    "LLaMA-3 8B's width, 4 layers, 8 rows of 8,192 by 4, full remat": (
        "llama3/8b", "model.num_layers=4", "train.global_batch_size=8", "train.accumulation=4", "model.remat=full",
        "data.mask_documents=False",
    ),
    "Mixtral, a quarter of its width, 8 layers, 8 rows of 4,096, full remat": (
        "mixtral/8x7b", "model.num_layers=8", "model.embed_dim=1024", "model.mlp_dim=3584", "model.num_heads=8",
        "model.num_kv_heads=2", "train.global_batch_size=8", "train.accumulation=1", "model.remat=full",
        "data.mask_documents=False",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    predicted: Estimate
    measured: dict[str, Any]

    def cells(self) -> list[str]:
        seconds, bytes_ = self.measured["seconds"], self.measured["peak_bytes"]
        found = self.predicted
        peak = HARDWARE[found.setting.machine.hardware.name].flops
        mfu = found.setting.flops.total * found.setting.tokens / seconds / peak
        parts = [f"{getattr(found.times, part):.3f}" for part in ("matrix", "kernel", "memory")]
        return [
            self.name, f"{seconds:.3f}", f"{found.times.total:.3f}", f"{found.times.total / seconds - 1:+.0%}", *parts,
            f"{bytes_ / 1e9:.1f}", f"{found.memory.total / 1e9:.1f}", f"{found.memory.total / bytes_ - 1:+.0%}",
            f"{mfu:.0%}",
        ]  # fmt: skip


def table(pairs: list[Pair]) -> str:
    head = ["setting", "measured, s", "predicted, s", "error", "matrix", "kernels", "memory", "peak, GB",
            "predicted, GB", "error", "MFU reached"]  # fmt: skip
    rows = [head, ["---"] * len(head), *(pair.cells() for pair in pairs)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def run(name: str, spec: tuple[str, ...], folder: Path) -> dict[str, Any] | None:
    """Measured in a process of its own; None, with the reason on stderr, where it fails."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.measured", str(result), spec[0], *spec[1:], *ROWS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: {done.stderr[-1500:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--only", default="", help="numbers of settings, from 1, with commas; all where left out")
    parser.add_argument("--card", default="", help="by hardware.py's name; found by JAX where left out")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # a process that has the card keeps most of its memory

    chosen = [int(number) - 1 for number in args.only.split(",") if number] or range(len(SETTINGS))
    specs = [list(SETTINGS.items())[number] for number in chosen]
    card = args.card or name_of_card()
    machine = topology(f"{card}:1x1")
    settings = [make_setting(load(config, (*overrides, *ROWS)), machine) for _, (config, *overrides) in specs]
    jobs = [Job(setting) for setting in settings]
    while not all([job.poll() for job in jobs]):
        time.sleep(0.2)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for (name, spec), setting, job in zip(specs, settings, jobs, strict=True):
            measured = run(name, spec, Path(folder))
            if measured is None or job.result().refused:
                continue
            pairs.append(Pair(name, estimate_compiled(setting, job.result()), measured))
            print(" | ".join(pairs[-1].cells()), flush=True)
    if not pairs:
        raise SystemExit("no setting could be measured")
    print(f"\n{pairs[0].measured['device']}, jax {pairs[0].measured['jax']}\n\n{table(pairs)}")
    figures = {pair.name: pair.measured | {"predicted_seconds": pair.predicted.times.total} for pair in pairs}
    args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def name_of_card() -> str:
    """In a process of its own: one that has the card keeps most of its memory."""
    command = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    found = [name for name, hardware in HARDWARE.items() if hardware.kind == kind]
    if not found:
        raise SystemExit(f"no card {kind!r} is described in llm_jax/plan/hardware.py")
    return found[0]


if __name__ == "__main__":
    main()
