"""A mixture of experts in place of a block's MLP (Shazeer et al. 2017, arXiv 1701.06538)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config import TransformerConfig
from llm_jax.kernels.elementwise import GATED, activate
from llm_jax.kernels.experts import BANK_AXES, Bank, Routing, capacity, dropless, route
from llm_jax.models.layers import Linear, linear_init, named
from llm_jax.precision import Precision, at_least_float32
from llm_jax.sharding import Layout


def expert_dim(cfg: TransformerConfig) -> int:
    return cfg.moe.expert_dim or cfg.mlp_dim or 4 * cfg.embed_dim


class MoE(nn.Module):
    """y = sum over the chosen experts e of p_e(x) MLP_e(x), each MLP_e of the dense block's form.

    Who is chosen, and p_e: `kernels.experts.route`. The router's logits are computed in at least float32, from
    parameters that are kept as all others are.
    """

    cfg: TransformerConfig
    layout: Layout
    precision: Precision

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        places: jax.Array | None = None,
        drop: bool = True,
    ) -> tuple[jax.Array, Routing]:
        """(B, T, D) to (B, T, D), with the router's statistics of each row.

        Args:
          segment_ids: (B, T), 0 for padding, which takes no part and gives 0; None: no padding.
          places: (T,) or (B, T), where each token stands in its row, should the array have them in another order.
          drop: False computes all choices under the capacity form too: text should not depend on how it was padded.
        """
        moe, layout = self.cfg.moe, self.layout
        weights, experts, routing = route(
            self._logits(x),
            segment_ids,
            moe.top_k,
            renormalize=moe.renormalize,
            scores=moe.scores,
            groups=moe.groups,
            top_groups=moe.top_groups,
            scale=moe.scale,
            balance_bias=self._balance_bias() if moe.balance_bias else None,
        )
        bank, activation = self._bank(x), functools.partial(activate, self.cfg.activation)
        if not moe.capacity_factor or not drop:
            y = dropless(x, weights, experts, bank, activation, layout)
        else:
            factor = moe.capacity_factor
            y, dropped = capacity(x, weights, experts, bank, activation, layout, factor=factor, places=places)
            routing = routing._replace(dropped=dropped.astype(routing.z.dtype))
        routing = jax.tree.map(lambda sums: layout(sums, "batch"), routing)
        return layout(y, "batch", "length", "embed"), routing

    def _logits(self, x: jax.Array) -> jax.Array:
        """(B, T, E). The kernel is gathered first: its "embed" axis is split over axes that also split the batch."""
        parts = (linear_init(self.cfg), self.layout, self.precision)
        moe = self.cfg.moe
        router = Linear(moe.num_experts, ("embed", "router"), *parts, use_bias=moe.router_bias, name="router")
        kernel, bias = router.weights(x.shape[-1])
        kernel = self.layout(kernel, None, None)
        logits = jnp.einsum("btd,de->bte", at_least_float32(x), at_least_float32(kernel))
        if bias is not None:
            logits = logits + at_least_float32(bias)[None, None]
        return self.layout(logits, "batch", "length", None)

    def _balance_bias(self) -> jax.Array:
        """(E,), in at least float32: bfloat16 would lose its small steps. `training/optim.py` moves it."""
        dtype = jnp.promote_types(self.precision.params, jnp.float32)
        zeros = named(nn.initializers.zeros, "balance")
        return self.param("balance_bias", zeros, (self.cfg.moe.num_experts,), dtype)

    def _bank(self, x: jax.Array) -> Bank:
        """The experts' kernels, and biases where linear layers have them, in the dtype of x."""
        cfg = self.cfg
        sizes = {"expert": cfg.moe.num_experts, "embed": cfg.embed_dim, "mlp": expert_dim(cfg)}
        parameters: dict[str, jax.Array] = {}
        for name in ("up", "down", "gate") if cfg.activation in GATED else ("up", "down"):
            axes = getattr(BANK_AXES, name)
            linears = ExpertLinears(
                tuple(sizes[axis] for axis in axes),
                axes,
                linear_init(cfg, residual=name == "down"),
                self.precision,
                use_bias=cfg.bias == "all",
                name=name,
            )
            kernel, bias = linears()
            parameters[name] = kernel.astype(x.dtype)
            if bias is not None:
                parameters[f"{name}_bias"] = bias.astype(x.dtype)
        return Bank(**parameters)


class ExpertLinears(nn.Module):
    """The parameters of one linear layer of every expert: kernel (E, in, out), and bias (E, out) or None.

    Each kernel starts as the dense layer's would: fan-in does not count the experts.
    """

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    initializer: nn.initializers.Initializer
    precision: Precision
    use_bias: bool = False

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        experts, _, features = self.shape

        def each(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jax.vmap(lambda key: self.initializer(key, shape[1:], dtype))(jax.random.split(key, experts))

        kernel = self.param("kernel", named(each, *self.axes), self.shape, self.precision.params)
        if not self.use_bias:
            return kernel, None
        zeros = named(nn.initializers.zeros, self.axes[0], self.axes[2])
        return kernel, self.param("bias", zeros, (experts, features), self.precision.params)
