"""A config's train step, lowered for devices that need not be there: shapes and shardings, never an array."""

import dataclasses
import sys

import jax
import jax.numpy as jnp

from llm_jax.config import Config, run_steps
from llm_jax.data import tasks
from llm_jax.models import flops, registry
from llm_jax.objectives import registry as objectives
from llm_jax.objectives.base import Batch
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import optim
from llm_jax.training import state as train_state
from llm_jax.training.step import make_train_step


def lower_step(cfg: Config, layout: Layout, platform: str | None = None) -> jax.stages.Lowered:
    """The step that `train` would run, lowered but not compiled.

    Args:
      cfg: checked, with model.vocab_size known.
      layout: of real devices (then `.compile()` goes on), or `sharding.abstract_layout`'s, of a machine not there.
      platform: "tpu", "cuda" or "cpu", to lower for; None for the devices' own. An abstract layout has none.
    """
    if platform:
        layout = dataclasses.replace(layout, platform={"cuda": "gpu"}.get(platform, platform))
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    steps = run_steps(cfg) or sys.maxsize  # the data alone knows an epoch's length
    tx = optim.make(cfg.optim, steps, model.shapes(), model.axes(), balance_rate=cfg.model.moe.balance_rate)
    ema = cfg.train.ema_decay > 0
    state = train_state.abstract(model, tx, layout, ema=ema, offload=cfg.optim.offload)
    step = make_train_step(
        model,
        objectives.make(cfg),
        tx,
        optim.learning_rate(cfg.optim, steps),
        layout,
        state,
        seed=cfg.seed,
        accumulation=cfg.train.accumulation,
        ema_decay=cfg.train.ema_decay,
        trainable=optim.trainable_mask(cfg.optim, model.shapes()),
    )
    traced = step.trace(state, batch_shapes(cfg, layout))
    return traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()


def model_flops(cfg: Config, model: registry.Model) -> flops.Flops:
    """Of training on one token of the longest rows."""
    heads = tasks.head_shares(cfg.data)
    return flops.training_flops(cfg.model, model.shapes(), model.axes(), cfg.data.sequence_length, heads)


def batch_shapes(cfg: Config, layout: Layout) -> Batch:
    """What the loader hands to a step, as sharded ShapeDtypeStructs (B, T); `target_bytes` is left out."""
    if cfg.data.task != "language":
        features = tasks.feature_shapes(cfg.data, cfg.train.global_batch_size, getattr(cfg.model, "num_labels", 1))
        sharded = lambda shape: layout.feature_sharding(shape, cfg.data.sequence_length)  # noqa: E731
        return {name: jax.ShapeDtypeStruct(shape, d, sharding=sharded(shape)) for name, (shape, d) in features.items()}
    shape, sharding = (cfg.train.global_batch_size, cfg.data.sequence_length), layout.batch_sharding()
    integers = ("tokens", "targets", "segment_ids", "positions")
    dtypes = dict.fromkeys(integers, jnp.int32) | {"loss_weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
