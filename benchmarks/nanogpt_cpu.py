"""The CPU recipe of nanoGPT's README, the original PyTorch code and this project side by side.

    python -m benchmarks.nanogpt_cpu --nanogpt=CHECKOUT --data=input.txt --json=OUT --torch_python=PYTHON

Both train 2,001 updates of a 4-layer character model from three seeds, in turn (original, ours, original, ...), and
both are evaluated over the whole validation split. Speed is the median step of each run; ratios are taken pair by pair,
since the machine's own speed drifts. The checkout is not changed: it is run from a temporary copy, as a process.
"""

import argparse
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TOKENS_A_STEP = 12 * 64
ORIGINAL_ARGUMENTS = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
]  # fmt: skip


def prepare_original(checkout: Path, data: Path, folder: Path) -> None:
    """A copy of the checkout with the data as its own prepare.py would write them."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git"))
    text = data.read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = {character: number for number, character in enumerate(characters)}
    tokens = np.array([ids[character] for character in text], np.uint16)
    target = folder / "data" / "shakespeare_char"
    split = int(len(tokens) * 0.9)
    tokens[:split].tofile(target / "train.bin")
    tokens[split:].tofile(target / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": ids}
    (target / "meta.pkl").write_bytes(pickle.dumps(meta))


def run_original(python: str, folder: Path, seed: int, steps: int) -> dict[str, float]:
    driver, result = Path(__file__).with_name("nanogpt_original.py").resolve(), folder / "result.json"
    arguments = [*ORIGINAL_ARGUMENTS, f"--max_iters={steps}", f"--lr_decay_iters={steps}"]
    command = [python, str(driver), str(seed), str(result), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the original failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    times = [float(value) for value in re.findall(r"time ([\d.]+)ms", done.stdout)][20:]
    return summary(json.loads(result.read_text())["loss"], times)


def run_ours(python: str, data: Path, folder: Path, seed: int, steps: int, overrides: list[str]) -> dict[str, float]:
    workdir = folder / f"ours{seed}"
    command = [python, "-m", "llm_jax.cli", "train", "--config=shakespeare_char:cpu", f"--workdir={workdir}"]
    changes = {"data.path": data.resolve(), "seed": 1337 + seed, "train.steps": steps + 1, "log.every": 10}
    changes |= {"optim.decay_steps": steps, "generate.max_tokens": 0}
    command += [f"--config.{key}={value}" for key, value in changes.items()] + overrides
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"our run failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = [1000 * record["seconds_per_step"] for record in records if "seconds_per_step" in record][2:]
    return summary([record["eval/loss"] for record in records if "eval/loss" in record][-1], times)


def summary(loss: float, milliseconds: list[float]) -> dict[str, float]:
    median = statistics.median(milliseconds)
    return {
        "validation_loss": loss,
        "median_ms": median,
        "minimum_ms": min(milliseconds),
        "tokens_per_second": TOKENS_A_STEP / median * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--data", type=Path, required=True, help="the text to train on")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has llm_jax's dependencies")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2_000)
    args, overrides = parser.parse_known_args()

    pairs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_original(args.nanogpt, args.data, folder / "original")
        print(f"{'seed':>5} {'':>9} {'validation':>10} {'median ms':>10} {'minimum ms':>11} {'tokens/s':>9}")
        for seed in range(args.seeds):
            original = run_original(args.torch_python, folder / "original", seed, args.steps)
            ours = run_ours(args.python, args.data, folder, seed, args.steps, overrides)
            for name, run in (("original", original), ("ours", ours)):
                print(
                    f"{1337 + seed:>5} {name:>9} {run['validation_loss']:>10.4f} {run['median_ms']:>10.1f} "
                    f"{run['minimum_ms']:>11.1f} {run['tokens_per_second']:>9,.0f}",
                    flush=True,
                )
            pairs.append({"seed": 1337 + seed, "original": original, "ours": ours})

    def mean(side: str, name: str) -> float:
        return statistics.mean(pair[side][name] for pair in pairs)

    ratios = [pair["ours"]["tokens_per_second"] / pair["original"]["tokens_per_second"] for pair in pairs]
    result = {
        "pairs": pairs,
        "loss_original": mean("original", "validation_loss"),
        "loss_ours": mean("ours", "validation_loss"),
        "speed_ratios": ratios,
        "speed_ratio": statistics.median(ratios),
    }
    print(
        f"validation loss, mean: original {result['loss_original']:.4f}, ours {result['loss_ours']:.4f}; tokens/s, "
        f"ours over the original's: {', '.join(f'{ratio:.2f}' for ratio in ratios)}, median {result['speed_ratio']:.2f}"
    )
    args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
