"""The loop over the layers of a stack, which may be of several kinds."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config.kinds import LayerKind, periods


def over_layers(
    layer: Callable[[LayerKind, Any, Any], tuple[Any, Any]], kinds: Sequence[LayerKind], carry: Any, of_layers: Any
) -> tuple[Any, Any]:
    """The carry after all layers, and what each of them gives, stacked.

    It is a loop whose body is one period of the kinds, each of its layers compiled for its own kind.

    Args:
      layer: (kind, carry, a layer's part of `of_layers`) to (carry, what it gives).
      kinds: of the L layers, a whole number of periods.
      of_layers: leaves (L, ...).
    """
    period = next(size for size in periods(kinds) if len(kinds) % size == 0)
    if period == 1:
        return jax.lax.scan(lambda carry, one: layer(kinds[0], carry, one), carry, of_layers)

    def several(carry: Any, given: Any) -> tuple[Any, Any]:
        found = []
        for i, kind in enumerate(kinds[:period]):
            carry, one = layer(kind, carry, jax.tree.map(lambda a, i=i: a[i], given))
            found.append(one)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *found)

    of_periods = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), of_layers)
    carry, found = jax.lax.scan(several, carry, of_periods)
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)
