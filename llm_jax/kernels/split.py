"""Over which mesh axes the arrays of an attention are split, for back ends that each device runs by itself."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from llm_jax.errors import ConfigError
from llm_jax.kernels.masks import AttentionMask
from llm_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh, and its axes for tokens, rows of the batch, and heads. `Split()` has no mesh: all is on one device."""

    mesh: Mesh | AbstractMesh | None = None
    axis: str | None = None  # of the tokens of a row
    batch_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, layout: Layout) -> "Split":
        """As the layout's rules for activations say. Raises ConfigError where they split the length over two axes."""
        if layout.mesh is None:
            return cls()
        rules = dict(layout.activation_rules)
        axes = [name for name in rules["length"] if layout.mesh.shape[name] > 1]
        if len(axes) > 1:
            raise ConfigError(
                f"mesh.activation_rules split 'length' over {' and '.join(axes)}: attention goes round one mesh axis. "
                "Split 'length' over one of them ('residual_length' may have more)."
            )
        return cls(layout.mesh, axes[0] if axes else None, rules["batch"], rules["heads"])

    @property
    def parts(self) -> int:
        return self.mesh.shape[self.axis] if self.axis else 1

    @property
    def head_parts(self) -> int:
        return self._size(self.head_axes)

    @property
    def heads(self) -> PartitionSpec:
        """Of an array (batch, tokens, heads, ...)."""
        return PartitionSpec(self.batch_axes, self.axis, self.head_axes)

    @property
    def sinks(self) -> PartitionSpec:
        """Of an array (heads,)."""
        return PartitionSpec(self.head_axes)

    def mask(self, mask: AttentionMask, axis: str | None) -> AttentionMask:
        """The partition of each array of the mask, with tokens over `axis`."""
        index, row = PartitionSpec(axis), PartitionSpec(self.batch_axes, axis)
        return dataclasses.replace(
            mask,
            query_index=index if mask.query_index.ndim == 1 else row,
            key_index=index,
            query_segments=None if mask.query_segments is None else row,
            key_segments=None if mask.key_segments is None else row,
        )

    def run(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`local` on every device's own part of the arrays.

        What it varies over is not tracked (check_vma): Pallas kernels do not say, and each array is split or whole.
        """
        if self.mesh is None:
            return local
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def check(self, query: jax.Array, key: jax.Array) -> None:
        """Raises ConfigError where rows of the batch, tokens or heads do not split evenly."""
        if query.shape[0] % self._size(self.batch_axes):
            raise ConfigError(
                f"A batch of {query.shape[0]} rows does not split over the {self._size(self.batch_axes)} devices of "
                f"{self._named(self.batch_axes)}. Make train.global_batch_size, divided by train.accumulation, a "
                "multiple of that."
            )
        for what, x in (("queries", query), ("keys", key)):
            if x.shape[1] % self.parts:
                raise ConfigError(
                    f"Rows of {x.shape[1]} {what} do not split over the {self.parts} devices of mesh.{self.axis}. Make "
                    f"data.sequence_length a multiple of {self.parts}."
                )
            if x.shape[2] % self.head_parts:
                raise ConfigError(
                    f"The {x.shape[2]} heads of the {what} do not split over the {self.head_parts} devices of "
                    f"{self._named(self.head_axes)}. Change the mesh, or model.num_heads and model.num_kv_heads."
                )

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in axes)

    def _named(self, axes: tuple[str, ...]) -> str:
        return " x ".join(f"mesh.{name}" for name in axes)
