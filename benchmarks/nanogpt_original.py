"""Runs the original nanoGPT for `nanogpt_cpu`: its own train.py, then its model over the whole validation split.

Executed by an interpreter that has torch, with nanoGPT's checkout as the working directory:
    python nanogpt_original.py SEED_OFFSET RESULT.json train.py's arguments...
"""

import json
import runpy
import sys

import numpy as np
import torch


def main() -> None:
    offset, result, *arguments = sys.argv[1:]
    seed = torch.manual_seed
    torch.manual_seed = lambda value: seed(value + int(offset))  # train.py's seed is no setting of its own
    sys.argv = ["train.py", *arguments]
    sys.path.insert(0, ".")
    run = runpy.run_path("train.py", run_name="__main__")

    model = run["model"].eval()
    tokens = torch.from_numpy(np.fromfile(f"{run['data_dir']}/val.bin", np.uint16).astype(np.int64))
    length, nats = run["block_size"], 0.0
    rows = (len(tokens) - 1) // length
    inputs, targets = tokens[: rows * length].view(rows, length), tokens[1 : rows * length + 1].view(rows, length)
    rest = slice(rows * length, len(tokens) - 1), slice(rows * length + 1, len(tokens))
    batches = [*zip(inputs.split(64), targets.split(64), strict=True), (tokens[rest[0]][None], tokens[rest[1]][None])]
    with torch.no_grad():
        for x, y in batches:
            if y.numel():
                nats += model(x, y)[1].item() * y.numel()
    with open(result, "w") as file:
        json.dump({"loss": nats / (len(tokens) - 1), "torch": torch.__version__}, file)


if __name__ == "__main__":
    main()
