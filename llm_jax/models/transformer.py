"""A transformer block, which reads as its equation, and the stack of them."""

import flax.linen as nn
import jax

from llm_jax.config import DecoderConfig
from llm_jax.kernels.elementwise import gelu
from llm_jax.kernels.masks import AttentionMask
from llm_jax.models.attention import Attention
from llm_jax.models.layers import Dropout, Linear, block_norm, linear_init
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class MLP(nn.Module):
    """act(x W_up) W_down, or for the gated forms (act(x W_gate) * (x W_up)) W_down (arXiv 2002.05202)."""

    cfg: DecoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        width = cfg.mlp_dim or 4 * cfg.embed_dim
        wide = dict(
            axes=("embed", "mlp"), initializer=linear_init(cfg), precision=self.precision, use_bias=cfg.bias == "all"
        )
        up = self.layout(Linear(width, **wide, name="up")(x), "batch", "length", "mlp")
        if cfg.activation in ("swiglu", "geglu"):
            gate = self.layout(Linear(width, **wide, name="gate")(x), "batch", "length", "mlp")
            hidden = (jax.nn.silu(gate) if cfg.activation == "swiglu" else jax.nn.gelu(gate)) * up
        elif cfg.activation == "relu":
            hidden = jax.nn.relu(up)
        elif cfg.activation == "gelu_tanh":
            hidden = jax.nn.gelu(up)
        else:
            hidden = gelu(up)
        return Linear(
            cfg.embed_dim,
            ("mlp", "embed"),
            linear_init(cfg, residual=True),
            self.precision,
            use_bias=cfg.bias == "all",
            name="down",
        )(hidden)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream x (B, T, D); norms before (GPT-2 on) or after (2017)."""

    cfg: DecoderConfig
    layout: Layout
    precision: Precision
    train: bool
    cache_length: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask,
        angles: tuple[jax.Array, jax.Array] | None,
        bias: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        cfg, parts = self.cfg, (self.cfg, self.layout, self.precision)
        attention, mlp = Attention(*parts, name="attention"), MLP(*parts, name="mlp")
        norm1 = block_norm(cfg, self.precision, "attention_norm")
        norm2 = block_norm(cfg, self.precision, "mlp_norm")
        drop1 = Dropout(cfg.dropout.attention_output, self.layout)
        drop2 = Dropout(cfg.dropout.mlp_output, self.layout)

        def attend(x: jax.Array) -> jax.Array:
            y = attention(x, mask, angles, bias, train=self.train, cache_length=self.cache_length)
            return drop1(y, "batch", "length", "embed", train=self.train)

        def feed_forward(x: jax.Array) -> jax.Array:
            return drop2(mlp(x), "batch", "length", "embed", train=self.train)

        if cfg.norm_placement == "pre":
            x = x + attend(norm1(x))
            x = x + feed_forward(norm2(x))
        else:
            x = norm1(x + attend(x))
            x = norm2(x + feed_forward(x))
        return self.layout(x, "batch", "length", "embed"), None


class Stack(nn.Module):
    """`num_layers` blocks: one compiled block looped over stacked parameters (`scan_layers`), or each on its own."""

    cfg: DecoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: AttentionMask,
        angles: tuple[jax.Array, jax.Array] | None,
        bias: jax.Array | None,
        *,
        train: bool,
        cache_length: int = 0,
    ) -> jax.Array:
        cfg = self.cfg
        block = Block
        if cfg.remat != "none":
            # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
            block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=not cfg.scan_layers)
        fields = (cfg, self.layout, self.precision, train, cache_length)
        if not cfg.scan_layers:
            for layer in range(cfg.num_layers):
                x, _ = block(*fields, name=f"block_{layer}")(x, mask, angles, bias)
            return x
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scanned(*fields, name="blocks")(x, mask, angles, bias)
        return x
