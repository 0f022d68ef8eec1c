"""Loss, bits per byte and accuracy over a fixed held-out set."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import jax

from llm_jax.models.registry import Model
from llm_jax.objectives.language import Batch, LanguageObjective


class Evaluator:
    """Evaluates parameters over the same batches each time; compiled once."""

    def __init__(self, model: Model, objective: LanguageObjective, batches: Iterable[Batch]):
        self.batches = batches
        self._sums = jax.jit(lambda params, batch: objective.evaluation(model, params, batch))

    def __call__(self, params: Any) -> dict[str, float]:
        """Means over the whole set: sums are added up over all batches in float64 before anything is divided.

        Returns:
          "eval/loss" (nats a token), "eval/accuracy", "eval/tokens" and, where the tokenizer knows the bytes that each
          token stands for, "eval/bits_per_byte", which compares across tokenizers.
        """
        totals: dict[str, float] = defaultdict(float)
        for sums in [self._sums(params, batch) for batch in self.batches]:
            for name, value in sums.items():
                totals[name] += float(value)
        tokens = max(totals["tokens"], 1e-9)
        results = {
            "eval/loss": totals["nats"] / tokens,
            "eval/accuracy": totals["correct"] / tokens,
            "eval/tokens": totals["tokens"],
        }
        if totals.get("bytes"):
            results["eval/bits_per_byte"] = totals["nats"] / math.log(2) / totals["bytes"]
        return results
