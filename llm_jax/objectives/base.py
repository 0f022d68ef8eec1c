"""What the step and the evaluation need of an objective, whatever the family."""

from typing import Any, Protocol

import jax

from llm_jax.models.registry import Model

Batch = dict[str, jax.Array]


class Objective(Protocol):
    """A loss as a set of named terms, each (sum, weight, coefficient).

    The loss is the sum of the coefficients times the terms' means; a term of coefficient 0 is only told. Each weight
    depends on the batch alone and is totalled over the whole global batch before anything is divided.

    Attributes:
      additive: whether sums over micro-batches are those of the whole batch. Without, accumulation is refused.
    """

    additive: bool

    def coefficients(self) -> dict[str, float]:
        """Of each term, "loss" being one of them."""

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Each term's weight over this batch, scalar float32."""

    def tokens(self, batch: Batch) -> jax.Array:
        """How many tokens of the batch count as work done, scalar."""

    def sums(self, model: Model, params: Any, batch: Batch, dropout_key: jax.Array | None) -> dict[str, jax.Array]:
        """Each term's sum over this batch, scalar."""

    def evaluation(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Of one batch: scalars, which are added up over batches, and arrays (rows, ...), which are kept."""

    def results(self, totals: dict[str, float]) -> dict[str, float]:
        """The figures of an evaluation, "loss" among them, from its scalars' totals."""
