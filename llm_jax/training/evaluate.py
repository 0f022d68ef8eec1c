"""The figures of a task over a fixed held-out set, and whether they still get better."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from llm_jax import backend
from llm_jax.config import Config, EvalConfig
from llm_jax.config.schema import LABELLED_TASKS
from llm_jax.data import labelled_scores, loader
from llm_jax.errors import ConfigError
from llm_jax.models.registry import Model
from llm_jax.objectives.base import Batch, Objective
from llm_jax.sharding import Layout
from llm_jax.training.record import RANK

BATCHES_AHEAD = 4


class Batches(Protocol):
    """What the evaluator needs of `loader.EvalSet`."""

    def at(self, call: int) -> Iterator[Batch]: ...


class Evaluator:
    """Evaluates parameters over a fixed set of batches, or over crops drawn for each step; compiled once a shape.

    Args:
      measure: further figures, from the arrays that the objective keeps of every batch; None: there are none.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        batches: Batches,
        layout: Layout = Layout(),  # noqa: B008
        measure: Callable[[list[dict[str, np.ndarray]]], dict[str, float]] | None = None,
    ):
        self.batches, self.objective, self.measure = batches, objective, measure
        self._evaluate = jax.jit(  # replicated: every process reads all rows
            lambda params, batch: objective.evaluation(model, params, batch), out_shardings=layout.replicated
        )
        self._compiled: dict[Any, Any] = {}  # by the batch's shape: one, or one a bucket

    def __call__(self, params: Any, step: int, progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Means over the whole set: sums are added up over all batches in float64 before anything is divided.

        Args:
          params: of the model.
          step: of the parameters; random crops follow from it alone, so that they are the same after a restart.
          progress: called after every batch.

        Returns:
          "eval/loss" and the objective's and the task's other figures, each behind "eval/".
        """
        totals: dict[str, float] = defaultdict(float)
        kept: list[dict[str, np.ndarray]] = []
        ahead: deque[dict[str, jax.Array]] = deque()  # some batches in flight: no wait, and memory for no more
        for batch in self.batches.at(step):
            shape = batch["tokens"].shape
            if shape not in self._compiled:
                self._compiled[shape] = backend.compiled(self._evaluate.lower(params, batch))
            ahead.append(self._compiled[shape](params, batch))
            if len(ahead) > BATCHES_AHEAD:
                add(totals, kept, ahead.popleft())
            progress()
        for found in ahead:
            add(totals, kept, found)
        results = self.objective.results(totals) | (self.measure(kept) if self.measure else {})
        return {f"eval/{name}": value for name, value in results.items()}


def add(totals: dict[str, float], kept: list[dict[str, np.ndarray]], found: Mapping[str, jax.Array]) -> None:
    """Scalars are added to the totals; the arrays of a batch are kept together."""
    here = jax.device_get(dict(found))
    for name, value in here.items():
        if not np.ndim(value):
            totals[name] += float(value)
    if arrays := {name: value for name, value in here.items() if np.ndim(value)}:
        kept.append(arrays)


def make_evaluator(cfg: Config, stores: Sequence[Any], model: Model, objective: Objective, layout: Layout) -> Evaluator:
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
    return Evaluator(model, objective, batches, layout, measure_of(cfg, stores))


def measure_of(cfg: Config, stores: Sequence[Any]) -> Callable[[list[dict[str, np.ndarray]]], dict[str, float]] | None:
    """The figures of a labelled task, from the scores of its validation texts."""
    if cfg.data.task not in LABELLED_TASKS:
        return None
    (store,) = stores
    return lambda kept: labelled_scores.measures(cfg.data, store.names, store.validation, kept)


# --------------------------------------------------------------------------------------- better, and for how long

LOWER_IS_BETTER = ("loss", "pair_loss", "generator_loss")


def rank(evaluation: Mapping[str, float], best: str) -> float:
    """The figure that `eval.best` names, turned so that lower is better. Raises ConfigError where there is none."""
    value = evaluation.get(f"eval/{best}")
    if value is None:
        there = ", ".join(name.removeprefix("eval/") for name in evaluation if name.startswith("eval/"))
        raise ConfigError(f"eval.best = {best!r}: the evaluation has no such figure; it has {there}")
    return value if best in LOWER_IS_BETTER else -value


class Judge:
    """Which evaluation was the best so far, and whether it was long ago.

    Args:
      history: records of the run before; a run that goes on judges as if it had never stopped.
    """

    def __init__(self, cfg: EvalConfig, history: Sequence[Mapping[str, float]]):
        self._cfg = cfg
        self._ranks = [rank(record, cfg.best) for record in history if f"eval/{cfg.best}" in record]

    def add(self, evaluation: Mapping[str, float]) -> dict[str, float]:
        """Judge one more; returns it with what ranks its checkpoint, where that is not the loss."""
        self._ranks.append(rank(evaluation, self._cfg.best))
        return dict(evaluation) | ({} if self._cfg.best == "loss" else {RANK: self._ranks[-1]})

    @property
    def waited(self) -> int:
        """Evaluations since the best one."""
        return len(self._ranks) - 1 - int(np.argmin(self._ranks)) if self._ranks else 0

    @property
    def has_enough(self) -> bool:
        return 0 < self._cfg.patience <= self.waited
