"""A transformer block, which reads as its equation, and the stack of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.config import TransformerConfig
from llm_jax.config.kinds import LayerKind, Segment, layer_kinds, places, segments
from llm_jax.kernels.elementwise import GATED, activate
from llm_jax.kernels.experts import Routing
from llm_jax.kernels.masks import at
from llm_jax.models.attention import Attention, Shared
from llm_jax.models.latent import LatentAttention
from llm_jax.models.layers import Linear, block_norm, dropout, linear_init
from llm_jax.models.loop import over_layers
from llm_jax.models.moe import MoE
from llm_jax.models.pipeline import pipeline
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_policy(cfg: TransformerConfig) -> Callable[..., Any]:
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

    cfg: TransformerConfig
    layout: Layout
    precision: Precision
    dim: int = 0  # width; 0: cfg's

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        width = self.dim or cfg.mlp_dim or 4 * cfg.embed_dim
        wide = (width, ("embed", "mlp"), linear_init(cfg), self.layout, self.precision, cfg.bias == "all")
        up = self.layout(Linear(*wide, name="up")(x), "batch", "length", "mlp")
        up, gate = checkpoint_name(up, "mlp_up"), None
        if cfg.activation in GATED:
            gate = self.layout(Linear(*wide, name="gate")(x), "batch", "length", "mlp")
            gate = checkpoint_name(gate, "mlp_gate")
        down = Linear(
            cfg.embed_dim,
            ("mlp", "embed"),
            linear_init(cfg, residual=True),
            self.layout,
            self.precision,
            use_bias=cfg.bias == "all",
            name="down",
        )
        return checkpoint_name(down(activate(cfg.activation, up, gate)), "mlp_output")


class Block(nn.Module):
    """Attention f and MLP g, each added to the residual stream x (B, T, D), with norms n, m, n', m' as cfg says:

    pre       x = x + f(n(x));  x = x + g(m(x))           GPT-2, LLaMA
    post      x = n(x + f(x));  x = m(x + g(x))           arXiv 1706.03762, BERT
    output    x = x + n(f(x));  x = x + m(g(x))           OLMo 2 (arXiv 2501.00656)
    sandwich  x = x + n'(f(n(x)));  x = x + m'(g(m(x)))   Gemma 2 (arXiv 2408.00118)
    parallel  x = x + f(n(x)) + g(m(x))                   GPT-J, GPT-NeoX (arXiv 2204.06745)
    """

    cfg: TransformerConfig
    layout: Layout
    precision: Precision
    kind: LayerKind
    cache_length: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, key: jax.Array | None, shared: Shared, read: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """x and, of a mixture of experts, this layer's routing statistics. `key`: of dropout; None: no dropout.

        With `read` (B, P) x at these places alone, (B, P, D): attention still sees all keys (`reads_alone`).
        """
        cfg, parts = self.cfg, (self.cfg, self.layout, self.precision)
        x = checkpoint_name(x, "layer_input")
        form = LatentAttention if cfg.latent.kv_rank else Attention
        attention = form(*parts, self.kind, name="attention")
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        mask = shared.mask if read is None else shared.mask.of_queries(read)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return block_norm(cfg, self.precision, name)(x)

        def attend(x: jax.Array) -> jax.Array:
            some = {} if read is None else {"read": read}
            y = attention(x, keys[0], shared, cache_length=self.cache_length, **some)
            return drop(y, cfg.dropout.attention_output, keys[1])

        def feed_forward(x: jax.Array) -> tuple[jax.Array, Routing | None]:
            if cfg.moe.num_experts and not self.kind.dense:
                places, limited = mask.query_index, not self.cache_length
                y, routing = MoE(*parts, name="moe")(x, mask.query_segments, places=places, drop=limited)
                if cfg.moe.shared_dim:
                    y = y + MLP(*parts, cfg.moe.shared_dim, name="shared_mlp")(x)
            else:
                y, routing = MLP(*parts, name="mlp")(x), None
            return drop(y, cfg.dropout.mlp_output, keys[2]), routing

        def drop(y: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
            axes = ("batch", "residual_length", "embed")
            return dropout(y, rate, key, shared.rows, self.layout, *axes, tokens=mask.query_index)

        def kept(x: jax.Array) -> jax.Array:
            return x if read is None else at(x, read)

        match cfg.norm_placement:
            case "pre":
                x = kept(x) + attend(norm("attention_norm", x) if self.kind.attention_norm else x)
                y, routing = feed_forward(norm("mlp_norm", x))
                x = x + y
            case "post":
                x = norm("attention_norm", kept(x) + attend(x))
                y, routing = feed_forward(x)
                x = norm("mlp_norm", x + y)
            case "output":
                x = kept(x) + norm("attention_norm", attend(x))
                y, routing = feed_forward(x)
                x = x + norm("mlp_norm", y)
            case "sandwich":
                x = kept(x) + norm("attention_output_norm", attend(norm("attention_norm", x)))
                y, routing = feed_forward(norm("mlp_norm", x))
                x = x + norm("mlp_output_norm", y)
            case "parallel":
                y, routing = feed_forward(norm("mlp_norm", kept(x)))
                x = kept(x) + attend(norm("attention_norm", x)) + y
        return self.layout(x, "batch", "residual_length", "embed"), routing


def reads_alone(cfg: TransformerConfig) -> bool:
    """Whether the last block can compute some tokens alone, on a mesh that keeps rows whole.

    A block in a loop over layers does what the others do, latent and disentangled attention and experts take whole
    rows.
    """
    whole = cfg.scan_layers or cfg.latent.kv_rank or cfg.positions == "disentangled" or cfg.moe.num_experts
    return not whole


class Stack(nn.Module):
    """`num_layers` blocks: looped over stacked parameters (`scan_layers`), or each with its own.

    `segments` says which stacks there are. On a mesh with stages the loop over "blocks" is a pipeline, and every stage
    computes the others. Not so with a cache: each layer's parameters go to all stages then.
    """

    cfg: TransformerConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None,
        shared: Shared,
        *,
        cache_length: int = 0,
        read: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """x after all blocks, and the sum of their routing statistics.

        With `read` (B, P), where `reads_alone`, the last block computes the tokens at these places alone, and x is
        (B, P, D): the same numbers, of dropout's masks too.
        """
        kinds = layer_kinds(self.cfg)
        keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(kinds)))
        if not self.cfg.scan_layers:
            return self._each(kinds, x, keys, shared, cache_length, read)
        routing = None
        for segment in segments(self.cfg):
            part = None if keys is None else keys[segment.first : segment.first + len(segment.kinds)]
            x, found = self._stacked(segment, x, part, shared, cache_length)
            routing = found if routing is None else jax.tree.map(jnp.add, routing, found)
        return x, routing

    def reads_alone(self, read: jax.Array, length: int) -> bool:
        """Whether the last block can compute the places `read` (B, P) alone, of rows of `length`, on this mesh."""
        whole_rows = all(self.layout.activation_pieces(axis) == 1 for axis in ("length", "residual_length"))
        return whole_rows and reads_alone(self.cfg) and read.shape[1] < length

    def _each(
        self,
        kinds: Sequence[LayerKind],
        x: jax.Array,
        keys: jax.Array | None,
        shared: Shared,
        cache_length: int,
        read: jax.Array | None,
    ) -> tuple[jax.Array, Routing | None]:
        block = Block if self.cfg.remat == "none" else nn.remat(Block, policy=remat_policy(self.cfg))
        routings = []
        for layer, (kind, (name, _)) in enumerate(zip(kinds, places(self.cfg), strict=True)):
            layer_key = None if keys is None else keys[layer]
            last = layer == len(kinds) - 1
            x, routing = block(*self._fields(kind, cache_length), name=name)(
                x, layer_key, shared, read if last else None
            )
            routings += [] if routing is None else [routing]
        return x, jax.tree.map(lambda *parts: sum(parts), *routings) if routings else None

    def _stacked(
        self, segment: Segment, x: jax.Array, keys: jax.Array | None, shared: Shared, cache_length: int
    ) -> tuple[jax.Array, Routing | None]:
        """Layers whose parameters, and caches, lie stacked under the segment's name. `keys`: theirs."""
        name, kinds = segment.name, segment.kinds
        if self.is_initializing():  # all kinds have the same parameters
            scanned = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=len(kinds),
                metadata_params={nn.PARTITION_NAME: segment.axis},
            )
            x, routings = scanned(*self._fields(kinds[0], cache_length), name=name)(x, keys, shared)
            return x, jax.tree.map(lambda parts: parts.sum(0), routings)
        params = self.get_variable("params", name)
        if self.layout.stages > 1 and not cache_length and name == "blocks":
            return self._pipeline(kinds, params, x, keys, shared)

        def layer(kind: LayerKind, x: jax.Array, of_layer: Any) -> tuple[jax.Array, Any]:
            params, key, cache = of_layer
            return self._block(kind, cache_length)(params, x, key, shared, cache)

        cache = self.get_variable("cache", name) if cache_length else None
        x, (routings, cache) = over_layers(layer, kinds, x, (params, keys, cache))
        if cache_length:
            self.put_variable("cache", name, cache)
        return x, jax.tree.map(lambda parts: parts.sum(0), routings)

    def _fields(self, kind: LayerKind, cache_length: int) -> tuple:
        return self.cfg, self.layout, self.precision, kind, cache_length

    def _block(self, kind: LayerKind, cache_length: int = 0) -> Callable[..., Any]:
        """(params, x, key, shared, cache) to (x, (routing, cache)), rematerialised as the config says."""
        module = Block(*self._fields(kind, cache_length), parent=None)

        def block(params: Any, x: jax.Array, key: jax.Array | None, shared: Shared, cache: Any = None) -> Any:
            if not cache_length:
                x, routing = module.apply({"params": params}, x, key, shared)
                return x, (routing, None)
            variables = {"params": params} if cache is None else {"params": params, "cache": cache}
            (x, routing), changed = module.apply(variables, x, key, shared, mutable=["cache"])
            return x, (routing, changed["cache"])

        if self.cfg.remat == "none":
            return block
        # Inside a loop the loop itself keeps XLA from merging recomputation and forward pass; not so beside it.
        in_loop = not self.cfg.layer_pattern
        return jax.checkpoint(block, policy=remat_policy(self.cfg), prevent_cse=not in_loop)

    def _pipeline(
        self, kinds: Sequence[LayerKind], params: Any, x: jax.Array, keys: jax.Array | None, shared: Shared
    ) -> tuple[jax.Array, Routing | None]:
        layout = self.layout

        def block(kind: LayerKind, *arguments: Any) -> tuple[jax.Array, Any]:
            x, (routing, _) = self._block(kind)(*arguments)
            return x, routing

        return pipeline(
            block,
            kinds,
            params,
            x,
            keys,
            shared,
            batched=has_rows(shared),
            policy=None if self.cfg.remat == "none" else remat_policy(self.cfg),
            stages=layout.stages,
            repeats=layout.stage_repeats,
            microbatches=layout.stage_microbatches,
            layout=layout,
        )


def hidden_states(
    stack: Stack,
    final_norm: Callable[[jax.Array], jax.Array] | None,
    x: jax.Array,
    key: jax.Array | None,
    shared: Shared,
    read: jax.Array | None,
) -> jax.Array:
    """x (B, T, D) after all blocks of an encoder and the norm above them: all tokens, or those at places `read` (B, P).

    The last block computes these alone where it can.
    """
    early = read is not None and stack.reads_alone(read, x.shape[1])
    x, _ = stack(x, key, shared, read=read if early else None)
    x = x if final_norm is None else final_norm(x)
    if read is None or early:
        return x
    x = stack.layout(x, "batch", None, "embed")  # whole rows: places may lie anywhere
    return stack.layout(at(x, read), "batch", None, "embed")


def has_rows(shared: Shared) -> Shared:
    """For each array of `shared`, whether it has an axis of the batch's rows."""
    mask, rows = shared.mask, len(shared.rows)
    found = jax.tree.map(lambda _: True, shared)
    indices = {name: getattr(mask, name).ndim == 2 for name in ("query_index", "key_index")}
    bias = None if shared.bias is None else len(shared.bias) == rows
    relative = None if shared.relative is None else (False, False)
    return dataclasses.replace(found, mask=dataclasses.replace(found.mask, **indices), bias=bias, relative=relative)
