"""Which key each query may see. A mask is structure first (causal, window, segments), an array only where needed."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """The conditions under which query t sees key s; all of them must hold.

    Attributes:
      query_index: (T,) or (B, T) int32, place of each query in its row.
      key_index: (S,) int32, place of each key in its row.
      query_segments: (B, T) int32 or None. Tokens see only their own segment; 0 is padding and sees nothing.
      key_segments: (B, S) int32 or None.
      causal: query t sees keys with key_index <= query_index.
      window: if not 0, query t sees only the last `window` keys up to and including its own place.
    """

    query_index: jax.Array
    key_index: jax.Array
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})

    def distance(self) -> jax.Array:
        """(1 or B, T, S) int32: how far each key lies behind its query (negative: ahead)."""
        query_index = self.query_index if self.query_index.ndim == 2 else self.query_index[None]
        return query_index[:, :, None] - self.key_index[None, None, :]

    def dense(self) -> jax.Array:
        """(1 or B, T, S) bool: True where query t sees key s."""
        distance = self.distance()
        seen = jnp.ones(distance.shape, bool)
        if self.causal:
            seen &= distance >= 0
        if self.window:
            seen &= (distance >= 0) & (distance < self.window)
        if self.query_segments is not None:
            query, key = self.query_segments[:, :, None], self.key_segments[:, None, :]
            seen = seen & (query == key) & (query != 0)
        return seen


def causal_mask(length: int, segment_ids: jax.Array | None = None, window: int = 0) -> AttentionMask:
    """The mask of a decoder over whole rows of `length` tokens, packed ones where `segment_ids` (B, T) are given."""
    index = jnp.arange(length)
    return AttentionMask(index, index, segment_ids, segment_ids, window=window)
