"""The decoder-only language model: embed, blocks, norm, head."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import DecoderConfig
from llm_jax.config.kinds import layer_kinds
from llm_jax.kernels.context import zigzag_order
from llm_jax.kernels.cross_entropy import capped_logits, chunked_cross_entropy, cross_entropy
from llm_jax.kernels.experts import Routing
from llm_jax.kernels.masks import AttentionMask
from llm_jax.models.attention import Shared, choose_kernel
from llm_jax.models.layers import Embedding, Linear, block_norm, dropout, linear_init, product
from llm_jax.models.positions import relative_bucket, sinusoid
from llm_jax.models.transformer import Stack
from llm_jax.precision import Precision, at_least_float32
from llm_jax.sharding import Layout


def padded_vocab(cfg: DecoderConfig) -> int:
    """Rows of the embedding table: the vocabulary, rounded up to `vocab_multiple`."""
    return -(-cfg.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple


def possible_ids(cfg: DecoderConfig) -> int:
    """How many ids take part in the softmax."""
    return padded_vocab(cfg) if cfg.padded_vocab_in_softmax else cfg.vocab_size


class TokenLosses(NamedTuple):
    """What the next-token objective needs of each token.

    Attributes:
      loss: (B, T), -log p(target), smoothed where asked.
      log_z: (B, T), log of the softmax's denominator.
      correct: (B, T) bool, the target is the likeliest token.
      routing: of a mixture of experts, each row's statistics summed over layers; else None.
    """

    loss: jax.Array
    log_z: jax.Array
    correct: jax.Array
    routing: Routing | None = None


class Decoder(nn.Module):
    """A decoder-only transformer: next-token logits, or the losses of given targets."""

    cfg: DecoderConfig
    layout: Layout
    precision: Precision

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
        cache_length: int = 0,
    ) -> jax.Array:
        """Logits of the next token, (B, T, V) float32 (or float64), V the padded vocabulary; padded ids have -inf
        unless the config keeps them. Arguments as `trunk`."""
        x, head, _ = self.trunk(tokens, positions, segment_ids, dropout_key=dropout_key, cache_length=cache_length)
        return self._logits(x, head)

    def token_losses(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        rows: jax.Array | None = None,
        label_smoothing: float = 0.0,
        chunk: int = 0,
        dropout_key: jax.Array | None = None,
    ) -> TokenLosses:
        """The cross-entropy of `targets` (B, T); with `chunk`, logits exist for that many tokens of a row at a time.

        Where ring attention splits the rows, tokens are computed in the order that gives all devices equal work.
        """
        order = self._zigzag(tokens.shape[1], segment_ids, dropout_key)
        if order is None:
            x, head, routing = self.trunk(tokens, positions, segment_ids, rows=rows, dropout_key=dropout_key)
            return self._token_losses(x, head, targets, label_smoothing, chunk)._replace(routing=routing)
        tokens, targets, positions, segment_ids = (
            x if x is None else self.layout(x[:, order], "batch", "length")
            for x in (tokens, targets, positions, segment_ids)
        )
        x, head, routing = self.trunk(tokens, positions, segment_ids, order=order, rows=rows, dropout_key=dropout_key)
        found = self._token_losses(x, head, targets, label_smoothing, chunk)
        back = np.argsort(order)  # puts rows in order again
        found = (self.layout(x[:, back], "batch", "length") for x in (found.loss, found.log_z, found.correct))
        return TokenLosses(*found, routing)

    def _zigzag(self, length: int, segment_ids: jax.Array | None, dropout_key: jax.Array | None) -> np.ndarray | None:
        """(T,) which token of a row to compute at each place; None: as they stand."""
        cfg, parts = self.cfg, self.layout.activation_pieces("length")
        kernel = choose_kernel(
            cfg,
            self.layout,
            layer_kinds(cfg)[0],  # all kinds take the same order: `back_end.check_attention`
            segments=segment_ids is not None,
            length=length,
            dtype=self.precision.compute.name,
            dropout=dropout_key is not None and cfg.dropout.attention > 0,
        )
        return zigzag_order(length, parts) if kernel.zigzag and parts > 1 else None

    def _token_losses(
        self, x: jax.Array, head: jax.Array, targets: jax.Array, label_smoothing: float, chunk: int
    ) -> TokenLosses:
        if chunk:
            found = chunked_cross_entropy(
                x,
                head,
                targets,
                chunk=chunk,
                label_smoothing=label_smoothing,
                softcap=self.cfg.logits_softcap,
                vocab_size=possible_ids(self.cfg),
                layout=self.layout,
            )
            return TokenLosses(*found)
        logits = self._logits(x, head)
        loss, log_z = cross_entropy(logits, targets, label_smoothing)
        return TokenLosses(loss, log_z, logits.argmax(-1) == targets)

    @nn.compact
    def trunk(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        *,
        order: np.ndarray | None = None,
        rows: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        cache_length: int = 0,
    ) -> tuple[jax.Array, jax.Array, Routing | None]:
        """All but the product with the head.

        Args:
          tokens: (B, T) int32.
          positions: (B, T) int32, place of each token in its document; None: its place in the row. With a cache they
            are the slots written and read, and a place beyond the cache marks padding.
          segment_ids: (B, T) int32, document of each token in a packed row, 0 for padding; None: one document a row.
          order: (T,), which token of its row stands at each place; None: they stand in order.
          rows: (B,) int32, each row's number in the global batch, by which dropout goes; None: 0, 1, 2, ...
          dropout_key: None: no dropout.
          cache_length: slots of the key-value cache, for prefill and decoding; 0: none.

        Returns:
          x (B, T, D), the head (D, V) and the routing statistics of `TokenLosses`.
        """
        cfg = self.cfg
        if not cache_length and tokens.shape[1] > cfg.max_length:
            raise ValueError(f"rows of {tokens.shape[1]} tokens are longer than model.max_length={cfg.max_length}")
        index = jnp.arange(tokens.shape[1]) if order is None else jnp.asarray(order, jnp.int32)
        from_start = positions is None and order is None
        if positions is None:
            positions = jnp.broadcast_to(index[None], tokens.shape)
        if cache_length:
            mask = AttentionMask(positions, jnp.arange(cache_length))
        else:
            places = (index, index, segment_ids, segment_ids)
            mask = AttentionMask(*places, in_order=order is None)

        embedding = self._table("embedding", padded_vocab(cfg), cfg.embed_dim, ("vocab", "embed"), self._token_init())
        x = embedding(tokens)
        if cfg.embedding_scale:
            x = x * math.sqrt(cfg.embed_dim)
        x = self._add_positions(x, positions, from_start)
        x = self.layout(x, "batch", "residual_length", "embed")
        rows = jnp.arange(len(tokens)) if rows is None else rows
        embedding_key, stack_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        axes = ("batch", "residual_length", "embed")
        x = dropout(x, cfg.dropout.embedding, embedding_key, rows, self.layout, *axes, tokens=index)

        bias = self._relative_bias(mask) if cfg.positions == "relative" else None
        stack = Stack(cfg, self.layout, self.precision, name="stack")
        shared = Shared.of(cfg, mask, rows, positions, bias=bias)
        x, routing = stack(x, stack_key, shared, cache_length=cache_length)
        if cfg.norm_placement != "post":
            x = block_norm(cfg, self.precision, "final_norm")(x)
        return x, self._head(x, embedding), routing

    def _table(
        self, name: str, size: int, features: int, axes: tuple[str, str], initializer: nn.initializers.Initializer
    ) -> Embedding:
        return Embedding(size, features, axes, initializer, self.layout, self.precision, name=name)

    def _token_init(self) -> nn.initializers.Initializer:
        # A tied table is the head as well, so under torch's habit it starts as that linear layer does.
        if self.cfg.init == "torch" and self.cfg.tie_embeddings:
            return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
        return self._position_init()

    def _position_init(self) -> nn.initializers.Initializer:
        return nn.initializers.normal(1.0 if self.cfg.init == "torch" else self.cfg.init_std)

    def _add_positions(self, x: jax.Array, positions: jax.Array, from_start: bool) -> jax.Array:
        cfg = self.cfg
        if cfg.positions == "sinusoidal":
            return x + sinusoid(positions, cfg.embed_dim).astype(x.dtype)
        if cfg.positions == "learned":
            axes = ("position", "embed")
            table = self._table("positions", cfg.max_length, cfg.embed_dim, axes, self._position_init())
            if from_start:  # no look-up, whose backward pass would scatter
                return x + table.first(x.shape[1])[None]
            return x + table(jnp.minimum(positions, cfg.max_length - 1))
        return x

    def _relative_bias(self, mask: AttentionMask) -> jax.Array:
        """(1 or B, N, T, S): one learned number for each head and bucket of distance, shared by all layers."""
        cfg = self.cfg
        bucket = relative_bucket(mask.distance(), cfg.relative_buckets, cfg.relative_max_distance)
        init = nn.initializers.normal(cfg.init_std)
        table = self._table("relative_bias", cfg.relative_buckets, cfg.num_heads, ("buckets", "heads"), init)
        return at_least_float32(jnp.moveaxis(table(bucket), -1, 1))

    def _head(self, x: jax.Array, embedding: Embedding) -> jax.Array:
        if self.cfg.tie_embeddings:
            return embedding.head()
        parts = (self.layout, self.precision)
        head = Linear(padded_vocab(self.cfg), ("embed", "vocab"), linear_init(self.cfg), *parts, name="head")
        return head.weights(x.shape[-1])[0].astype(x.dtype)

    def _logits(self, x: jax.Array, head: jax.Array) -> jax.Array:
        logits = at_least_float32(self.layout(product(x, head, self.layout, wide=True), "batch", "length", "vocab"))
        return capped_logits(logits, self.cfg.logits_softcap, possible_ids(self.cfg))
