"""Which key each query may see. A mask is structure first (causal, window, segments), an array only where needed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


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
      window: if not 0, query t sees only the last `window` keys up to and including its own place; where not causal,
        those at most window / 2 away on either side.
      in_order: both indices are known to be 0, 1, 2, ...: some back ends count places themselves.
    """

    query_index: jax.Array
    key_index: jax.Array
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})
    in_order: bool = dataclasses.field(default=False, metadata={"static": True})

    def of_queries(self, places: jax.Array) -> "AttentionMask":
        """That of the queries at `places` (B, P) of (B, T) alone."""
        query_index, query_segments = self.query_index, self.query_segments
        query_index = query_index if query_index.ndim == 2 else query_index[None]
        return dataclasses.replace(
            self,
            query_index=at(query_index, places),
            query_segments=None if query_segments is None else at(query_segments, places),
            in_order=False,
        )

    def check_in_order(self) -> None:
        """For back ends that count places themselves: raises ValueError where they would count other ones."""
        if not self.in_order:
            raise ValueError(
                "This attention takes tokens to stand in order, and its mask does not say that they do (AttentionMask."
                "in_order). Use reference attention, or ring attention, which go by the places in the mask."
            )

    def reach(self) -> tuple[int, int] | None:
        """How many keys behind and ahead of its own place the window lets a query see; None: there is no window."""
        if not self.window:
            return None
        return (self.window - 1, 0) if self.causal else (self.window // 2, self.window // 2)

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
            seen &= distance < self.window if self.causal else abs(distance) <= self.window // 2
        if self.query_segments is not None:
            query, key = self.query_segments[:, :, None], self.key_segments[:, None, :]
            seen = seen & (query == key) & (query != 0)
        return seen


def at(x: jax.Array, places: jax.Array) -> jax.Array:
    """(B, P, ...): of (1 or B, T, ...) what stands at places (B, P) of each row."""
    if len(x) == 1:  # of all rows alike: its gradient is of one row too
        return jnp.take(x[0], places, axis=0)
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)


def causal_mask(
    length: int, segment_ids: jax.Array | None = None, window: int = 0, order: np.ndarray | None = None
) -> AttentionMask:
    """The mask of a decoder over whole rows of `length` tokens.

    Args:
      segment_ids: (B, T) int32 of packed rows, as the tokens stand; None: one document a row.
      window: as in AttentionMask.
      order: (T,), the place of each token in its row, where tokens do not stand in order (`context.zigzag_order`).
    """
    index = jnp.arange(length) if order is None else jnp.asarray(order, jnp.int32)
    return AttentionMask(index, index, segment_ids, segment_ids, window=window, in_order=order is None)
