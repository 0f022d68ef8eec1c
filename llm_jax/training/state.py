"""All that changes as a run goes on: one tree of arrays, made straight in its shards."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax import rng
from llm_jax.models.registry import Model
from llm_jax.sharding import HOST_MEMORY, Layout
from llm_jax.training import optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Counters are int32 scalars.

    Attributes:
      step: batches seen; always advances, and drives data and random keys.
      updates: updates applied; drives the schedules.
      bad_in_a_row: steps since the last applied one that were skipped for a non-finite loss or gradient.
      bad_total: steps skipped since the start.
      params: nested dict of arrays.
      opt_state: optax's state.
      ema: running average of params, in at least float32 (in bfloat16 it would never move), or None.
    """

    step: jax.Array
    updates: jax.Array
    bad_in_a_row: jax.Array
    bad_total: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def fresh(params: Any, tx: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step, round given parameters."""
    wide = lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32))  # noqa: E731
    average = jax.tree.map(wide, params) if ema else None
    counters = (jnp.zeros((), jnp.int32) for _ in range(4))  # each its own buffer, for all are donated
    return TrainState(*counters, params, tx.init(params), average)


def abstract(
    model: Model, tx: optax.GradientTransformation, layout: Layout, *, ema: bool, offload: tuple[str, ...] = ()
) -> TrainState:
    """The state as ShapeDtypeStructs that carry their shardings: shapes first, then shardings, then arrays.

    `offload`: patterns of the parameters whose optimizer state waits in pinned host memory.
    """
    shapes, axes = model.shapes(), model.axes()
    state = jax.eval_shape(lambda params: fresh(params, tx, ema=ema), shapes)
    if layout.mesh is None:
        return state
    params = layout.parameter_shardings(shapes, axes)
    optimizer = layout.parameter_shardings(shapes, axes, layout.optimizer_rules)
    in_host = lambda sharding, there: sharding.with_memory_kind(HOST_MEMORY) if there else sharding  # noqa: E731
    waiting = jax.tree.map(in_host, optimizer, optim.matching_mask("optim.offload", offload, shapes))
    scalar = layout.replicated
    shardings = TrainState(
        scalar,
        scalar,
        scalar,
        scalar,
        params,
        optim.state_shardings(state.opt_state, shapes, waiting, layout.replicated),
        optimizer if ema else None,
    )
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), state, shardings)


def shardings(abstract_state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state)


def init(model: Model, tx: optax.GradientTransformation, abstract_state: TrainState, seed: int) -> TrainState:
    """A fresh state, every array made where it will live: nothing is first made on one device."""

    def make() -> TrainState:
        return fresh(model.init(rng.stream(seed, "init")), tx, ema=abstract_state.ema is not None)

    return jax.jit(make, out_shardings=shardings(abstract_state))()


def in_device_memory(opt_state: Any, abstract_opt_state: Any) -> Any:
    """Under jit: the optimizer state where it can be computed with."""
    return _moved(opt_state, abstract_opt_state, jax.memory.Space.Device)


def in_own_memory(opt_state: Any, abstract_opt_state: Any) -> Any:
    """Under jit: the optimizer state where it waits for the next step."""
    return _moved(opt_state, abstract_opt_state, jax.memory.Space.Host)


def _moved(opt_state: Any, abstract_opt_state: Any, space: jax.memory.Space) -> Any:
    def move(x: jax.Array, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        waits = abstract.sharding is not None and abstract.sharding.memory_kind == HOST_MEMORY
        return jax.device_put(x, space) if waits else x

    return jax.tree.map(move, opt_state, abstract_opt_state)
