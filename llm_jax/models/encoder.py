"""The bidirectional encoder: embed, blocks, and the head that the config names."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config import EncoderConfig
from llm_jax.kernels.cross_entropy import cross_entropy
from llm_jax.kernels.masks import AttentionMask
from llm_jax.models.attention import Shared
from llm_jax.models.decoder import padded_vocab
from llm_jax.models.disentangled import log_bucket
from llm_jax.models.generator import Generator, draw, generator_config
from llm_jax.models.heads import Dense, LabelHead, MaskedHead, PairsHead, ReplacedHead
from llm_jax.models.layers import Embedding, block_norm, dropout
from llm_jax.models.positions import relative_bucket, sinusoid
from llm_jax.models.transformer import Stack, hidden_states
from llm_jax.precision import Precision, at_least_float32
from llm_jax.sharding import Layout


class Texts(NamedTuple):
    """Rows of one text or several each, as an encoder reads them.

    Attributes:
      tokens: (B, T) int32.
      positions: (B, T) int32, place of each token in its text; None: its place in the row.
      segment_ids: (B, T) int32, the text of each token in a packed row, 0 for padding; None: one text a row.
      token_types: (B, T) int32, which text of a pair; None: all the first. A model with fewer types takes its last one
        for those beyond, a model without any passes them over.
      rows: (B,) int32, each row's number in the global batch, by which dropout goes; None: 0, 1, 2, ...
    """

    tokens: jax.Array
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    token_types: jax.Array | None = None
    rows: jax.Array | None = None

    @classmethod
    def of(cls, batch: Mapping[str, jax.Array]) -> "Texts":
        """The texts of a batch, from its features; a batch with no "rows" begins at row 0."""
        return cls(batch["tokens"], batch["positions"], batch["segment_ids"], batch["token_types"], batch.get("rows"))

    @property
    def row_numbers(self) -> jax.Array:
        """(B,) int32: `rows`, or each row's place."""
        return jnp.arange(len(self.tokens)) if self.rows is None else self.rows


class Encoder(nn.Module):
    """A transformer in which every token sees its whole text, with one head (`model.head`).

    Where methods take
      dropout_key: None is no dropout.
      starts: (B, S) int32, the place of each text's first token; where a row has fewer texts, any place will do.
    """

    cfg: EncoderConfig
    layout: Layout
    precision: Precision

    def setup(self) -> None:
        cfg, parts = self.cfg, (self.cfg, self.layout, self.precision)
        width = cfg.embedding_dim or cfg.embed_dim
        self.embedding = self._table(padded_vocab(cfg), width, ("vocab", "embed"))
        if cfg.positions == "learned":
            self.positions = self._table(cfg.first_position + cfg.max_length, width, ("position", "embed"))
        if cfg.token_types:
            self.token_types = self._table(cfg.token_types, width, ("position", "embed"))
        if cfg.embedding_norm:
            self.embedding_norm = block_norm(cfg, self.precision)
        if width != cfg.embed_dim:
            self.embedding_projection = Dense(*parts, cfg.embed_dim)
        if cfg.positions == "relative":
            self.relative_bias = self._table(cfg.relative_buckets, cfg.num_heads, ("buckets", "heads"))
        if cfg.positions == "disentangled":
            self.relative = self._table(cfg.relative_buckets, cfg.embed_dim, ("buckets", "embed"))
            self.relative_norm = block_norm(cfg, self.precision)
        self.stack = Stack(*parts)
        if cfg.norm_placement != "post":
            self.final_norm = block_norm(cfg, self.precision)
        if cfg.head in ("masked", "masked_pairs"):
            self.masked = MaskedHead(*parts)
        if cfg.head == "masked_pairs":
            self.pairs = PairsHead(*parts)
        if cfg.head in ("text", "token", "pooled"):
            self.labels = LabelHead(*parts)
        if cfg.head == "replaced":
            self.replaced = ReplacedHead(*parts)
        if cfg.generator_divisor:
            self.generator = Generator(generator_config(cfg), self.layout, self.precision)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`hidden` of tokens (B, T) int32, one text a row. Initialized by it, a model has its head's parameters too."""
        texts = Texts(tokens)
        x = self.hidden(texts)
        if self.is_initializing():
            self._make_head(x, texts)
        return x

    def hidden(self, texts: Texts) -> jax.Array:
        """The hidden states above the last block, (B, T, D)."""
        return self._hidden(texts, None)[0]

    def masked_losses(
        self,
        texts: Texts,
        masked_positions: jax.Array,
        masked_targets: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        starts: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Of the tokens that stood at places (B, P), masked_targets (B, P): -log p and whether the likeliest is right.

        Returns:
          (B, P) at least float32, (B, P) bool, and with `starts` (B, S, 2) logits of pairs, else None.
        """
        read = masked_positions if starts is None else jnp.concatenate([masked_positions, starts], axis=1)
        x, _ = self._hidden(texts, dropout_key, read)
        masked, firsts = jnp.split(x, [masked_positions.shape[1]], axis=1)
        logits = self._masked_logits(masked)
        loss, _ = cross_entropy(logits, masked_targets)
        pairs = None if starts is None else self.pairs(firsts)
        return loss, logits.argmax(-1) == masked_targets, pairs

    def masked_logits(self, texts: Texts, masked_positions: jax.Array) -> jax.Array:
        """The logits (B, P, V) of the tokens at places (B, P), V the padded vocabulary; padded ids have -inf."""
        x, _ = self._hidden(texts, None, masked_positions)
        return self._masked_logits(x)

    def text_logits(self, texts: Texts, starts: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Scores of each text, (B, S, num_labels); of a pooled head what a classifier would read, (B, S, D)."""
        mean = self.cfg.head_pooling == "mean"
        read = None if mean else starts
        x, key = self._hidden(texts, dropout_key, read)
        x = self._mean(x, starts, texts.segment_ids) if mean else x
        return self.labels(x, key, texts.row_numbers)

    def token_logits(self, texts: Texts, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Scores of each token, (B, T, num_labels)."""
        x, key = self._hidden(texts, dropout_key)
        return self.labels(x, key, texts.row_numbers)

    def embeddings(self, texts: Texts, starts: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """The mean of each text's hidden states, (B, S, D) (Sentence-BERT, arXiv 1908.10084)."""
        x, _ = self._hidden(texts, dropout_key)
        return self._mean(x, starts, texts.segment_ids)

    def replaced_logits(self, texts: Texts, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits of each token's having been exchanged for another, (B, T)."""
        x, _ = self._hidden(texts, dropout_key)
        return self.replaced(x)

    def replaced_tokens(
        self,
        texts: Texts,
        masked_positions: jax.Array,
        masked_targets: jax.Array,
        masked_weights: jax.Array,
        masked_draws: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
        """ELECTRA (arXiv 2003.10555, section 2): the places (B, P) of some weight are filled with tokens drawn by
        `masked_draws` (B, P) in [0, 1), and the encoder tells which tokens are not the text's own.

        They are drawn from what the generator makes of the hidden text, or without one from the vocabulary, evenly.

        Returns:
          `replaced_logits` of the filled text, (B, T); whether each token is another than the text's, (B, T) bool; and
          of a generator -log p of masked_targets, (B, P) at least float32, and whether its likeliest is right, (B, P).
        """
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        vocab_size = self.cfg.vocab_size
        if self.cfg.generator_divisor:
            x, shared = self._embedded(texts, keys[0])
            logits = self.generator(x, self.embedding.head(), shared, masked_positions, keys[1])
            drawn = draw(jax.lax.stop_gradient(logits), masked_draws, vocab_size)
            generator = cross_entropy(logits, masked_targets)[0], logits.argmax(-1) == masked_targets
        else:
            drawn, generator = jnp.floor(masked_draws * vocab_size).astype(jnp.int32), None
        places = jnp.where(masked_weights > 0, masked_positions, texts.tokens.shape[1])  # beyond the row: dropped
        hidden = jnp.asarray(texts.tokens).at[jnp.arange(len(places))[:, None], places]
        fill = lambda values: hidden.set(values, mode="drop")  # noqa: E731
        seen = fill(drawn)
        told = self.replaced_logits(texts._replace(tokens=seen), dropout_key=keys[2])
        return told, seen != fill(masked_targets), generator

    # ------------------------------------------------------------------------------------------ the trunk

    def _hidden(
        self, texts: Texts, dropout_key: jax.Array | None, read: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The hidden states (B, T, D), or those at places `read` (B, P), and the key of the head's dropout."""
        cfg = self.cfg
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        x, shared = self._embedded(texts, keys[0])
        if cfg.embedding_dim not in (0, cfg.embed_dim):
            x = self.layout(self.embedding_projection(x), "batch", "residual_length", "embed")
        norm = None if cfg.norm_placement == "post" else self.final_norm
        return hidden_states(self.stack, norm, x, keys[1], shared, read), keys[2]

    def _embedded(self, texts: Texts, key: jax.Array | None) -> tuple[jax.Array, Shared]:
        """What the first block reads, (B, T, E) before it is projected, and what all blocks do. `key`: of dropout."""
        cfg, length, rows = self.cfg, texts.tokens.shape[1], texts.row_numbers
        if length > cfg.max_length:
            raise ValueError(f"rows of {length} tokens are longer than model.max_length={cfg.max_length}")
        index = jnp.arange(length)
        mask = AttentionMask(index, index, texts.segment_ids, texts.segment_ids, causal=False, in_order=True)
        x = self._embed(texts)
        axes = ("batch", "residual_length", "embed")
        x = dropout(self.layout(x, *axes), cfg.dropout.embedding, key, rows, self.layout, *axes, tokens=index)
        places = jnp.broadcast_to(index[None], texts.tokens.shape) if texts.positions is None else texts.positions
        return x, self._shared(mask, rows, places)

    def _embed(self, texts: Texts) -> jax.Array:
        """Token + type + position, and their norm: (B, T, D), or narrower where they are projected."""
        cfg, length = self.cfg, texts.tokens.shape[1]
        positions, token_types = texts.positions, texts.token_types
        x = self.embedding(texts.tokens)
        if cfg.embedding_scale:
            x = x * math.sqrt(x.shape[-1])
        if cfg.token_types:
            none = token_types is None
            types = self.token_types.first(1)[None]
            x = x + (types if none else self.token_types(jnp.minimum(token_types, cfg.token_types - 1)))
        if cfg.positions == "learned":  # no look-up where they stand in order, whose backward pass would scatter
            none, first = positions is None, cfg.first_position
            x = x + (self.positions.first(first + length)[None, first:] if none else self.positions(first + positions))
        if cfg.positions == "sinusoidal":
            places = jnp.arange(length)[None] if positions is None else positions
            x = x + sinusoid(places, x.shape[-1]).astype(x.dtype)
        return self.embedding_norm(x) if cfg.embedding_norm else x

    def _shared(self, mask: AttentionMask, rows: jax.Array, positions: jax.Array) -> Shared:
        """What all blocks read. `positions` (B, T)."""
        cfg = self.cfg
        bias = relative = None
        if cfg.positions == "relative":
            buckets = (cfg.relative_buckets, cfg.relative_max_distance)
            bucket = relative_bucket(mask.distance(), *buckets, causal=False)
            bias = at_least_float32(jnp.moveaxis(self.relative_bias(bucket), -1, 1))
        if cfg.positions == "disentangled":
            vectors = self.relative_norm(self.relative.first(cfg.relative_buckets))
            relative = vectors, log_bucket(mask.distance()[0], cfg.relative_buckets, cfg.relative_max_distance)
        return Shared.of(cfg, mask, rows, positions, bias=bias, relative=relative)

    # ------------------------------------------------------------------------------------------ the heads

    def _make_head(self, x: jax.Array, texts: Texts) -> None:
        """Run the head once on the text's hidden states, (B, T, D), so that its parameters are made."""
        match self.cfg.head:
            case "masked" | "masked_pairs":
                self._masked_logits(x)
                if self.cfg.head == "masked_pairs":
                    self.pairs(x)
            case "text" | "token" | "pooled":
                self.labels(x, None, texts.row_numbers)
            case "replaced":
                self.replaced(x)
        if self.cfg.generator_divisor:
            embedded, shared = self._embedded(texts, None)
            self.generator(embedded, self.embedding.head(), shared, texts.tokens[:, :1], None)

    def _masked_logits(self, x: jax.Array) -> jax.Array:
        return self.masked(x, self.embedding.head())

    def _mean(self, x: jax.Array, starts: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """(B, S, D): the mean of the vectors (B, T, D) of the texts that begin at `starts` (B, S)."""
        if segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        text = jnp.take_along_axis(segment_ids, starts, axis=1)
        members = (segment_ids[:, None] == text[:, :, None]) & (text[:, :, None] != 0)
        total = jnp.einsum("bst,btd->bsd", members.astype(x.dtype), x, preferred_element_type=at_least_float32(x).dtype)
        mean = total / jnp.maximum(members.sum(-1, keepdims=True), 1)
        return self.layout(mean.astype(x.dtype), "batch", None, "embed")

    def _table(self, size: int, features: int, axes: tuple[str, str]) -> Embedding:
        init = nn.initializers.normal(1.0 if self.cfg.init == "torch" else self.cfg.init_std)
        return Embedding(size, features, axes, init, self.layout, self.precision)
