"""Writes gpt2_reference.npz: logits and the losses of ten AdamW steps of transformers' GPT-2 in torch.

Weights and batches are drawn by numpy's RandomState, whose stream never changes, so they need not be stored.

    python tests/golden/make_gpt2_reference.py
"""

import math
import pathlib

import numpy as np

PATH = pathlib.Path(__file__).with_name("gpt2_reference.npz")
CONFIG = dict(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, activation_function="gelu_new")
ROWS, STEPS, WARMUP, PEAK, FINAL = 4, 10, 2, 1e-2, 1e-3
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0


def batch(step: int, rows: int = ROWS, length: int = CONFIG["n_positions"], vocab: int = CONFIG["vocab_size"]):
    """(tokens, targets): (rows, length) int32. Every token follows from the one before, so there is much to learn."""
    draw = np.random.RandomState(1000 + step)
    tokens = [draw.randint(0, vocab, rows)]
    for _ in range(length):
        tokens.append((3 * tokens[-1] + 7 + (draw.rand(rows) < 0.1)) % vocab)
    tokens = np.stack(tokens, 1).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A float32 array for each name: small normal numbers, norm scales round 1."""
    made = {}
    for number, name in enumerate(sorted(shapes)):
        values = 0.1 * np.random.RandomState(number).standard_normal(shapes[name])
        made[name] = (values + (".ln_" in name and name.endswith("weight"))).astype(np.float32)
    return made


def rate(i: int, steps: int = STEPS, warmup: int = WARMUP) -> float:
    """Warm-up (i+1)/(w+1), then a cosine that ends at the last step."""
    if i < warmup:
        return PEAK * (i + 1) / (warmup + 1)
    return FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * (i - warmup) / (steps - 1 - warmup))) / 2


def adamw(model, batches, rates) -> list[float]:
    """Losses of training `model` in torch: AdamW, matrices and embeddings decayed, gradients clipped to norm 1."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS)
    losses = []
    for (tokens, targets), learning_rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        logits = model(torch.from_numpy(tokens).long()).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def gpt2():
    """transformers' GPT-2 of `CONFIG` with our weights, dropout off."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**CONFIG, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights(shapes).items()}, strict=False)
    model.tie_weights()
    return model, shapes


if __name__ == "__main__":
    import torch

    model, shapes = gpt2()
    with torch.no_grad():
        logits = model(torch.from_numpy(batch(0)[0]).long()).logits.numpy()
    losses = adamw(model, [batch(i) for i in range(STEPS)], [rate(i) for i in range(STEPS)])
    names = sorted(shapes)
    np.savez_compressed(PATH, logits=logits, losses=losses, names=names, shapes=[str(shapes[name]) for name in names])
    print(f"wrote {PATH}: losses {losses[0]:.4f} to {losses[-1]:.4f}")
