"""Attention on a GPU: each back end's output and gradients against the formula in float32, and its time.

    python -m benchmarks.attention_gpu [--length=2048]

Errors are ||x - x_ref|| / ||x_ref|| of the output and of the three gradients together; the reference is
`reference_attention` in float32 with products of full precision, on the same card. Times are the median of a forward
and backward pass, bfloat16. A back end that declares that it lacks something has no line.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.attention import KERNELS, AttentionOptions, Kernel
from llm_jax.kernels.dense import reference_attention
from llm_jax.kernels.masks import AttentionMask, causal_mask

HEADS = {"16 heads of 64": (16, 16, 64), "32 heads of 128, 8 of keys": (32, 8, 128)}
KINDS = {  # causal, segments, window
    "causal": (True, False, 0),
    "causal, documents": (True, True, 0),
    "causal, window 256": (True, False, 256),
    "causal, window 256, documents": (True, True, 256),
    "both ways": (False, False, 0),
    "both ways, documents": (False, True, 0),
}


def make_mask(causal: bool, segments: bool, window: int, rows: int, length: int) -> AttentionMask:
    """Three documents of unlike lengths and some padding at the end."""
    ends = np.array([length // 5, length // 2, length - 37, length])
    ids = np.searchsorted(ends, np.arange(length), side="right") + 1
    ids = np.broadcast_to(np.where(ids > 3, 0, ids), (rows, length)).astype(np.int32)
    found = causal_mask(length, jnp.asarray(ids) if segments else None, window)
    return dataclasses.replace(found, causal=causal)


def forward_backward(attend: Callable[..., jax.Array], mask: AttentionMask) -> Callable[..., tuple]:
    """Output and gradients for a given cotangent; padding counts for nothing."""

    def both(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> tuple:
        if mask.query_segments is not None:
            cotangent = jnp.where(mask.query_segments[:, :, None, None] > 0, cotangent, 0)
        out, pull = jax.vjp(lambda *given: attend(*given, mask), query, key, value)
        if mask.query_segments is not None:
            out = jnp.where(mask.query_segments[:, :, None, None] > 0, out, 0)
        return out, pull(cotangent.astype(out.dtype))

    return jax.jit(both)


def error(found: tuple, expected: tuple) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    norms = [(np.linalg.norm(np.asarray(a, np.float64) - b), np.linalg.norm(b)) for a, b in pairs]
    return max(difference / size for difference, size in norms)


def median_time(function: Callable[..., tuple], arrays: tuple) -> float:
    jax.block_until_ready(function(*arrays))
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def reference(arrays: tuple, mask: AttentionMask) -> tuple:
    with jax.default_matmul_precision("highest"):
        wide = forward_backward(reference_attention, mask)(*(array.astype(jnp.float32) for array in arrays))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), wide)


def candidates(options: AttentionOptions) -> list[Kernel]:
    return [kernel for kernel in KERNELS if not kernel.lacks(options, "gpu") and not kernel.for_split]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    length, rows = parser.parse_args().length, 4
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {rows} rows of {length} tokens\n")
    print("| attention | heads | back end | error | ms forward and backward |\n| --- | --- | --- | --- | --- |")
    for name, (causal, segments, window) in KINDS.items():
        mask = make_mask(causal, segments, window, rows, length)
        for heads_name, (heads, kv_heads, size) in HEADS.items():
            keys = jax.random.split(jax.random.key(0), 4)
            shapes = [(rows, length, count, size) for count in (heads, kv_heads, kv_heads, heads)]
            arrays = tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))
            expected = reference(arrays, mask)
            options = AttentionOptions(
                segments=segments, window=window > 0, dtype="bfloat16", head_dim=size, heads=heads, kv_heads=kv_heads,
                length=length,
            )  # fmt: skip
            for kernel in candidates(options):
                both = forward_backward(kernel.attend, mask)
                found, milliseconds = error(both(*arrays), expected), 1e3 * median_time(both, arrays)
                print(f"| {name} | {heads_name} | {kernel.name} | {found:.1e} | {milliseconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
