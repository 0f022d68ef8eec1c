"""Splash attention: JAX's own flash attention for TPUs, which skips the blocks of scores that a mask rules out.

It is written in Pallas (jax.experimental.pallas.ops.tpu.splash_attention). XLA cannot split a Pallas kernel, so each
device runs it on its own rows and heads.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)
from jax.sharding import PartitionSpec

from llm_jax.kernels.masks import AttentionMask
from llm_jax.kernels.split import Split

LANES = 128  # width of a TPU's vector registers: blocks are multiples of it
BLOCK = 512


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: AttentionMask,
    split: Split,
    *,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`reference_attention` of whole rows in memory linear in the length; scores and all sums in float32.

    Args:
      query: (B, T, N, H), with T a multiple of 128.
      key, value: (B, T, K, H), with N a multiple of K.
      mask: of tokens that stand in order.
      split: how B and N are split; T is not.
      softcap: c in c*tanh(scores/c); 0 leaves them.
      sinks: (N,) scores of keys without a value, or None.
      interpret: run the kernel as XLA operations, which any machine can: for tests.

    Returns:
      (B, T, N, H), in the dtype of `query`. Queries of padding get a finite value that nothing may use.
    """
    mask.check_in_order()
    split.check(query, key)

    def local(
        query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, sinks: jax.Array | None
    ) -> jax.Array:
        _, length, heads, size = query.shape
        kernel = _kernel(length, heads, mask.causal, mask.reach(), softcap, interpret)
        # Segment 0 sees itself here, as any other: the softmax of a row that sees nothing would be 0 / 0.
        ids = None if segments is None else SegmentIds(segments, segments)
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * size**-0.5, key, value))
        out = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(query, key, value, ids, sinks)
        return jnp.swapaxes(out, 1, 2)

    segments = None if mask.query_segments is None else PartitionSpec(split.batch_axes)
    specs = (split.heads, split.heads, split.heads, segments, None if sinks is None else split.sinks)
    return split.run(local, specs, split.heads)(query, key, value, mask.query_segments, sinks)


@functools.lru_cache(maxsize=8)
def _kernel(
    length: int, heads: int, causal: bool, reach: tuple[int, int] | None, softcap: float, interpret: bool
) -> Callable[..., jax.Array]:
    """The kernel for one row. It goes through all blocks of the mask first, in Python, so it is made once."""
    mask = band(length, reach) if causal or reach else FullMask((length, length))
    with jax.ensure_compile_time_eval():  # its tables are arrays, not parts of the trace that made it
        return make_splash_mha_single_device(
            MultiHeadMask([mask] * heads),
            block_sizes=_block_sizes(length),
            attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )


def band(length: int, reach: tuple[int, int] | None) -> LocalMask:
    """The mask of a row whose queries see as many keys behind and ahead; None: all behind, the causal mask."""
    return _Diagonals((length, length), window_size=reach or (None, 0), offset=0)


class _Diagonals(LocalMask):
    """A block of scores depends on its distance from the diagonal alone, so each kind is worked out once: all of a
    LocalMask of 131,072 tokens would take minutes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._blocks: dict[tuple[int, int, int], np.ndarray] = {}

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        kind = (rows.start - columns.start, rows.stop - rows.start, columns.stop - columns.start)
        if kind not in self._blocks:
            self._blocks[kind] = super().__getitem__(index)
        return self._blocks[kind]


def _block_sizes(length: int) -> BlockSizes:
    """Blocks of 512 by 512 scores, or the next smaller that divide the length."""
    size = next(size for size in (BLOCK, BLOCK // 2, LANES) if length % size == 0)
    return BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
