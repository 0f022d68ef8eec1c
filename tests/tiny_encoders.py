"""Tiny encoders and batches of short packed texts, for the tests of encoders."""

import dataclasses

import numpy as np

from llm_jax.config import EncoderConfig
from llm_jax.models.encoder import Texts

ROTARY = dict(positions="rotary", norm_placement="pre", bias="none", activation="geglu_erf", token_types=0)
DISENTANGLED = dict(positions="disentangled", relative_buckets=8, relative_max_distance=12, token_types=0)


def encoder(**changes) -> EncoderConfig:
    """Two layers of 16 numbers. `dropout=dict(...)` and the like change keys of sub-configs."""
    base = EncoderConfig(vocab_size=30, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24, max_length=16)
    changes = {
        name: dataclasses.replace(getattr(base, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(base, **changes)


def call(model, params, features, method, **more):
    """A method of an encoder on a text and whatever else `features` hold."""
    text = Texts(**{name: features[name] for name in Texts._fields if name in features})
    others = {name: value for name, value in features.items() if name not in Texts._fields}
    return model.apply(params, text, **others, **more, method=method)


def texts(rows: int, length: int, places: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of `places` short texts at most and some padding, with what the objectives of encoders read."""
    rng = np.random.default_rng(seed)
    shape = (rows, length)
    batch = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions", "token_types")}
    starts, there = np.zeros((rows, places), np.int32), np.zeros((rows, places), bool)
    for row in range(rows):
        start = 0
        for text in range(places):
            size = min(int(rng.integers(2, 2 * length // places)), length - row % 3 - start)
            if size < 2:
                break
            batch["segment_ids"][row, start : start + size] = text + 1
            batch["positions"][row, start : start + size] = np.arange(size)
            batch["token_types"][row, start + size // 2 : start + size] = 1
            starts[row, text], there[row, text] = start, True
            start += size
    masked = np.argsort(rng.random(shape), 1)[:, :places].astype(np.int32)
    real = np.take_along_axis(batch["segment_ids"], masked, 1) > 0
    return batch | {
        "tokens": rng.integers(0, 30, shape).astype(np.int32),
        "masked_positions": masked,
        "masked_targets": rng.integers(0, 30, masked.shape).astype(np.int32),
        "masked_weights": real.astype(np.float32),
        "starts": starts,
        "pair_labels": rng.integers(0, 2, starts.shape).astype(np.int32),
        "pair_weights": there.astype(np.float32),
        "labels": rng.integers(0, 2, starts.shape).astype(np.int32),
        "text_ids": np.where(there, np.arange(rows * places).reshape(rows, places), -1).astype(np.int32),
        "masked_draws": (rng.integers(0, 2**23, masked.shape) / 2**23).astype(np.float32),
    }
