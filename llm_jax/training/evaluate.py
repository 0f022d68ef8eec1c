"""Loss, bits per byte and accuracy over a fixed held-out set."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from llm_jax.config import Config
from llm_jax.data import loader
from llm_jax.data.store import Store
from llm_jax.errors import ConfigError
from llm_jax.models.registry import Model
from llm_jax.objectives.language import Batch, LanguageObjective
from llm_jax.sharding import Layout

BATCHES_AHEAD = 4


class Batches(Protocol):
    """What the evaluator needs of `loader.EvalSet`."""

    def at(self, call: int) -> Iterator[Batch]: ...


class Evaluator:
    """Evaluates parameters over a fixed set of batches, or over crops drawn for each step; compiled once."""

    def __init__(self, model: Model, objective: LanguageObjective, batches: Batches):
        self.batches = batches
        self._sums = jax.jit(lambda params, batch: objective.evaluation(model, params, batch))

    def __call__(self, params: Any, step: int, progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Means over the whole set: sums are added up over all batches in float64 before anything is divided.

        Args:
          params: of the model.
          step: of the parameters; random crops follow from it alone, so that they are the same after a restart.
          progress: called after every batch.

        Returns:
          "eval/loss" (nats a token), "eval/accuracy", "eval/tokens" and, where the tokenizer knows the bytes that each
          token stands for, "eval/bits_per_byte", which compares across tokenizers.
        """
        totals: dict[str, float] = defaultdict(float)
        ahead: deque[dict[str, jax.Array]] = deque()  # some batches in flight: no wait, and memory for no more
        for batch in self.batches.at(step):
            ahead.append(self._sums(params, batch))
            if len(ahead) > BATCHES_AHEAD:
                add(totals, ahead.popleft())
            progress()
        for sums in ahead:
            add(totals, sums)
        tokens = max(totals["tokens"], 1e-9)
        results = {
            "eval/loss": totals["nats"] / tokens,
            "eval/accuracy": totals["correct"] / tokens,
            "eval/tokens": totals["tokens"],
        }
        if totals.get("bytes"):
            results["eval/bits_per_byte"] = totals["nats"] / math.log(2) / totals["bytes"]
        return results


def add(totals: dict[str, float], sums: dict[str, jax.Array]) -> None:
    for name, value in jax.device_get(sums).items():
        totals[name] += float(value)


def make_evaluator(
    cfg: Config, stores: Sequence[Store], model: Model, objective: LanguageObjective, layout: Layout
) -> Evaluator:
    """The evaluation that `cfg.eval` describes, over the validation split of the stores.

    Raises:
      UserError: there is no validation split, or the batch does not divide over the mesh.
    """
    batch_size = cfg.eval.batch_size or cfg.train.global_batch_size // cfg.train.accumulation
    if not cfg.eval.batch_size and not cfg.eval.batches:  # the whole set, whatever the batch: fill the mesh
        pieces = layout.batch_shards * (layout.stage_microbatches if layout.stages > 1 else 1)
        batch_size = -(-batch_size // pieces) * pieces
    if batch_size % layout.batch_shards:
        raise ConfigError(
            f"eval.batch_size={batch_size} does not divide over the {layout.batch_shards} parts of the mesh that "
            f"share the batch; use a multiple of {layout.batch_shards}."
        )
    batches = loader.make_eval(stores, cfg.data, batch_size, cfg.eval.batches, cfg.eval.sampling, cfg.seed, layout)
    return Evaluator(model, objective, batches)
