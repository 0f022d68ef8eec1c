"""A transformer block, which reads as its equation, and the stack of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.config import DecoderConfig
from llm_jax.kernels.elementwise import GATED, activate
from llm_jax.kernels.experts import Routing
from llm_jax.models.attention import Attention, Shared
from llm_jax.models.layers import Linear, block_norm, dropout, linear_init
from llm_jax.models.moe import MoE
from llm_jax.models.pipeline import pipeline
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_policy(cfg: DecoderConfig) -> Callable[..., Any]:
    """What the backward pass finds kept, in device memory or in the host's; all else of a block it computes again."""
    if cfg.remat == "names":
        in_host = [name.removesuffix("=host") for name in cfg.remat_save if name.endswith("=host")]
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[name for name in cfg.remat_save if "=" not in name],
            names_which_can_be_offloaded=in_host,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return REMAT_POLICIES[cfg.remat]


class MLP(nn.Module):
    """act(x W_up) W_down, or for the gated forms (act(x W_gate) * (x W_up)) W_down (arXiv 2002.05202)."""

    cfg: DecoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        width = cfg.mlp_dim or 4 * cfg.embed_dim
        wide = (width, ("embed", "mlp"), linear_init(cfg), self.layout, self.precision, cfg.bias == "all")
        up = self.layout(Linear(*wide, name="up")(x), "batch", "length", "mlp")
        up, gate = checkpoint_name(up, "mlp_up"), None
        if cfg.activation in GATED:
            gate = self.layout(Linear(*wide, name="gate")(x), "batch", "length", "mlp")
            gate = checkpoint_name(gate, "mlp_gate")
        hidden = activate(cfg.activation, up, gate)
        return Linear(
            cfg.embed_dim,
            ("mlp", "embed"),
            linear_init(cfg, residual=True),
            self.layout,
            self.precision,
            use_bias=cfg.bias == "all",
            name="down",
        )(hidden)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream x (B, T, D); norms before (GPT-2 on) or after (2017)."""

    cfg: DecoderConfig
    layout: Layout
    precision: Precision
    cache_length: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None, shared: Shared) -> tuple[jax.Array, Routing | None]:
        """x and, of a mixture of experts, this layer's routing statistics. `key`: of dropout; None: no dropout."""
        cfg, parts = self.cfg, (self.cfg, self.layout, self.precision)
        x = checkpoint_name(x, "layer_input")
        attention = Attention(*parts, name="attention")
        norm1 = block_norm(cfg, self.precision, "attention_norm")
        norm2 = block_norm(cfg, self.precision, "mlp_norm")
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)

        def attend(x: jax.Array) -> jax.Array:
            y = attention(x, keys[0], shared, cache_length=self.cache_length)
            return self._drop(y, cfg.dropout.attention_output, keys[1], shared)

        def feed_forward(x: jax.Array) -> tuple[jax.Array, Routing | None]:
            if cfg.moe.num_experts:
                mask, drop = shared.mask, not self.cache_length
                y, routing = MoE(*parts, name="moe")(x, mask.query_segments, places=mask.query_index, drop=drop)
            else:
                y, routing = MLP(*parts, name="mlp")(x), None
            return self._drop(y, cfg.dropout.mlp_output, keys[2], shared), routing

        if cfg.norm_placement == "pre":
            x = x + attend(norm1(x))
            y, routing = feed_forward(norm2(x))
            x = x + y
        else:
            x = norm1(x + attend(x))
            y, routing = feed_forward(x)
            x = norm2(x + y)
        return self.layout(x, "batch", "residual_length", "embed"), routing

    def _drop(self, y: jax.Array, rate: float, key: jax.Array | None, shared: Shared) -> jax.Array:
        axes = ("batch", "residual_length", "embed")
        return dropout(y, rate, key, shared.rows, self.layout, *axes, tokens=shared.mask.query_index)


class Stack(nn.Module):
    """`num_layers` blocks: one compiled block looped over stacked parameters (`scan_layers`), or each on its own.

    On a mesh with stages the loop is a pipeline. Not so with a cache: each layer's parameters go to all stages then.
    """

    cfg: DecoderConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(
        self, x: jax.Array, key: jax.Array | None, shared: Shared, *, cache_length: int = 0
    ) -> tuple[jax.Array, Routing | None]:
        """x after all blocks, and the sum of their routing statistics."""
        cfg = self.cfg
        block = Block
        if cfg.remat != "none":
            # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
            block = nn.remat(Block, policy=remat_policy(cfg), prevent_cse=not cfg.scan_layers)
        fields = (cfg, self.layout, self.precision, cache_length)
        layers = jnp.arange(cfg.num_layers)
        keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, layers)
        if not cfg.scan_layers:
            routings = []
            for layer in range(cfg.num_layers):
                layer_key = None if keys is None else keys[layer]
                x, routing = block(*fields, name=f"block_{layer}")(x, layer_key, shared)
                routings.append(routing)
            return x, jax.tree.map(lambda *parts: sum(parts), *routings)
        if self.layout.stages > 1 and not cache_length and not self.is_initializing():
            return self._pipeline(x, keys, shared)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, routings = scanned(*fields, name="blocks")(x, keys, shared)
        return x, jax.tree.map(lambda parts: parts.sum(0), routings)

    def _pipeline(self, x: jax.Array, keys: jax.Array | None, shared: Shared) -> tuple[jax.Array, Routing | None]:
        cfg, layout = self.cfg, self.layout
        module = Block(cfg, layout, self.precision, parent=None)
        policy = None

        def block(params: Any, x: jax.Array, key: jax.Array | None, shared: Shared) -> tuple[jax.Array, Any]:
            return module.apply({"params": params}, x, key, shared)

        if cfg.remat != "none":
            policy = remat_policy(cfg)
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        return pipeline(
            block,
            self.get_variable("params", "blocks"),
            x,
            keys,
            shared,
            batched=has_rows(shared),
            policy=policy,
            stages=layout.stages,
            repeats=layout.stage_repeats,
            microbatches=layout.stage_microbatches,
            layout=layout,
        )


def has_rows(shared: Shared) -> Shared:
    """For each array of `shared`, whether it has an axis of the batch's rows."""
    mask, rows = shared.mask, len(shared.rows)
    found = jax.tree.map(lambda _: True, shared)
    indices = {name: getattr(mask, name).ndim == 2 for name in ("query_index", "key_index")}
    bias = None if shared.bias is None else len(shared.bias) == rows
    return dataclasses.replace(found, mask=dataclasses.replace(found.mask, **indices), bias=bias)
