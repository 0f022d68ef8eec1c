"""Tiny models, batches and comparisons that the tests of models, sharding, training and generation share."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import DecoderConfig, MeshConfig
from llm_jax.config.kinds import places
from llm_jax.models import registry
from llm_jax.models.registry import Model
from llm_jax.precision import Precision
from llm_jax.sharding import Layout, make_layout


def slow(*values):
    """One set of a test's parameters that CI alone runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


# XLA's CPU code generation is most of a test's time, and has no bearing on what most tests ask.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # later ones have no other way to make code


@contextlib.contextmanager
def quick_compiler():
    """The same for whole commands, which compile as they like."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def decoder(**changes) -> DecoderConfig:
    """Two layers of 16 numbers. Keys of sub-configs are written `rope=dict(...)`, `dropout=dict(...)`."""
    base = DecoderConfig(vocab_size=30, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24, max_length=16)
    changes = {
        name: dataclasses.replace(getattr(base, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(base, **changes)


def build(cfg: DecoderConfig, layout: Layout | None = None, dtype: str = "float32") -> Model:
    return registry.build(cfg, layout or Layout(), Precision(jnp.dtype(dtype), jnp.dtype(dtype)))


def mesh_layout(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, **others) -> Layout:
    """A layout over as many of the test machine's devices as the sizes need; `others`: more fields of MeshConfig."""
    cfg = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence, **others)
    return make_layout(cfg, jax.devices()[: data * fsdp * tensor * sequence * cfg.expert * cfg.stage])


def numbers(model: Model, seed: int = 0, scale: float = 0.3):
    """Parameters from numpy: they depend on path and shape alone, not on JAX's version. Norm scales lie round 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = scale * rng.normal(size=leaf.shape)
        return (values + ("scale" in jax.tree_util.keystr(path))).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


def unstacked(params, cfg):
    """Parameters of stacked layers as those of a model with `scan_layers=False`."""
    stacks = places(dataclasses.replace(cfg, scan_layers=True))
    layers = [jax.tree.map(lambda p, index=index: p[index], params["stack"][name]) for name, index in stacks]
    return params | {"stack": {f"block_{i}": layer for i, layer in enumerate(layers)}}


def packed(rows: int, length: int, vocab: int = 30, seed: int = 0, weights: bool = True) -> dict[str, np.ndarray]:
    """A batch of rows with several documents each and some padding; every third token or so has no weight."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        start = document = 0
        while start < length - row % 3:  # the last 0, 1 or 2 places are padding
            document += 1
            size = min(int(rng.integers(1, length)), length - row % 3 - start)
            segments[row, start : start + size] = document
            positions[row, start : start + size] = np.arange(size)
            start += size
    keep = rng.random((rows, length)) < 0.7 if weights else np.ones((rows, length), bool)
    return {
        "tokens": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "positions": positions,
        "segment_ids": segments,
        "loss_weights": (keep & (segments != 0)).astype(np.float32),
    }


def assert_close(a, b, rtol: float = 0.0, atol: float = 0.0):
    """Two trees with the same paths and close leaves.

    `atol` is relative to the largest number of each leaf of b, or to 1e-3 where all are smaller (the gradient of a bias
    on keys is nothing but rounding).
    """
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        largest = max(float(np.abs(y).max()), 1e-3)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol * largest, err_msg=jax.tree_util.keystr(path))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)
