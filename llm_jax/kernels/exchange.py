"""Rows that travel to the devices that hold their experts, and come back.

Letters: p rows of this device, d numbers of a row, e experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sorted(NamedTuple):
    """Things in the order of their groups.

    Attributes:
      order: (p,) which thing stands at each place; those of no group come last.
      place: (p,) where each thing stands.
      counts: (groups,) int32, the sizes of the groups.
    """

    order: jax.Array
    place: jax.Array
    counts: jax.Array


def sort_by_group(group: jax.Array, num_groups: int) -> Sorted:
    """Sorts p things by their `group` (p,), a number up to num_groups, which means none; equal ones stay in order."""
    order = jnp.argsort(group, stable=True)
    counts = (group[:, None] == jnp.arange(num_groups, dtype=group.dtype)[None]).sum(0, dtype=jnp.int32)
    return Sorted(order, jnp.argsort(order), counts)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Tokens go to the devices that hold their experts, and come back.

    Each device keeps for each other one a block of the same size, with room for every choice that could fall on its
    own experts, so nothing is ever dropped, whatever the router does. By a padded all-to-all whole blocks travel; by a
    ragged one, which XLA has for TPUs and GPUs, only the rows that are there.
    """

    axes: tuple[str, ...]  # the mesh axes that split the experts
    parts: int
    room: int  # rows of a block

    def run(self, rows: jax.Array, counts: jax.Array, experts: Callable[..., jax.Array]) -> jax.Array:
        """(p, d): what `experts(rows, counts)` on other devices make of this device's rows, each in its place.

        Args:
          rows: (p, d), sorted by expert over all devices; those of no expert last.
          counts: (E,), how many rows each expert gets from this device.
          experts: runs this device's experts on rows that are sorted by expert.
        """
        counts = counts.reshape(self.parts, -1)
        sizes = counts.sum(1)
        starts = jnp.cumsum(sizes) - sizes
        counts, their_starts = self._swap(counts), self._swap(starts)  # what comes in, and where it stands at home
        ragged = (starts, sizes, their_starts, counts.sum(1))
        received = self._by_platform(self._send_padded, self._send_ragged, rows, *ragged)

        ends = jnp.cumsum(counts, axis=1)  # a block is sorted by expert: its counts say which row is whose
        expert = (jnp.arange(self.room)[None, :, None] >= ends[:, None]).sum(-1)
        here = sort_by_group(expert.reshape(-1), counts.shape[1])
        done = experts(received[here.order], here.counts)[here.place]
        back = [functools.partial(way, len(rows)) for way in (self._return_padded, self._return_ragged)]
        return self._by_platform(*back, done, *ragged)

    def _swap(self, x: jax.Array) -> jax.Array:
        """(parts, ...) for each device to (parts, ...) from each device."""
        return jax.lax.all_to_all(x, self.axes, split_axis=0, concat_axis=0, tiled=True)

    def _by_platform(self, padded: Callable[..., jax.Array], ragged: Callable[..., jax.Array], *args: Any) -> jax.Array:
        """One of the two, by what the program is compiled for."""
        return jax.lax.platform_dependent(*args, default=padded, tpu=ragged, cuda=ragged, rocm=ragged)

    # Rows (p, d) of this device start at `starts` and are `sizes` for each device; each device's block of those that
    # come in has `their_sizes` rows, which start at `their_starts` on the device that they come from. All (parts,).

    def _send_padded(self, rows: jax.Array, starts: jax.Array, sizes: jax.Array, *_: jax.Array) -> jax.Array:
        slot = jnp.arange(self.room)[None]
        there = (slot < sizes[:, None])[..., None]
        sent = jnp.where(there, rows.at[starts[:, None] + slot].get(mode="clip"), 0)
        return self._swap(sent).reshape(-1, rows.shape[-1])

    def _return_padded(
        self, count: int, done: jax.Array, starts: jax.Array, sizes: jax.Array, *_: jax.Array
    ) -> jax.Array:
        returned = self._swap(done.reshape(self.parts, self.room, -1))
        place = jnp.arange(count)
        device = (place[:, None] >= (starts + sizes)[None]).sum(1)  # beyond the last: a pair of padding
        found = returned.at[device, place - starts.at[device].get(mode="clip")]
        return found.get(mode="fill", fill_value=0)

    # Zero times `starts` below: JAX maps (vmap) a ragged all-to-all only where all its offsets are mapped.

    def _send_ragged(
        self, rows: jax.Array, starts: jax.Array, sizes: jax.Array, _: jax.Array, their_sizes: jax.Array
    ) -> jax.Array:
        received = jnp.zeros((self.parts * self.room, rows.shape[-1]), rows.dtype)
        mine = 0 * starts + jax.lax.axis_index(self.axes) * self.room  # this device's block on every other
        return jax.lax.ragged_all_to_all(rows, received, starts, sizes, mine, their_sizes, axis_name=self.axes)

    def _return_ragged(
        self,
        count: int,
        done: jax.Array,
        starts: jax.Array,
        sizes: jax.Array,
        their_starts: jax.Array,
        their_sizes: jax.Array,
    ) -> jax.Array:
        rows = jnp.zeros((count, done.shape[-1]), done.dtype)
        blocks = 0 * starts + jnp.arange(self.parts, dtype=starts.dtype) * self.room
        return jax.lax.ragged_all_to_all(done, rows, blocks, their_sizes, their_starts, sizes, axis_name=self.axes)
