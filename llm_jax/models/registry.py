"""From a model config to a model: `init`, `apply` and the shapes and axes of its parameters. No array is made here."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.layers import Axes
from llm_jax.models.lora import check_targets
from llm_jax.models.quantize import require_library
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

FAMILIES: dict[str, type[nn.Module]] = {"decoder": Decoder, "encoder": Encoder}


@dataclasses.dataclass(frozen=True)
class Model:
    """A pure model. Parameters are a nested dict of arrays."""

    cfg: ModelConfig
    module: nn.Module

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters; jit this with `out_shardings` to make them straight in their shards."""
        return nn.unbox(make_parameters(self.module, key))

    def shapes(self) -> Any:
        """Tree of ShapeDtypeStruct of the parameters."""
        return nn.unbox(self._boxes)

    def axes(self) -> Any:
        """The same tree, the logical names of each parameter's axes in place of its shape."""
        return jax.tree.map(lambda box: box.names, self._boxes, is_leaf=lambda node: isinstance(node, Axes))

    @property
    def _boxes(self) -> Any:
        found = abstract_parameters(self.module, jax.config.jax_enable_x64)
        check_targets(self.cfg.lora, nn.unbox(found))
        return found

    def apply(self, params: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """The module's `__call__`, or another method."""
        return self.module.apply({"params": params}, *args, method=method, **kwargs)

    def apply_cached(
        self, params: Any, cache: Any, tokens: jax.Array, positions: jax.Array, cache_length: int
    ) -> tuple[jax.Array, Any]:
        """Logits (B, T, V) and the cache with these tokens written; an empty dict starts a cache."""
        logits, changed = self.module.apply(
            {"params": params, "cache": cache}, tokens, positions, cache_length=cache_length, mutable=["cache"]
        )
        return logits, changed["cache"]


def make_parameters(module: nn.Module, key: jax.Array) -> Any:
    """Fresh parameters, each in a box with the names of its axes."""
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


@functools.lru_cache(maxsize=64)
def abstract_parameters(module: nn.Module, wide: bool) -> Any:
    """Shapes of `make_parameters`, in the same boxes; the whole model is traced, so once for all that are equal.

    `wide` (jax_enable_x64) is part of what they are kept under: without it float64 is made float32.
    """
    return jax.eval_shape(functools.partial(make_parameters, module), jax.random.key(0))


def build(cfg: ModelConfig, layout: Layout, precision: Precision) -> Model:
    """Raises ConfigError where the model needs a library that is not installed."""
    require_library(precision.products)
    return Model(cfg, FAMILIES[cfg.family](cfg, layout, precision))


def count_parameters(shapes: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
