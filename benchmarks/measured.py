"""One config's train step on the accelerator that is here, in a process of its own: its time and its peak memory.

    python -m benchmarks.measured RESULT.json CONFIG [KEY=VALUE...]

Rows are random tokens, a document a row, or four of equal length where documents are masked. The state is made as
`train` makes it and the step is the one that `train` runs; only the loader is left out.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import backend, sharding
from llm_jax.config import Config, check, load, run_steps
from llm_jax.models import registry
from llm_jax.precision import Precision
from llm_jax.training import optim
from llm_jax.training import state as train_state
from llm_jax.training.lower import batch_shapes, lower_step

STEPS = 12  # of which the first two are not counted


def random_batch(cfg: Config, shapes: Any) -> Any:
    """Of `batch_shapes`, on the devices."""
    rows, length = cfg.train.global_batch_size, cfg.data.sequence_length
    rng = np.random.default_rng(0)
    text = rng.integers(0, cfg.model.vocab_size, (rows, length + 1))
    documents = 4 if cfg.data.mask_documents else 1
    place = np.arange(length) % (length // documents)
    values = {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "segment_ids": np.broadcast_to(1 + np.arange(length) // (length // documents), (rows, length)),
        "positions": np.broadcast_to(place, (rows, length)),
        "loss_weights": np.ones((rows, length)),
    }
    return {name: jax.device_put(values[name].astype(s.dtype), s.sharding) for name, s in shapes.items()}


def measure(config: str, overrides: list[str]) -> dict[str, Any]:
    """Median and smallest seconds of a step, peak bytes in use on a device, and what is needed to tell them apart."""
    cfg = load(config, overrides)
    check(cfg)
    layout = sharding.make_layout(cfg.mesh)
    began = time.monotonic()
    compiled = backend.compiled(lower_step(cfg, layout))
    compiled_after = time.monotonic() - began

    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    tx = optim.make(cfg.optim, run_steps(cfg), model.shapes(), model.axes(), balance_rate=cfg.model.moe.balance_rate)
    abstract = train_state.abstract(model, tx, layout, ema=cfg.train.ema_decay > 0, offload=cfg.optim.offload)
    state = train_state.init(model, tx, abstract, cfg.seed)
    batch = random_batch(cfg, batch_shapes(cfg, layout))

    seconds, losses = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        state, values = compiled(state, batch)
        losses.append(float(values["loss"]))  # waits for the step
        seconds.append(time.perf_counter() - began)
    device, sizes = jax.devices()[0], compiled.memory_analysis()
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "seconds": statistics.median(seconds[2:]),
        "fastest": min(seconds[2:]),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "program_bytes": sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes,
        "compile_seconds": compiled_after,
        "losses": losses,
        "tokens": cfg.train.global_batch_size * cfg.data.sequence_length,
    }  # fmt: skip


def main() -> None:
    result, config, *overrides = sys.argv[1:]
    Path(result).write_text(json.dumps(measure(config, overrides)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
