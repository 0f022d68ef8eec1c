"""GPT-2 124M on one GPU: nanoGPT's own bench.py (PyTorch, torch.compile) and this project's step, side by side.

    python -m benchmarks.nanogpt_gpu --nanogpt=CHECKOUT [--rows=12,32] [--torch_python=PYTHON]

Both run rows of 1,024 random tokens in bfloat16 with AdamW. Ours also clips gradients and guards against bad steps.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.plan_measured import ROWS


def theirs(python: str, checkout: Path, rows: int) -> float:
    """Seconds a step."""
    command = [python, "bench.py", "--real_data=False", f"--batch_size={rows}"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    found = re.search(r"time per iteration: ([\d.]+)ms", done.stdout)
    if not found:
        raise SystemExit(f"nanoGPT's bench.py failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return float(found[1]) / 1000


def ours(rows: int, folder: Path) -> dict[str, float]:
    result = folder / f"{rows}.json"
    command = [sys.executable, "-m", "benchmarks.measured", str(result), "gpt2/124m:openwebtext", *ROWS,
               f"train.global_batch_size={rows}", "train.accumulation=1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"our step failed:\n{done.stderr[-3000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--rows", default="12,32")
    parser.add_argument("--torch_python", default=sys.executable, help="an interpreter that has torch")
    args = parser.parse_args()
    print("| rows | nanoGPT, ms | ours, ms | tokens/s, ours | ours over nanoGPT's speed |\n" + "| --- " * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for rows in map(int, args.rows.split(",")):
            peer, mine = theirs(args.torch_python, args.nanogpt, rows), ours(rows, Path(folder))
            speed = mine["tokens"] / mine["seconds"]
            print(f"| {rows} | {1e3 * peer:.1f} | {1e3 * mine['seconds']:.1f} | {speed:,.0f} | "
                  f"{peer / mine['seconds']:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
