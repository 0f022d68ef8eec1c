"""A decoder computed one layer at a time, for models that are too large to be in memory as a whole.

The modules are those that train: the decoder runs with its stack left out, once before the layers and once behind
them, and each layer is a block of its own kind.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.config.kinds import LayerKind
from llm_jax.models.attention import Shared
from llm_jax.models.registry import Model
from llm_jax.models.transformer import Block, Stack

STACK = "stack/"
HEAD = ("final_norm/", "head/")


class Layerwise:
    """The parts of a decoder.

    Each takes the parameters that it needs, by path as in the whole model; of a layer without "stack/blocks/".
    """

    def __init__(self, model: Model):
        self.model = model
        leaves = jax.tree_util.tree_leaves_with_path(model.shapes())
        paths = ["/".join(part.key for part in path) for path, _ in leaves]
        self._outer = {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True) if not path.startswith(STACK)}
        self.of_embedding = [path for path in self._outer if not path.startswith(HEAD)]
        tied = ["embedding/table"] if model.cfg.tie_embeddings else []
        self.of_head = [path for path in self._outer if path.startswith(HEAD)] + tied
        self.embed = jax.jit(self._embed)
        self.logits = jax.jit(self._logits)
        self._blocks: dict[LayerKind, Callable[..., jax.Array]] = {}

    def layer(self, kind: LayerKind, params: Mapping[str, Any], x: jax.Array, shared: Shared) -> jax.Array:
        """x (B, T, D) behind one layer."""
        if kind not in self._blocks:
            module = Block(self.model.cfg, self.model.module.layout, self.model.module.precision, kind)
            apply = lambda params, x, shared: module.apply({"params": nested(params)}, x, None, shared)[0]  # noqa: E731
            self._blocks[kind] = jax.jit(apply)
        return self._blocks[kind](dict(params), x, shared)

    def _embed(self, params: Mapping[str, Any], tokens: jax.Array) -> tuple[jax.Array, Shared]:
        """x (B, T, D) before the first layer, and what every layer reads beside it."""
        caught: list[Any] = []

        def stack(x: jax.Array, key: None, shared: Shared, **_: Any) -> tuple[jax.Array, None]:
            caught.append((x, shared))
            return x, None

        self._run(params, tokens, stack)
        return caught[0]

    def _logits(self, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """(B, T, V) of x (B, T, D) behind the last layer."""
        return self._run(params, jnp.zeros(x.shape[:2], jnp.int32), lambda *_, **__: (x, None))

    def _run(self, params: Mapping[str, Any], tokens: jax.Array, stack: Callable[..., Any]) -> jax.Array:
        """The decoder with `stack` in the place of its own; parameters that are not given stand where none is used."""
        given = {path: params.get(path, jnp.zeros(leaf.shape, leaf.dtype)) for path, leaf in self._outer.items()}
        with nn.intercept_methods(functools.partial(_instead, stack)):
            return self.model.apply(nested(given), tokens)


def _instead(stack: Callable[..., Any], run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    is_stack = isinstance(context.module, Stack) and context.method_name == "__call__"
    return stack(*args, **kwargs) if is_stack else run(*args, **kwargs)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path as the tree that modules read."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root
