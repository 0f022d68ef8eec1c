"""What stands on top of an encoder: masked tokens, pairs of texts, labels of texts and tokens, exchanged tokens.

Heads compute in the model's dtype without quantised products, and have no adapters: they train whole.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config import EncoderConfig
from llm_jax.kernels.cross_entropy import capped_logits
from llm_jax.kernels.elementwise import GATED, activate
from llm_jax.models.decoder import possible_ids
from llm_jax.models.layers import Linear, block_norm, dropout, linear_init, named, product
from llm_jax.precision import Precision, at_least_float32
from llm_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Form:
    """How `head_form` reads a vector before the classifier.

    Attributes:
      activation: act in act(x W + b).
      dropout: there is one before that layer too.
      norm: there is a norm behind it.
      tokens: labels of tokens are read through that layer as well.
    """

    activation: str
    dropout: bool = False
    norm: bool = False
    tokens: bool = False


FORMS = {
    "bert": Form("tanh"),
    "roberta": Form("tanh", dropout=True),
    "distilbert": Form("relu"),
    "electra": Form("gelu", dropout=True),
    "deberta": Form("gelu"),
    "modernbert": Form("gelu", norm=True, tokens=True),
}


class Dense(nn.Module):
    """act(x W + b), then a norm or not: (B, P, in) to (B, P, features)."""

    cfg: EncoderConfig
    layout: Layout
    precision: Precision
    features: int
    activation: str = ""
    norm: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        parts = (linear_init(self.cfg), self.layout, self.precision)
        linear = Linear(self.features, ("embed", "norm"), *parts, use_bias=self.use_bias, name="linear")
        kernel, bias = linear.weights(x.shape[-1])
        x = product(x, kernel.astype(x.dtype), self.layout)
        if bias is not None:
            x = x + bias.astype(x.dtype)[None, None]
        if self.activation:
            x = jnp.tanh(x) if self.activation == "tanh" else activate(self.activation, x)
        return block_norm(self.cfg, self.precision, "norm")(x) if self.norm else x


def head_activation(cfg: EncoderConfig) -> str:
    """That of the blocks, or GELU where they are gated."""
    return "gelu" if cfg.activation in GATED else cfg.activation


class MaskedHead(nn.Module):
    """norm(act(x W + b)) E^T + c with the embedding E (arXiv 1810.04805, appendix A.2): (B, P, D) to (B, P, V)."""

    cfg: EncoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """`table` (E, V): the embedding, transposed; used where it is tied. Padded ids have -inf."""
        cfg, parts = self.cfg, (self.layout, self.precision)
        width, vocab = table.shape
        dense = Dense(cfg, *parts, width, head_activation(cfg), norm=True, use_bias=cfg.bias == "all", name="dense")
        x = dense(x)
        if not cfg.tie_embeddings:
            table = Linear(vocab, ("embed", "vocab"), linear_init(cfg), *parts, name="decoder").weights(width)[0]
        bias = self.param("bias", named(nn.initializers.zeros, "vocab"), (vocab,), self.precision.params)
        logits = product(x, table.astype(x.dtype), self.layout, wide=True)
        logits = at_least_float32(self.layout(logits, "batch", None, "vocab"))
        return capped_logits(logits + bias.astype(logits.dtype)[None, None], cfg.logits_softcap, possible_ids(cfg))


class PairsHead(nn.Module):
    """Whether a text's second part follows its first: (B, S, D) of first tokens to (B, S, 2) logits, yes first."""

    cfg: EncoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        parts = (self.cfg, self.layout, self.precision)
        x = Dense(*parts, self.cfg.embed_dim, "tanh", name="pooler")(x)
        return at_least_float32(Dense(*parts, 2, name="classifier")(x))


class LabelHead(nn.Module):
    """Scores of texts or tokens: (B, P, D) to (B, P, num_labels), at least float32; of a pooled head (B, P, D)."""

    cfg: EncoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None, rows: jax.Array) -> jax.Array:
        """`key`: of dropout; None: no dropout. `rows` (B,): the rows' numbers in the global batch."""
        cfg, parts, form = self.cfg, (self.cfg, self.layout, self.precision), FORMS[self.cfg.head_form]
        keys = (None, None) if key is None else jax.random.split(key)

        def drop(x: jax.Array, key: jax.Array | None) -> jax.Array:
            return dropout(x, cfg.head_dropout, key, rows, self.layout, "batch", None, "embed")

        if cfg.head in ("text", "pooled") or form.tokens:
            x = drop(x, keys[0]) if form.dropout else x
            use_bias = not form.norm or cfg.bias == "all"
            x = Dense(*parts, cfg.embed_dim, form.activation, form.norm, use_bias, name="pooler")(x)
        if cfg.head == "pooled":
            return x
        return at_least_float32(Dense(*parts, cfg.num_labels, name="classifier")(drop(x, keys[1])))


class ReplacedHead(nn.Module):
    """Whether tokens were exchanged (ELECTRA, arXiv 2003.10555, section 2.1): (B, T, D) to logits (B, T)."""

    cfg: EncoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        parts = (self.cfg, self.layout, self.precision)
        x = Dense(*parts, self.cfg.embed_dim, head_activation(self.cfg), name="dense")(x)
        return at_least_float32(Dense(*parts, 1, name="classifier")(x)[..., 0])
