"""Writes adamw.json beside it: ten AdamW steps of torch, for the default tests to compare with. Needs torch."""

import json
import math
import pathlib

import torch

STEPS, WARMUP, PEAK, FINAL = 10, 3, 1e-2, 1e-3
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0


def rate(i: int) -> float:
    """Warm-up (i+1)/(w+1), then a cosine that ends at the last step."""
    if i < WARMUP:
        return PEAK * (i + 1) / (WARMUP + 1)
    return FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * (i - WARMUP) / (STEPS - 1 - WARMUP))) / 2


def start(seed: int, *shape: int) -> torch.Tensor:
    """Smooth numbers of a seed, without a random generator whose stream could change."""
    n = math.prod(shape)
    return torch.sin(torch.arange(n, dtype=torch.float32) * (0.7 + 0.1 * seed) + seed).reshape(shape)


def run() -> dict[str, list]:
    """Parameters after ten steps; the gradient of step i is start(10 + i) + 0.1 * parameter."""
    params = {"matrix": start(1, 4, 3), "vector": start(2, 5)}
    params = {name: value.requires_grad_() for name, value in params.items()}
    groups = [
        {"params": [params["matrix"]], "weight_decay": WEIGHT_DECAY},
        {"params": [params["vector"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS)
    for i in range(STEPS):
        for value in params.values():
            value.grad = start(10 + i, *value.shape) + 0.1 * value.detach()
        torch.nn.utils.clip_grad_norm_(params.values(), CLIP)
        for group in adamw.param_groups:
            group["lr"] = rate(i)
        adamw.step()
    return {name: value.detach().double().tolist() for name, value in params.items()}


if __name__ == "__main__":
    path = pathlib.Path(__file__).with_name("adamw.json")
    path.write_text(json.dumps(run(), indent=1) + "\n")
    print(f"wrote {path}")
