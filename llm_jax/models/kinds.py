"""How layers of one stack differ in what they compute, and the loop over such layers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import TransformerConfig
from llm_jax.config.mesh import first_layers


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What a layer does otherwise than its neighbours.

    Attributes:
      window: it sees `sliding_window` tokens only.
      positions: it knows where tokens stand; without, the order shows by the causal mask alone (arXiv 2501.18795).
      dense: it has an MLP where others have experts.
      attention_norm: its attention has a norm before it, where others of norm_placement=pre have one.
    """

    window: bool = False
    positions: bool = True
    dense: bool = False
    attention_norm: bool = True


def layer_kinds(cfg: TransformerConfig) -> tuple[LayerKind, ...]:
    """The kind of each layer, from `layer_pattern`; a layer of an empty pattern has the window where there is one."""
    first, experts = first_layers(cfg), cfg.moe.num_experts > 0
    return tuple(
        LayerKind(
            window=word == "window",
            positions=word != "full_without_positions",
            dense=layer < first and experts,
            attention_norm=layer >= first or experts,
        )
        for layer, word in enumerate(layer_words(cfg))
    )


def layer_words(cfg: TransformerConfig) -> tuple[str, ...]:
    """`layer_pattern`, written out for every layer."""
    pattern = cfg.layer_pattern or ("window" if cfg.sliding_window else "full",)
    return tuple(pattern[layer % len(pattern)] for layer in range(cfg.num_layers))


def shortest_period(kinds: Sequence[Any]) -> int:
    """The least P with kinds[i] == kinds[i mod P] for all i."""
    repeats = lambda size: all(kind == kinds[i % size] for i, kind in enumerate(kinds))  # noqa: E731
    return next(size for size in range(1, len(kinds) + 1) if repeats(size))


def over_layers(
    layer: Callable[[LayerKind, Any, Any], tuple[Any, Any]], kinds: Sequence[LayerKind], carry: Any, of_layers: Any
) -> tuple[Any, Any]:
    """The carry after all layers, and what each of them gives, stacked.

    It is a loop whose body is one period of the kinds, each of its layers compiled for its own kind; layers that do
    not fill a period follow the loop.

    Args:
      layer: (kind, carry, a layer's part of `of_layers`) to (carry, what it gives).
      of_layers: leaves (L, ...).
    """
    period = shortest_period(kinds)
    if period == 1:
        return jax.lax.scan(lambda carry, one: layer(kinds[0], carry, one), carry, of_layers)
    looped = len(kinds) // period * period

    def several(carry: Any, given: Any, kinds: Sequence[LayerKind]) -> tuple[Any, Any]:
        found = []
        for i, kind in enumerate(kinds):
            carry, one = layer(kind, carry, jax.tree.map(lambda a, i=i: a[i], given))
            found.append(one)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *found)

    periods = jax.tree.map(lambda a: a[:looped].reshape(-1, period, *a.shape[1:]), of_layers)
    carry, found = jax.lax.scan(lambda carry, given: several(carry, given, kinds[:period]), carry, periods)
    found = jax.tree.map(lambda a: a.reshape(looped, *a.shape[2:]), found)
    if looped == len(kinds):
        return carry, found
    carry, last = several(carry, jax.tree.map(lambda a: a[looped:], of_layers), kinds[looped:])
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), found, last)
