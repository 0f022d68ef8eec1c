"""ELECTRA's generator (Clark et al. 2020, arXiv 2003.10555): a small encoder that learns to fill hidden places, and
from which the tokens are drawn that a discriminator has to tell from a text's own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config import EncoderConfig
from llm_jax.models.attention import Shared
from llm_jax.models.heads import Dense, MaskedHead
from llm_jax.models.layers import block_norm
from llm_jax.models.transformer import Stack, hidden_states
from llm_jax.precision import Precision
from llm_jax.sharding import Layout


def generator_config(cfg: EncoderConfig) -> EncoderConfig:
    """The generator beside a discriminator: as deep, on the same embeddings (section 3.1), its width, heads and MLP
    `generator_divisor` times smaller (section 3.2)."""
    parts = cfg.generator_divisor
    return dataclasses.replace(
        cfg,
        embed_dim=cfg.embed_dim // parts,
        num_heads=cfg.num_heads // parts,
        num_kv_heads=cfg.num_kv_heads // parts,
        mlp_dim=cfg.mlp_dim // parts,
        embedding_dim=cfg.embedding_dim or cfg.embed_dim,
        head="masked",
        generator_divisor=0,
    )


class Generator(nn.Module):
    """From the embeddings of a text with hidden places to the logits of what stands there.

    `cfg` is the generator's own (`generator_config`).
    """

    cfg: EncoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(
        self, x: jax.Array, table: jax.Array, shared: Shared, places: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """(B, T, E) to (B, P, V), at least float32; padded ids have -inf.

        Args:
          table: (E, V), the embedding, transposed.
          places: (B, P) int32.
          key: of dropout; None: no dropout.
        """
        cfg, parts = self.cfg, (self.cfg, self.layout, self.precision)
        if x.shape[-1] != cfg.embed_dim:
            x = Dense(*parts, cfg.embed_dim, name="embedding_projection")(x)
            x = self.layout(x, "batch", "residual_length", "embed")
        norm = None if cfg.norm_placement == "post" else block_norm(cfg, self.precision, "final_norm")
        x = hidden_states(Stack(*parts, name="stack"), norm, x, key, shared, places)
        return MaskedHead(*parts, name="masked")(x, table)


def draw(logits: jax.Array, chance: jax.Array, vocab_size: int) -> jax.Array:
    """Tokens (B, P) int32 drawn from softmax(logits), (B, P, V): the first whose cumulative probability exceeds
    `chance` (B, P), multiples of 2**-23 in [0, 1). No gradient goes through the choice (section 2)."""
    total = jnp.cumsum(jnp.exp(logits - logits.max(-1, keepdims=True)), axis=-1)
    found = jnp.argmax(total > chance[..., None] * total[..., -1:], axis=-1).astype(jnp.int32)
    return jnp.minimum(found, vocab_size - 1)  # behind it lie padded ids, where the sum may be rounded up once more
