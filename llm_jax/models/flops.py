"""Floating-point operations of a step, counted from the parameters: one count for every model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax.config import EncoderConfig, TransformerConfig, kinds
from llm_jax.models.attention import query_dim, value_dim
from llm_jax.models.generator import generator_config
from llm_jax.models.transformer import reads_alone

FORMULA = (
    "3 x (2 x matrix parameters + 4 x layers x heads x head size x mean visible keys) a token, of what is computed at "
    "some tokens alone their share; recompute not counted"
)


@dataclasses.dataclass(frozen=True)
class Flops:
    """Model FLOPs of training on one token (forward plus twice that backward), a decoder's attention counted causally.

    Attributes:
      matrices: 6 a parameter that takes part in a product (linear layers and head; a tied table counts as the head; of
        experts, the top_k that a token goes to). 4 where adapters train in its place: it has no gradient.
      attention: 12 a layer, query entry and visible key: scores and weighted sum.
    """

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention


def training_flops(
    cfg: TransformerConfig, shapes: Any, axes: Any, length: int, heads: Mapping[str, float] | None = None
) -> Flops:
    """FLOPs a token of rows of `length` tokens.

    Args:
      shapes: the parameters, as ShapeDtypeStructs or arrays.
      axes: their logical axes.
      length: T; a decoder's token sees (T + 1) / 2 keys on average, an encoder's T, less under a sliding window.
        Borders of packed documents are not subtracted.
      heads: the share of the tokens that an encoder's head is computed at, by its name among the parameters
        (`tasks.head_shares`: hidden tokens, or one vector a text); None, or a head that is not there: all. A last block
        that computes what they read alone counts so.
    """
    if "generator" in shapes:  # a model of its own, over the same embeddings
        one = lambda tree: {name: part for name, part in tree.items() if name != "generator"}  # noqa: E731
        other = lambda tree: tree["generator"] | {"embedding": tree["embedding"]}  # noqa: E731
        own = training_flops(cfg, one(shapes), one(axes), length, heads)
        beside = training_flops(generator_config(cfg), other(shapes), other(axes), length, heads)
        return Flops(own.matrices + beside.matrices, own.attention + beside.attention)
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(shapes), strict=True)
    paths = [[key.key for key in path] for path in paths]
    shares = {name: share for name, share in (heads or {}).items() if any(path[0] == name for path in paths)}
    read = share_of_last_block(cfg, shares)
    last, whole = kinds.places(cfg)[-1][0], {"key", "value"}  # all tokens are keys
    in_last = [path[:2] == ["stack", last] and not whole & set(path) for path in paths]
    places = [read if here else shares.get(path[0], 1.0) for path, here in zip(paths, in_last, strict=True)]
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    tables = {("vocab", "embed"), ("position", "embed"), ("buckets", "heads"), ("buckets", "embed")}  # looked up
    kept = 4.0 if cfg.lora.rank else 6.0  # of a parameter that is no adapter
    matrices = sum(
        leaf.size
        * (6.0 if "adapter" in axis else kept)
        * (cfg.moe.top_k / cfg.moe.num_experts if "expert" in axis else 1)  # a token's own experts alone
        * share
        for leaf, axis, share in zip(leaves, names, places, strict=True)
        if axis not in tables and sum(name not in kinds.STACKING_AXES for name in axis) >= 2
    )
    if cfg.tie_embeddings and getattr(cfg, "head", "masked") in ("masked", "masked_pairs"):
        table = sum(leaf.size for leaf, axis in zip(leaves, names, strict=True) if axis == ("vocab", "embed"))
        matrices += kept * table * shares.get("masked", 1.0)
    visible, layers = 0.0, kinds.layer_kinds(cfg)  # keys, over all layers
    for layer, kind in enumerate(layers):
        computed = read if layer == len(layers) - 1 else 1.0
        window = min(cfg.sliding_window, length) if kind.window else length
        if isinstance(cfg, EncoderConfig):  # half on each side, and itself
            side = min(window // 2, length - 1) if kind.window else length - 1
            visible += computed * (1 + side * (2 * length - side - 1) / length)
        else:
            visible += (window * (window + 1) / 2 + (length - window) * window) / length
    return Flops(matrices, 6.0 * cfg.num_heads * (query_dim(cfg) + value_dim(cfg)) * visible)


def share_of_last_block(cfg: TransformerConfig, shares: Mapping[str, float]) -> float:
    """The share of a row's tokens that the last block has to compute, those that the heads read; keys and values apart.

    A mesh that splits rows computes the others too, which does not count, as recomputation does not.
    """
    whole = not shares or not reads_alone(cfg) or getattr(cfg, "head_pooling", "") == "mean"
    return 1.0 if whole else min(sum(shares.values()), 1.0)
