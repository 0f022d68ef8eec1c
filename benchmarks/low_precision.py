"""Loss curves of one small model with its linear layers' products in bfloat16, of int8 and of 8-bit floats.

    python -m benchmarks.low_precision [--json=OUT] [--steps=250]        needs: pip install 'llm-jax[qwix]'

Three runs of `--config=quickstart` with two layers and rows of 128 tokens, all else equal (seed, order of the data,
precision.compute=bfloat16); only `precision.products` differs. Training losses are means over the steps since the line
before. How fast 8 bits are depends on the machine; a CPU has no units for them, so no times are given.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import numpy as np

from llm_jax import metrics
from llm_jax.config import check, load
from llm_jax.training import train

PRODUCTS = ("native", "int8", "fp8")
LINES = 10
SMALL = (
    "model.num_layers=2", "model.max_length=128", "data.sequence_length=128", "precision.compute=bfloat16",
    "eval.batches=50", "checkpoint.every=0", "generate.max_tokens=0", "log.trackers=",
)  # fmt: skip


def curve(products: str, steps: int) -> list[dict[str, float]]:
    """The records of a run."""
    cfg = load("quickstart", [*SMALL, f"train.steps={steps}", f"eval.every={steps}", f"precision.products={products}"])
    check(cfg)
    with tempfile.TemporaryDirectory() as workdir:
        train.train(cfg, workdir)
        return metrics.read_jsonl(Path(workdir) / "metrics.jsonl")


def table(curves: dict[str, list[dict[str, float]]], steps: int) -> str:
    """A line for each piece of the run, and one for the held-out loss at the end."""
    rows = [f"{'steps':>12} " + " ".join(f"{name:>8}" for name in curves)]
    for i in range(LINES):
        first, last = steps * i // LINES + 1, steps * (i + 1) // LINES
        means = [
            np.mean([r["loss"] for r in records if "loss" in r and first <= r["step"] <= last])
            for records in curves.values()
        ]
        rows.append(f"{f'{first} to {last}':>12} " + " ".join(f"{mean:8.4f}" for mean in means))
    held_out = [next(r["eval/loss"] for r in reversed(records) if "eval/loss" in r) for records in curves.values()]
    rows.append(f"{'held out':>12} " + " ".join(f"{loss:8.4f}" for loss in held_out))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--steps", type=int, default=250, help="at least 70, for the schedule's sake")
    args = parser.parse_args()

    curves = {products: curve(products, args.steps) for products in PRODUCTS}
    print(f"\nLoss (nats a token), {jax.default_backend()}, jax {jax.__version__}\n\n{table(curves, args.steps)}")
    if args.json:
        kept = {
            name: [{key: r[key] for key in ("step", "loss", "eval/loss") if key in r} for r in records]
            for name, records in curves.items()
        }
        args.json.write_text(json.dumps({"jax": jax.__version__, "curves": kept}, indent=2) + "\n")


if __name__ == "__main__":
    main()
