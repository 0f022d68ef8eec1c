"""A mixture of experts: where each token goes, and the products of each expert with the tokens that it got.

`route` chooses experts; `dropless` and `capacity` then do the work, in one of two forms. Dropless: every chosen
expert is computed, by products over groups of unequal size, and tokens travel to their experts by an all-to-all
written by hand. Capacity (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961): each expert has so much room for the
tokens of each row, in buffers of fixed shape that XLA moves, and what finds no room passes by.

Letters: b batch, t tokens, k choices of a token, e experts, d embed, f width of an expert, c room of an expert for one
row, n tokens of a device, p (token, choice) pairs, m rows of a grouped product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.kernels.exchange import Exchange, sort_by_group
from llm_jax.precision import wide_einsum
from llm_jax.sharding import Layout

# ------------------------------------------------------------------------------------------------ routing


class Routing(NamedTuple):
    """What the losses and metrics need of a router, as a sum over the real tokens of each row: so it adds up over
    rows, micro-batches and devices. All (B,), in at least float32.

    Attributes:
      balance: tokens * E * sum over e of f_e P_e, with f_e the share of the row's choices that fell on expert e and
        P_e its mean probability (arXiv 2101.03961, equation 4, for each row alone). `tokens` where all is even. Sigmoid
        scores are divided by their sum for it (arXiv 2412.19437, equations 17 to 20).
      z: sum of logsumexp(logits)^2 (arXiv 2202.08906, equation 5).
      dropped: number of (token, choice) pairs that found no room.
      pull: 0, with the gradient E * (load_e - mean load) for the balance bias of each expert e; None: there is none.
    """

    balance: jax.Array
    z: jax.Array
    dropped: jax.Array
    pull: jax.Array | None = None


def route(
    logits: jax.Array,
    segment_ids: jax.Array | None,
    top_k: int,
    *,
    renormalize: bool,
    scores: str = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    balance_bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Routing]:
    """The best experts of each token: those with the highest scores, softmax(logits) or sigmoid(logits).

    Args:
      logits: (B, T, E), of the router, in at least float32.
      segment_ids: (B, T), 0 for padding; None: no padding.
      top_k: experts a token goes to.
      renormalize: the chosen scores are scaled to add up to 1 (Mixtral, arXiv 2401.04088).
      scores: "softmax" or "sigmoid" (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
      groups: of E / groups neighbours each; a token's experts lie in its `top_groups` best (arXiv 2405.04434, section
        2.2.2). A group is as good as its best expert, by sigmoid scores as the sum of its best two (DeepSeek-V3).
      scale: factor on the weights.
      balance_bias: (E,), added to the scores where experts and groups are chosen, and nowhere else (arXiv 2408.15664).

    Returns:
      weights (B, T, k) and experts (B, T, k) int32, best first; padding has weight 0 and expert E, which is none.
      And the statistics, with nothing dropped.
    """
    num_experts = logits.shape[-1]
    real = jnp.ones(logits.shape[:2], bool) if segment_ids is None else segment_ids != 0
    log_z = jax.nn.logsumexp(logits, axis=-1)
    score = jnp.exp(logits - log_z[..., None]) if scores == "softmax" else jax.nn.sigmoid(logits)
    ranked = jax.lax.stop_gradient(score)
    if balance_bias is not None:
        ranked = ranked + jax.lax.stop_gradient(balance_bias).astype(score.dtype)[None, None]
    if groups > 1:
        ranked = _in_top_groups(ranked, groups, top_groups, of_group=1 if scores == "softmax" else 2)
    experts = _top_k(ranked, top_k)
    weights = _at(score, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    weights = jnp.where(real[..., None], scale * weights, 0)
    experts = jnp.where(real[..., None], experts, num_experts)

    probabilities = score if scores == "softmax" else score / (score.sum(-1, keepdims=True) + 1e-20)
    tokens = real.sum(1).astype(logits.dtype)
    load = _one_hot(experts, num_experts).sum((1, 2)).astype(logits.dtype)  # (B, E)
    total = jnp.where(real[..., None], probabilities, 0).sum(1)
    balance = num_experts / top_k * (load * total).sum(-1) / jnp.maximum(tokens, 1)
    z = jnp.where(real, jnp.square(log_z), 0).sum(1)
    pull = None if balance_bias is None else _pull(load, top_k * tokens, balance_bias)
    return weights, experts, Routing(balance, z, jnp.zeros_like(z), pull)


def _in_top_groups(ranked: jax.Array, groups: int, top_groups: int, *, of_group: int) -> jax.Array:
    """(B, T, E), -inf outside of the best groups; a group is the sum of the `of_group` best in it."""
    grouped = ranked.reshape(*ranked.shape[:-1], groups, -1)
    best = _at(grouped, _top_k(grouped, of_group)).sum(-1)
    chosen = _one_hot(_top_k(best, top_groups), groups).any(-2)
    return jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(ranked.shape)


def _pull(load: jax.Array, choices: jax.Array, bias: jax.Array) -> jax.Array:
    """(B,), 0. The gradient for the bias is E load_e - sum of the loads: whole numbers, so that an even load gives 0,
    and up to 2^24 their sums over rows are exact in whatever order they are taken. Larger ones have a sure sign."""
    above = jax.lax.stop_gradient(load.shape[-1] * load - choices[:, None])
    pull = (above * bias.astype(above.dtype)[None]).sum(-1)
    return pull - jax.lax.stop_gradient(pull)


def _top_k(x: jax.Array, k: int) -> jax.Array:
    """(..., k) int32: where the k largest numbers of the last axis stand, the first of equal ones first.

    One maximum after the other: XLA splits a maximum over any mesh, but gathers what it takes a top-k of.
    """
    places: list[jax.Array] = []
    left = x
    for _ in range(k):
        places.append(left.argmax(-1).astype(jnp.int32))
        left = jnp.where(_one_hot(places[-1], x.shape[-1]), -jnp.inf, left)
    return jnp.stack(places, -1)


def _at(x: jax.Array, places: jax.Array) -> jax.Array:
    """(..., k): the numbers of (..., n) that stand there. A sum, whose gradient does not scatter."""
    parts = jnp.moveaxis(places, -1, 0)
    return jnp.stack([jnp.where(_one_hot(place, x.shape[-1]), x, 0).sum(-1) for place in parts], -1)


def _one_hot(x: jax.Array, size: int) -> jax.Array:
    """(..., size) bool."""
    return x[..., None] == jnp.arange(size, dtype=x.dtype).reshape((1,) * x.ndim + (size,))


# ------------------------------------------------------------------------------------------------ experts


class Bank(NamedTuple):
    """The parameters of all experts, in the dtype of the products; what an expert lacks is None."""

    up: jax.Array  # (E, D, F)
    down: jax.Array  # (E, F, D)
    gate: jax.Array | None = None  # (E, D, F)
    up_bias: jax.Array | None = None  # (E, F)
    down_bias: jax.Array | None = None  # (E, D)
    gate_bias: jax.Array | None = None  # (E, F)


BANK_AXES = Bank(
    up=("expert", "embed", "mlp"),
    down=("expert", "mlp", "embed"),
    gate=("expert", "embed", "mlp"),
    up_bias=("expert", "mlp"),
    down_bias=("expert", "embed"),
    gate_bias=("expert", "mlp"),
)


def _each(bank: Bank, f: Callable[[jax.Array, tuple[str, ...]], Any]) -> Bank:
    """`f(parameter, its logical axes)` in place of each parameter that there is."""
    return Bank(*(x if x is None else f(x, names) for x, names in zip(bank, BANK_AXES, strict=True)))


Activation = Callable[[jax.Array, jax.Array | None], jax.Array]  # (up, gate or None) to the hidden numbers


@jax.custom_vjp
def grouped_product(x: jax.Array, matrices: jax.Array, counts: jax.Array) -> jax.Array:
    """The first counts[0] rows of x times matrices[0], the next counts[1] times matrices[1], and so on.

    `jax.lax.ragged_dot`, made safe in two ways: rows beyond all groups are 0, forward and backward (no platform is
    bound to that), and it can be mapped (`jax.vmap`) before and after differentiation, one product at a time.

    Args:
      x: (m, d).
      matrices: (e, d, f).
      counts: (e,) int32, adding up to at most m.

    Returns:
      (m, f), in the dtype of x.
    """
    return _rows_product(x, matrices, counts)


@jax.custom_batching.sequential_vmap
def _rows_product(x: jax.Array, matrices: jax.Array, counts: jax.Array) -> jax.Array:
    """ "md,edf->mf", each row with the matrix of its group."""
    y = jax.lax.ragged_dot(x, matrices, counts, preferred_element_type=x.dtype)
    return jnp.where(jnp.arange(len(x))[:, None] < counts.sum(), y, 0)


@jax.custom_batching.sequential_vmap
def _groups_product(x: jax.Array, dy: jax.Array, counts: jax.Array) -> jax.Array:
    """ "md,mf->edf", a sum over the rows of each group."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(x, dy, counts, dimensions, preferred_element_type=x.dtype)


def _grouped_forward(x: jax.Array, matrices: jax.Array, counts: jax.Array) -> tuple[jax.Array, tuple]:
    return _rows_product(x, matrices, counts), (x, matrices, counts)


def _grouped_backward(kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, matrices, counts = kept
    return _rows_product(dy, matrices.swapaxes(1, 2), counts), _groups_product(x, dy, counts), None


grouped_product.defvjp(_grouped_forward, _grouped_backward)


def _run_experts(x: jax.Array, counts: jax.Array, bank: Bank, activation: Activation) -> jax.Array:
    """(m, d) to (m, d): each expert on its group of rows; rows beyond all groups give 0."""
    expert = (jnp.arange(len(x))[:, None] >= jnp.cumsum(counts)[None]).sum(1)  # of each row; beyond the last: none

    def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = grouped_product(x, kernel, counts)
        return y if bias is None else y + bias.at[expert].get(mode="fill", fill_value=0)

    up, gate = checkpoint_name(linear(x, bank.up, bank.up_bias), "mlp_up"), None
    if bank.gate is not None:
        gate = checkpoint_name(linear(x, bank.gate, bank.gate_bias), "mlp_gate")
    return linear(activation(up, gate), bank.down, bank.down_bias)


# ------------------------------------------------------------------------------------------------ dropless


def dropless(
    x: jax.Array, weights: jax.Array, experts: jax.Array, bank: Bank, activation: Activation, layout: Layout
) -> jax.Array:
    """The weighted sum of each token's experts, nothing dropped.

    On a mesh every device sorts its own tokens; they travel over the axes that split the experts; an expert's width is
    split over those of "mlp", and kernels are gathered over those that split their "embed" axis.

    Args:
      x: (B, T, D).
      weights, experts: (B, T, k), of `route`; expert E is none.
      bank: the experts.
      activation: what stands between the products.
      layout: the mesh, with the rules of the axes "batch", "length", "expert" and "mlp".

    Returns:
      (B, T, D) in the dtype of x; 0 for padding.
    """
    if layout.mesh is None:
        return _dropless_local(x, weights, experts, bank, activation=activation, split=None)[0]
    split = ExpertSplit(layout)
    batch, length = (layout.activation_pieces(axis) for axis in ("batch", "length"))
    padding = ((0, -x.shape[0] % batch), (0, -x.shape[1] % length), (0, 0))  # none but in small batches of generation
    padded = (
        jnp.pad(x, padding),
        jnp.pad(weights, padding),
        jnp.pad(experts, padding, constant_values=len(bank.up)),
    )
    # What varies over which axis is not tracked (check_vma): the erf of jax 0.12 does not pass. So nothing is summed
    # over "mlp" inside, where the gradient would be summed as well: each device returns its part.
    parts = jax.shard_map(
        functools.partial(_dropless_local, activation=activation, split=split),
        mesh=layout.mesh,
        in_specs=(split.tokens, split.tokens, split.tokens, split.bank(bank)),
        out_specs=PartitionSpec(split.axes("mlp"), *split.tokens),
        check_vma=False,
    )(*padded, bank)
    return jax.lax.reduce_sum(parts, axes=(0,))[: x.shape[0], : x.shape[1]]


@dataclasses.dataclass(frozen=True)
class ExpertSplit:
    """Over which mesh axes the arrays of a dropless layer are split."""

    layout: Layout

    def axes(self, name: str) -> tuple[str, ...]:
        """Those that split this axis of activations, without mesh axes of one device."""
        return self._wide(dict(self.layout.activation_rules)[name])

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.axes("batch"), self.axes("length"))

    @property
    def embed(self) -> tuple[str, ...]:
        """The axes that kernels are gathered over on each device: backward, gradients are then reduce-scattered."""
        busy = self.axes("expert") + self.axes("mlp")
        return tuple(x for x in self._wide(dict(self.layout.parameter_rules)["embed"]) if x not in busy)

    def _wide(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in axes if self.layout.mesh.shape[name] > 1)

    def bank(self, bank: Bank) -> Bank:
        """The partition of each parameter."""
        axes = {name: self.axes(name) for name in ("expert", "mlp")} | {"embed": self.embed}
        return _each(bank, lambda _, names: PartitionSpec(*map(axes.get, names)))

    def gathered(self, bank: Bank) -> Bank:
        """On one device: its experts with all of "embed"."""

        def gather(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
            if not self.embed or "embed" not in names:
                return x
            return jax.lax.all_gather(x, self.embed, axis=names.index("embed"), tiled=True)

        return _each(bank, gather)


def _dropless_local(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    bank: Bank,
    *,
    activation: Activation,
    split: ExpertSplit | None,
) -> jax.Array:
    """(1, b, t, d): what a device's experts, with their share of the width, make of its tokens (b, t, d)."""
    shape, k = x.shape, weights.shape[-1]
    parts = 1
    if split is not None:
        parts = split.layout.activation_pieces("expert")
        bank = split.gathered(bank)
        if bank.down_bias is not None and split.axes("mlp"):  # the sum over "mlp" must hold it once
            first = jax.lax.axis_index(split.axes("mlp")) == 0
            bank = bank._replace(down_bias=jnp.where(first, bank.down_bias, 0))
    x, weights, experts = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
    local_experts = len(bank.up)
    pairs = sort_by_group(experts.reshape(-1), local_experts * parts)

    rows = x[pairs.order // k]
    run = functools.partial(_run_experts, bank=bank, activation=activation)
    if parts == 1:
        done = run(rows, pairs.counts)
    else:
        exchange = Exchange(split.axes("expert"), parts, len(x) * min(k, local_experts))
        done = exchange.run(rows, pairs.counts, run)
    done = checkpoint_name(done[pairs.place], "mlp_output").reshape(len(x), k, -1)  # the weights' gradients need it
    y = wide_einsum("nk,nkd->nd", weights.astype(x.dtype), done)
    return y.astype(x.dtype).reshape(1, *shape)


# ------------------------------------------------------------------------------------------------ capacity


def room(length: int, num_experts: int, top_k: int, factor: float) -> int:
    """How many (token, choice) pairs of a row an expert takes: `factor` times an even share, rounded up, and never
    more than the row has tokens."""
    return min(math.ceil(factor * top_k * length / num_experts), length)


def capacity(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    bank: Bank,
    activation: Activation,
    layout: Layout,
    *,
    factor: float,
    places: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of each token's experts that have room.

    An expert takes `room(...)` pairs of each row: first choices of all tokens before second ones (GShard, arXiv
    2006.16668, algorithm 1), earlier tokens before later. Each row is dealt with alone, so nothing depends on the
    batch or the mesh.

    Args:
      x: (B, T, D).
      weights, experts: (B, T, k), of `route`; expert E is none.
      bank: the experts.
      activation: what stands between the products.
      layout: constrains the buffers; tokens move to their experts' devices where its rules split "expert".
      factor: room relative to an even load.
      places: (T,) or (B, T), where each token stands in its row; None: in the order of the array.

    Returns:
      y (B, T, D), and the number of dropped pairs of each row (B,) int32.
    """
    (rows, length, _), k, num_experts = x.shape, weights.shape[-1], len(bank.up)
    size = room(length, num_experts, k, factor)
    experts = layout(experts, "batch", None, None).swapaxes(1, 2).reshape(rows, k * length)  # pairs, by choice
    source, filled, slot = _deal(experts, num_experts, k, size, places)
    x = layout(x, "batch", None, "embed")  # an expert's tokens come from all over the row
    buffers = jnp.take_along_axis(x, (source % length).reshape(rows, -1, 1), axis=1)
    buffers = jnp.where(filled.reshape(rows, -1, 1), buffers, 0).reshape(rows, num_experts, size, -1)
    move = functools.partial(_constrain, layout)
    buffers = move(move(buffers, "batch", None, "length", None), "batch", "expert", "length", None)

    bank = _each(bank, lambda parameter, names: layout(parameter, *names))

    def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, axis: str) -> jax.Array:
        y = jnp.einsum("becd,edf->becf", x, kernel)
        return move(y if bias is None else y + bias[None, :, None], "batch", "expert", "length", axis)

    up, gate = checkpoint_name(linear(buffers, bank.up, bank.up_bias, "mlp"), "mlp_up"), None
    if bank.gate is not None:
        gate = checkpoint_name(linear(buffers, bank.gate, bank.gate_bias, "mlp"), "mlp_gate")
    done = linear(activation(up, gate), bank.down, bank.down_bias, "embed")
    done = move(move(done, "batch", None, "length", None), "batch", None, None, None)
    done = checkpoint_name(done, "mlp_output")

    kept = slot < num_experts * size
    found = jnp.take_along_axis(
        done.reshape(rows, num_experts * size, -1), jnp.where(kept, slot, 0)[..., None], axis=1
    ).reshape(rows, k, length, -1)
    share = jnp.where(kept.reshape(rows, k, length).swapaxes(1, 2), weights, 0)
    y = wide_einsum("btk,bktd->btd", share.astype(x.dtype), found).astype(x.dtype)
    dropped = ((experts < num_experts) & ~kept).sum(1)
    return layout(y, "batch", "length", "embed"), dropped


def _deal(
    experts: jax.Array, num_experts: int, k: int, size: int, places: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Who sits where, for pairs (B, k * T), first choices first.

    Returns:
      source (B, E, c), which pair is in each slot; filled (B, E, c), whether one is; and slot (B, k * T), the number
      e * size + c of each pair's slot, or a number beyond all slots.
    """
    rows, pairs = experts.shape
    length = pairs // k
    places = jnp.arange(length) if places is None else places
    place = jnp.tile(jnp.broadcast_to(places, (rows, length)), (1, k))
    pair = jnp.broadcast_to(jnp.arange(pairs)[None], (rows, pairs))
    *_, order = jax.lax.sort((experts, pair // length, place, pair), num_keys=3)
    counts = _one_hot(experts, num_experts).sum(1)
    starts = jnp.cumsum(counts, axis=1) - counts

    seat = jnp.arange(size)[None, None]
    filled = seat < counts[..., None]
    source = jnp.take_along_axis(
        order, jnp.minimum(starts[..., None] + seat, pairs - 1).reshape(rows, -1), axis=1
    ).reshape(filled.shape)

    nowhere = num_experts * size
    begin = jnp.take_along_axis(starts, jnp.minimum(experts, num_experts - 1), axis=1)
    rank = jnp.argsort(order, axis=1) - begin
    slot = jnp.where((experts < num_experts) & (rank < size), experts * size + rank, nowhere)
    return source, filled, slot


def _constrain(layout: Layout, x: jax.Array, *axes: str | None) -> jax.Array:
    """`layout(x, *axes)`, where "expert" may split an axis of x: the batch then leaves those mesh axes to it."""
    if layout.mesh is None:
        return x
    rules = dict(layout.activation_rules)
    busy = rules["expert"] if "expert" in axes else ()
    parts = [
        None if axis is None else tuple(name for name in rules[axis] if axis == "expert" or name not in busy)
        for axis in axes
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, PartitionSpec(*parts)))
