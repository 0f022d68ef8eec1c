"""Masked language modelling, with the next sentence or exchanged tokens beside it, as named loss terms."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import Config
from llm_jax.models.encoder import Texts
from llm_jax.models.registry import Model
from llm_jax.objectives.base import Batch
from llm_jax.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class MaskedObjective:
    """BERT's pre-training (Devlin et al. 2018, arXiv 1810.04805, appendix A.2).

    "loss" is the mean cross-entropy of the hidden tokens, "pair_loss" that of whether the second text follows the
    first; what is trained on is their sum. "accuracy" and "pair_accuracy" are told beside them.
    """

    pairs: bool = True
    additive = True

    @classmethod
    def make(cls, cfg: Config) -> "MaskedObjective":
        return cls(cfg.data.masking.next_sentence)

    def coefficients(self) -> dict[str, float]:
        return {"loss": 1.0, "accuracy": 0.0} | ({"pair_loss": 1.0, "pair_accuracy": 0.0} if self.pairs else {})

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        masked, pairs = batch["masked_weights"].sum(), batch["pair_weights"].sum()
        found = {"loss": masked, "accuracy": masked, "pair_loss": pairs, "pair_accuracy": pairs}
        return {name: found[name] for name in self.coefficients()}

    def tokens(self, batch: Batch) -> jax.Array:
        return real_tokens(batch)

    def sums(
        self, model: Model, params: Any, batch: Batch, dropout_key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        loss, correct, pair_logits = model.apply(
            params,
            Texts.of(batch),
            batch["masked_positions"],
            batch["masked_targets"],
            starts=batch["starts"] if self.pairs else None,
            dropout_key=dropout_key,
            method="masked_losses",
        )
        weights = batch["masked_weights"]
        sums = {"loss": (loss * weights).sum(), "accuracy": (correct * weights).sum()}
        if self.pairs:
            pair_loss, pair_correct = label_losses(pair_logits, batch["pair_labels"])
            sums["pair_loss"] = (pair_loss * batch["pair_weights"]).sum()
            sums["pair_accuracy"] = (pair_correct * batch["pair_weights"]).sum()
        return sums

    def evaluation(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        return self.sums(model, params, batch) | {
            "masked": batch["masked_weights"].sum(), "pairs": batch["pair_weights"].sum()
        }  # fmt: skip

    def results(self, totals: dict[str, float]) -> dict[str, float]:
        """ "loss" and "accuracy" of the hidden tokens and, where there are pairs, of the pairs; and their numbers."""
        masked, pairs = max(totals["masked"], 1e-9), max(totals["pairs"], 1e-9)
        found = {name: totals[name] / masked for name in ("loss", "accuracy")} | {"tokens": totals["masked"]}
        if self.pairs:
            found |= {name: totals[name] / pairs for name in ("pair_loss", "pair_accuracy")}
        return found


@dataclasses.dataclass(frozen=True)
class ReplacedObjective:
    """Which tokens were exchanged for others? ELECTRA (Clark et al. 2020, arXiv 2003.10555, section 2).

    "loss" and "accuracy" are the encoder's, over all tokens. A generator that draws the others trains beside it:
    "generator_loss" is its mean cross-entropy of the hidden tokens, and what is trained on is
    generator_loss + weight * loss.

    Attributes:
      weight: of the encoder's loss beside a generator's; 0: there is no generator.
    """

    weight: float = 0.0
    additive = True

    @classmethod
    def make(cls, cfg: Config) -> "ReplacedObjective":
        return cls(cfg.train.discriminator_weight if cfg.model.generator_divisor else 0.0)

    def coefficients(self) -> dict[str, float]:
        generator = {"generator_loss": 1.0, "generator_accuracy": 0.0} if self.weight else {}
        return {"loss": self.weight or 1.0, "accuracy": 0.0} | generator

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        masked, real = batch["masked_weights"].sum(), real_tokens(batch)
        return {name: masked if name.startswith("generator") else real for name in self.coefficients()}

    def tokens(self, batch: Batch) -> jax.Array:
        return real_tokens(batch)

    def sums(
        self, model: Model, params: Any, batch: Batch, dropout_key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        logits, replaced, generator = model.apply(
            params,
            Texts.of(batch),
            batch["masked_positions"],
            batch["masked_targets"],
            batch["masked_weights"],
            batch["masked_draws"],
            dropout_key=dropout_key,
            method="replaced_tokens",
        )
        real = batch["segment_ids"] > 0
        loss = binary_cross_entropy(at_least_float32(logits), replaced)
        right = real & ((logits > 0) == replaced)
        sums = {"loss": jnp.where(real, loss, 0).sum(), "accuracy": right.sum().astype(loss.dtype)}
        if generator is not None:
            weights = batch["masked_weights"]
            sums["generator_loss"], sums["generator_accuracy"] = ((term * weights).sum() for term in generator)
        return sums

    def evaluation(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        counts = {"tokens": real_tokens(batch), "masked": batch["masked_weights"].sum()}
        return self.sums(model, params, batch) | counts

    def results(self, totals: dict[str, float]) -> dict[str, float]:
        """The terms' means, and the number of tokens."""
        masked, tokens = max(totals["masked"], 1e-9), max(totals["tokens"], 1e-9)
        over = lambda name: masked if name.startswith("generator") else tokens  # noqa: E731
        return {name: totals[name] / over(name) for name in self.coefficients()} | {"tokens": totals["tokens"]}


def real_tokens(batch: Batch) -> jax.Array:
    """Places that are not padding, scalar float32."""
    return (batch["segment_ids"] > 0).sum().astype(jnp.float32)


def label_losses(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and whether the likeliest label is the right one.

    Args:
      logits: (..., L); -inf at what cannot be.
      labels: (...) int32.
      smoothing: weight shared evenly by all labels.

    Returns:
      (...) float32 (or wider) and (...) bool.
    """
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    loss = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean(-1)
    return loss, logits.argmax(-1) == labels


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of labels 0 or 1, element by element."""
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
