"""The only jit of training: one batch in, one update out, on any mesh.

Weights of the loss terms are totalled over the whole global batch before anything is divided, micro-batches add up
sums, and a step whose loss or gradient is not finite changes no bit of parameters, optimizer state or average.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax import rng
from llm_jax.models.registry import Model
from llm_jax.objectives.base import Batch, Objective
from llm_jax.sharding import Layout
from llm_jax.training import optim
from llm_jax.training import state as train_state
from llm_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def gradients(
    model: Model,
    objective: Objective,
    params: Any,
    batch: Batch,
    *,
    layout: Layout,
    seed: int,
    step: jax.Array,
    accumulation: int = 1,
) -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """Gradient of the loss of the whole global batch.

    Args:
      batch: features of shape (B, ...), B a multiple of `accumulation`.
      accumulation: micro-batches. Each device's rows are dealt out among them, so no row moves.

    Returns:
      The gradient (as params); each term's weighted mean, scalars; and the batch's weight, scalar.
    """
    weights = {name: jnp.maximum(weight, 1e-9) for name, weight in objective.weights(batch).items()}
    coefficients = objective.coefficients()
    dropout = getattr(model.cfg, "dropout", None)
    uses_dropout = dropout is not None and any((*vars(dropout).values(), getattr(model.cfg, "head_dropout", 0)))

    dropout_key = rng.stream(seed, "dropout", step) if uses_dropout else None
    if uses_dropout:  # each row's mask goes by its number, in whatever micro-batch it is
        batch = batch | {"rows": jnp.arange(len(batch["tokens"]))}

    def loss(params: Any, micro: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = objective.sums(model, params, micro, dropout_key)
        terms = {name: value / weights[name] for name, value in sums.items()}
        return sum(coefficients[name] * value for name, value in terms.items() if coefficients[name]), terms

    shardings = layout.parameter_shardings(model.shapes(), model.axes(), layout.gradient_rules)

    def value_and_grad(params: Any, micro: Batch) -> tuple[Any, Any]:
        values, grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
        if layout.mesh is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        return values, grads

    if accumulation == 1:
        (_, terms), grads = value_and_grad(params, batch)
    else:
        micros = jax.tree.map(lambda x: deal(x, accumulation, layout, batch["tokens"].shape[1]), batch)

        def add(total: Any, micro: Batch) -> tuple[Any, None]:
            (_, terms), grads = value_and_grad(params, micro)
            return jax.tree.map(jnp.add, total, (grads, terms)), None

        # Sums are kept in float32 at least, whatever the parameters are in.
        wide = lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))  # noqa: E731
        zeros = jax.tree.map(wide, params), {name: jnp.zeros((), float) for name in coefficients}
        (grads, terms), _ = jax.lax.scan(add, zeros, micros)
    return grads, terms, objective.weights(batch)["loss"]


def deal(x: jax.Array, accumulation: int, layout: Layout, length: int) -> jax.Array:
    """(B, ...) to (accumulation, B / accumulation, ...), row b to micro-batch b mod accumulation; rows of `length`."""
    micros = jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0)
    if layout.mesh is None:
        return micros
    spec = layout.feature_sharding(x.shape, length).spec
    sharding = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec(None, *spec))
    return jax.lax.with_sharding_constraint(micros, sharding)


def make_train_step(
    model: Model,
    objective: Objective,
    tx: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[jax.Array], jax.Array],
    layout: Layout,
    abstract_state: TrainState,
    *,
    seed: int,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    trainable: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step `(state, batch) -> (state, metrics)`; the state given is donated.

    `trainable` is a tree of bool like the parameters, None for all, as `tx` was made with: frozen ones do not count in
    the gradient norm, by which `tx` clips, nor do balance biases.

    Metrics are scalars on the device: every term's mean, "grad_norm" (before clipping), "learning_rate", "tokens"
    (see the objective), "bad_in_a_row", "bad_total" and, where the loss is the code length of targets whose bytes are
    known, "bytes".
    """

    counted = optim.counted_mask(trainable, model.axes())

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, terms, weight = gradients(
            model,
            objective,
            state.params,
            batch,
            layout=layout,
            seed=seed,
            step=state.step,
            accumulation=accumulation,
        )
        grad_norm = optim.global_norm(grads, counted)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(terms["loss"])
        good = finite & (weight > 0)  # a batch of padding alone is no update either

        def update(params: Any, opt_state: Any, ema: Any) -> tuple[Any, Any, Any]:
            opt_state = train_state.in_device_memory(opt_state, abstract_state.opt_state)
            changes, opt_state = tx.update(grads, opt_state, params, grad_norm=grad_norm)
            opt_state = train_state.in_own_memory(opt_state, abstract_state.opt_state)
            params = optax.apply_updates(params, changes)
            if ema is not None:
                mean = lambda old, new: ema_decay * old + (1 - ema_decay) * new.astype(old.dtype)  # noqa: E731
                ema = jax.tree.map(mean, ema, params)
            return params, opt_state, ema

        old = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.lax.cond(good, update, lambda *old: old, *old)
        new_state = TrainState(
            step=state.step + 1,
            updates=state.updates + good,
            bad_in_a_row=jnp.where(good, 0, state.bad_in_a_row + ~finite),
            bad_total=state.bad_total + ~finite,
            params=params,
            opt_state=opt_state,
            ema=ema,
        )
        metrics = terms | {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(state.updates),
            "tokens": objective.tokens(batch),
            "bad_in_a_row": new_state.bad_in_a_row,
            "bad_total": new_state.bad_total,
        }
        if "target_bytes" in batch and not getattr(objective, "label_smoothing", 0):  # smoothed: no code length
            metrics["bytes"] = batch["target_bytes"].astype(jnp.float32).sum()
        return new_state, metrics

    if layout.mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(train_state.shardings(abstract_state), layout.replicated),
    )
