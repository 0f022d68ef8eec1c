"""A stack of layers as a pipeline over the mesh axis "stage": GPipe, or circular with several rounds.

Each stage holds a part of the layers. A batch is cut into M micro-batches, which follow one another through the S
stages: in one turn of a loop all stages compute, each on another micro-batch, and hand their rows to the next stage.
It is one program over arrays with a leading stage axis; since the mesh splits this axis, the hand-over (a roll along
it) is a collective-permute between neighbours, forward and backward.

Sources: GPipe (arXiv 1811.06965); circular, or interleaved, stages (arXiv 2104.04473, section 2.2).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.config.kinds import LayerKind
from llm_jax.models.loop import over_layers
from llm_jax.sharding import Layout

Block = Callable[[LayerKind, Any, jax.Array, jax.Array | None, Any], tuple[jax.Array, Any]]
Policy = Callable[..., Any]


def pipeline(
    block: Block,
    kinds: Sequence[LayerKind],
    params: Any,
    x: jax.Array,
    keys: jax.Array | None,
    shared: Any,
    *,
    batched: Any,
    policy: Policy | None,
    stages: int,
    repeats: int,
    microbatches: int,
    layout: Layout,
) -> tuple[jax.Array, Any]:
    """What a loop of `block` over the layers gives, computed by S stages at once.

    With R = `repeats` > 1, stage s holds R pieces of n = L / (R S) layers, the pieces r S + s for each round r, and
    every micro-batch goes round R times: R times less waiting, R times as many hand-overs. Parameters keep their
    natural order, of which stage s holds a contiguous L / S; so they are sent to their stages when the step begins and
    their gradients back at its end, each about a stage's share in bytes. With R = 1 nothing of them moves.

    Kept for the backward pass: in each of the R M + S - 1 turns, what `block` keeps of its n layers (of one that is
    fully rematerialised, its input). That is a plain stack's L / S layers on B (1 + (S - 1) / (R M)) rows.

    A stage that has no micro-batch yet, or none left, computes on rows of another one; the result goes nowhere.

    Args:
      block: one layer, (its kind, its params, rows (b, T, D), key, shared) to (rows, routing), routing None or a tree
        of statistics of each row (b, ...).
      kinds: of the L layers; all pieces have the same ones, in the same order.
      params: leaves (L, ...) in natural order, split over "stage" along the first axis.
      x: (B, T, D), B a multiple of M x the pieces of the batch.
      keys: (L,) random keys, or None.
      shared: tree that every layer reads.
      batched: `shared`'s tree with a bool for each leaf: does it have a leading axis of B rows?
      policy: of the jax.checkpoint that is already round `block`; None: there is none.
      stages, repeats, microbatches: S, R and M, which `check_pipeline` has passed.

    Returns:
      x (B, T, D), and routing, leaves (B, ...), summed over the layers.

    Raises:
      ValueError: the rows do not split into M micro-batches.
    """
    if len(x) % microbatches:
        sizes = f"the {microbatches} micro-batches of mesh.stage_microbatches"
        raise ValueError(f"{len(x)} rows do not split into {sizes}.")
    plan = _Schedule(stages, repeats, microbatches, layout)
    first = jax.tree.map(lambda p: jax.eval_shape(lambda p: p[0], p), (params, keys))
    routing = jax.eval_shape(
        lambda layer, x, shared: block(kinds[0], layer[0], x, layer[1], shared)[1], first, x, shared
    )
    run = _stage(block, kinds[: len(kinds) // (stages * repeats)], batched, policy, plan)
    weights = jax.tree.map(lambda p: _to_stages(p, stages, repeats, layout), (params, keys))
    loop = functools.partial(_turn, run, weights, jax.tree.map(plan.copies, shared, batched), plan)

    # Statistics travel with their rows.
    store = x, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), routing)
    store = plan.constrain(jax.tree.map(plan.copies, store), "stage", None)
    start = jax.tree.map(lambda a: jax.lax.stop_gradient(a[:, 0]), store)  # rows of which no layer makes NaN
    (_, store), _ = jax.lax.scan(loop, (start, store), jnp.arange(plan.turns + stages - 1))
    # A masked sum: one all-reduce of the results, where a slice would gather every stage's.
    done = jax.tree.map(lambda a: jax.lax.reduce_sum(jnp.where(plan.at_first(a), a, 0), (0,)), store)
    x, routing = plan.constrain(jax.tree.map(_undeal, plan.constrain(done, None)))
    return x, routing


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """S stages, R rounds and M micro-batches, and how their arrays lie on the mesh."""

    stages: int
    repeats: int
    microbatches: int
    layout: Layout

    @property
    def turns(self) -> int:
        """Of each stage; the loop has S - 1 more."""
        return self.repeats * self.microbatches

    def at_first(self, a: jax.Array) -> jax.Array:
        """(S, 1, ...) bool, of the rank of `a`: true on the first stage."""
        return (jnp.arange(self.stages) == 0).reshape(-1, *(1,) * (a.ndim - 1))

    def copies(self, a: jax.Array, rows: bool = True) -> jax.Array:
        """A copy for each stage, whose gradients meet once, after the loop: (S, M, b, ...), without rows (S, ...)."""
        a = _deal(a, self.microbatches) if rows else a
        a = jnp.broadcast_to(a[None], (self.stages, *a.shape))
        return _split(a, self.layout, "stage", None, "batch") if rows else _split(a, self.layout, "stage")

    def constrain(self, rows: Any, *lead: str | None) -> Any:
        x, total = rows
        x = self.layout(x, *lead, "batch", "residual_length", "embed")
        return x, jax.tree.map(lambda a: _split(a, self.layout, *lead, "batch"), total)


def _stage(
    block: Block, kinds: Sequence[LayerKind], batched: Any, policy: Policy | None, plan: _Schedule
) -> Callable[..., Any]:
    """`run(weights, read, rows, turn)`: what all stages compute in one turn. `kinds`: of the layers of a piece."""

    def run(weights: Any, read: Any, rows: Any, turn: jax.Array) -> Any:
        """The layers of one stage. Without the stage axis, which vmap hides."""
        turn = jnp.clip(turn, 0, plan.turns - 1)
        own = jax.tree.map(lambda p: _piece(p, turn // plan.microbatches, len(kinds)), weights)
        seen = jax.tree.map(lambda a, rows: _piece(a, turn % plan.microbatches)[0] if rows else a, read, batched)

        def layer(kind: LayerKind, rows: Any, params_and_key: Any) -> tuple[Any, None]:
            (x, total), (params, key) = rows, params_and_key
            x, routing = block(kind, params, checkpoint_name(x, "layer_input"), key, seen)
            return (x, jax.tree.map(jnp.add, total, routing)), None

        return over_layers(layer, kinds, rows, own)[0]

    if plan.repeats > 1:  # else the pieces of the parameters would be kept for each turn
        run = jax.checkpoint(run, policy=_without_pieces(policy), prevent_cse=False)
    return jax.vmap(run, spmd_axis_name="stage")


def _turn(
    run: Callable[..., Any], weights: Any, read: Any, plan: _Schedule, carry: Any, turn: jax.Array
) -> tuple[Any, None]:
    """All stages compute once and hand their rows over.

    Args:
      carry: the rows at hand, (S, b, ...), and a store (S, M, b, ...) of which the first stage's holds what waits.
    """
    rows, store = carry
    last = plan.stages - 1
    entering, store = _take(store, turn % plan.microbatches, turn < plan.turns)
    rows = jax.tree.map(lambda a, new: jnp.where(plan.at_first(a), new, a), rows, entering)
    rows = run(weights, read, plan.constrain(rows, "stage"), turn - jnp.arange(plan.stages))
    rows = plan.constrain(jax.tree.map(_hand_over, plan.constrain(rows, "stage")), "stage")
    # Until something leaves the last stage, what arrives is put where nothing waits any more.
    arrived = jnp.where(turn >= last, turn - last, turn)
    store = jax.tree.map(lambda a, new: _put(a, new, arrived % plan.microbatches), store, rows)
    return (rows, plan.constrain(store, "stage", None)), None


# ------------------------------------------------------------------------------------------------ micro-batches


def _deal(a: jax.Array, microbatches: int) -> jax.Array:
    """(B, ...) to (M, B / M, ...), row b to micro-batch b mod M: every device deals out its own rows."""
    return jnp.moveaxis(a.reshape(-1, microbatches, *a.shape[1:]), 1, 0)


def _undeal(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])


@jax.custom_vjp
def _take(store: Any, slot: jax.Array, active: jax.Array) -> tuple[Any, Any]:
    """Slot (S, b, ...) of each (S, M, b, ...), and the store. A slot is taken once before it is filled again.

    So its gradient is set, where JAX, which cannot know this, would add up whole stores in each turn. Where not
    `active`, the slot holds a result and what is taken has no gradient.
    """
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, 1, keepdims=False), store), store


def _take_forward(store: Any, slot: jax.Array, active: jax.Array) -> Any:
    return _take(store, slot, active), (slot, active)


def _take_backward(slot_and_active: Any, gradients: Any) -> Any:
    slot, active = slot_and_active

    def fill(d_value: jax.Array, d_store: jax.Array) -> jax.Array:
        held = jax.lax.dynamic_index_in_dim(d_store, slot, 1, keepdims=False)
        return _put(d_store, jnp.where(active, d_value, held), slot)

    return jax.tree.map(fill, *gradients), None, None


_take.defvjp(_take_forward, _take_backward)


def _put(store: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(store, value, slot, 1)


# ---------------------------------------------------------------------------------------------------- stages


def _split(a: jax.Array, layout: Layout, *axes: str | None) -> jax.Array:
    """`a`, its first axes split as their logical names say and the others as the compiler finds best."""
    if layout.mesh is None:
        return a
    free = (PartitionSpec.UNCONSTRAINED,) * (a.ndim - len(axes))
    spec = PartitionSpec(*layout.spec(axes, layout.activation_rules), *free)
    return jax.lax.with_sharding_constraint(a, NamedSharding(layout.mesh, spec))


@jax.custom_vjp
def _hand_over(rows: jax.Array) -> jax.Array:
    """(S, b, ...) from each stage to the next, from the last to the first."""
    return jnp.roll(rows, 1, axis=0)


# JAX's own gradient of a roll would be two collective-permutes and a sum.
_hand_over.defvjp(lambda rows: (_hand_over(rows), None), lambda _, gradient: (jnp.roll(gradient, -1, axis=0),))


def _to_stages(p: jax.Array, stages: int, repeats: int, layout: Layout) -> jax.Array:
    """(L, ...) in natural order to (S, R n, ...): on each stage its n layers of round 0, of round 1, ..."""
    if repeats == 1 or layout.mesh is None or jnp.issubdtype(p.dtype, jax.dtypes.prng_key):
        pieces = p.reshape(repeats, stages, -1, *p.shape[1:])
        p = jnp.moveaxis(pieces, 0, 1).reshape(stages, -1, *p.shape[1:])
        return p if jnp.issubdtype(p.dtype, jax.dtypes.prng_key) else _split(p, layout, "stage")
    send = functools.partial(_send_pieces, stages=stages, repeats=repeats)
    by_stage = PartitionSpec("stage")
    send = jax.shard_map(send, mesh=layout.mesh, in_specs=by_stage, out_specs=by_stage, axis_names={"stage"})
    return send(p).reshape(stages, -1, *p.shape[1:])


def _send_pieces(p: jax.Array, *, stages: int, repeats: int) -> jax.Array:
    """On one stage, its L / S layers in natural order to the R n that it computes: R collective-permutes.

    Of the R S pieces, device c // R holds piece c, and stage c mod S computes it. They go in R sendings, in each of
    which every device sends one piece and gets one. For that, piece k of device d goes in sending k + d // (S / g)
    mod R, with g = gcd(R, S): pieces for one stage with the same k lie on g devices that are S / g apart. XLA left
    alone would gather all layers on every stage.
    """
    apart = stages // math.gcd(repeats, stages)
    me = jax.lax.axis_index("stage")
    pieces = p.reshape(repeats, -1, *p.shape[1:])
    mine = jnp.zeros_like(pieces)
    for sending in range(repeats):
        number = [(sending - device // apart) % repeats for device in range(stages)]
        sent = [device * repeats + number[device] for device in range(stages)]
        pairs = [(device, piece % stages) for device, piece in enumerate(sent)]
        turn = [piece // stages for piece in sorted(sent, key=lambda piece: piece % stages)]
        got = jax.lax.ppermute(pieces[jnp.asarray(number)[me]], "stage", pairs)
        mine = jax.lax.dynamic_update_index_in_dim(mine, got, jnp.asarray(turn)[me], 0)
    return mine.reshape(p.shape)


def _piece(a: jax.Array, number: jax.Array, size: int = 1) -> jax.Array:
    return a if len(a) == size else jax.lax.dynamic_slice_in_dim(a, number * size, size)


def _without_pieces(policy: Policy | None) -> Policy:
    """Keeps each layer's input and what `policy` says (None: everything), but no piece of parameters.

    With None those are known by what makes them, a gather, which vmap transposes.
    """

    def keep(primitive: Any, *args: Any, **params: Any) -> Any:
        if policy is None:
            return primitive.name not in ("gather", "transpose")
        is_input = primitive.name == "name" and params["name"] == "layer_input"
        return policy(primitive, *args, **params) or is_input  # the policy may want it in the host's memory

    return keep
