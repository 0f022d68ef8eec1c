"""The losses of labelled tasks, with the scores of each text for whoever measures or predicts.

classification  cross-entropy of the label                                     model method text_logits
multilabel      mean binary cross-entropy over the labels                      text_logits
regression      squared error                                                  text_logits
choice          cross-entropy over the texts of a record                       text_logits
tokens          cross-entropy at the pieces with a label                       token_logits
questions       mean of two cross-entropies over a text's pieces               token_logits
similarity      cross-entropy of a text's own pair among all of the batch      embeddings
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import Config
from llm_jax.models.encoder import Texts
from llm_jax.models.registry import Model
from llm_jax.objectives.base import Batch
from llm_jax.objectives.masked import binary_cross_entropy, label_losses, real_tokens
from llm_jax.precision import at_least_float32

METHODS = {"tokens": "token_logits", "questions": "token_logits", "similarity": "embeddings"}  # else text_logits


@dataclasses.dataclass(frozen=True)
class LabelledObjective:
    """Features as in data/labelled_rows.py.

    Attributes:
      task: of data.task.
      texts_a_record: texts that stand for one record: rows b, B + b, 2 B + b, ...
      label_smoothing: of classification and tokens.
      temperature: of similarity.
    """

    task: str
    texts_a_record: int = 1
    label_smoothing: float = 0.0
    temperature: float = 0.05

    @classmethod
    def make(cls, cfg: Config, texts_a_record: int) -> "LabelledObjective":
        return cls(cfg.data.task, texts_a_record, cfg.train.label_smoothing, cfg.train.temperature)

    @property
    def additive(self) -> bool:
        """The texts of other micro-batches are what a text is told from."""
        return self.task != "similarity"

    def coefficients(self) -> dict[str, float]:
        has_accuracy = self.task not in ("regression", "multilabel")
        return {"loss": 1.0} | ({"accuracy": 0.0} if has_accuracy else {})

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        if self.task == "tokens":
            count = (batch["labels"] >= 0).sum()
        else:
            count = (batch["text_ids"] >= 0).sum() / self.texts_a_record
        return dict.fromkeys(self.coefficients(), count.astype(jnp.float32))

    def tokens(self, batch: Batch) -> jax.Array:
        return real_tokens(batch)

    def sums(self, model: Model, params: Any, batch: Batch, dropout_key: jax.Array | None) -> dict[str, jax.Array]:
        scores = self.scores(model, params, batch, dropout_key)
        return self._sums(scores, batch, self.label_smoothing)

    def evaluation(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Sums without smoothing, their weight as "count", and "scores", "text_ids" and "starts" of the texts."""
        scores = self.scores(model, params, batch)
        kept = {"scores": scores, "text_ids": batch["text_ids"], "starts": batch["starts"]}
        told = self.texts_a_record > 1 if self.task == "similarity" else "labels" in batch
        if not told:  # new records, for prediction
            return kept
        return self._sums(scores, batch, 0.0) | {"count": self.weights(batch)["loss"]} | kept

    def scores(self, model: Model, params: Any, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """(B, S, L) of texts or (B, T, L) of tokens, float32; of similarity the embeddings, (B, S, D)."""
        method = METHODS.get(self.task, "text_logits")
        of_texts = () if method == "token_logits" else (batch["starts"],)
        found = model.apply(params, Texts.of(batch), *of_texts, dropout_key=dropout_key, method=method)
        return at_least_float32(found)

    def results(self, totals: dict[str, float]) -> dict[str, float]:
        count = max(totals["count"], 1e-9)
        return {name: totals[name] / count for name in self.coefficients()} | {"examples": totals["count"]}

    def _sums(self, scores: jax.Array, batch: Batch, smoothing: float) -> dict[str, jax.Array]:
        there, labels = batch["text_ids"] >= 0, batch.get("labels")
        match self.task:
            case "classification":
                loss, correct = label_losses(scores, labels, smoothing)
            case "multilabel":
                loss, correct = binary_cross_entropy(scores, labels).mean(-1), None
            case "regression":
                loss, correct = jnp.square(scores - labels).mean(-1), None
            case "tokens":
                there = labels >= 0
                loss, correct = label_losses(scores, jnp.maximum(labels, 0), smoothing)
            case "questions":
                loss, correct = span_losses(scores, labels, batch["segment_ids"])
            case "choice":
                loss, correct = label_losses(self._by_record(scores)[..., 0].T, self._by_record(labels)[0])
                there = self._by_record(there)[0]
            case "similarity":
                there = self._by_record(there)[0]
                loss, correct = similarity_losses(self._by_record(scores), there, self.temperature)
        sums = {"loss": jnp.where(there, loss, 0).sum()}
        return sums if correct is None else sums | {"accuracy": (there & correct).sum().astype(loss.dtype)}

    def _by_record(self, x: jax.Array) -> jax.Array:
        """(C * B, 1, ...) to (C, B, ...)."""
        return x[:, 0].reshape(self.texts_a_record, -1, *x.shape[2:])


def span_losses(scores: jax.Array, labels: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of an answer's first and last place among those of its text.

    Args:
      scores: (B, T, 2).
      labels: (B, S, 2) places in the row.
      segment_ids: (B, T).

    Returns:
      The mean of the two, (B, S), and whether both are the likeliest, (B, S) bool.
    """
    slots = jnp.arange(1, labels.shape[1] + 1)
    own = segment_ids[:, None, :] == slots[None, :, None]  # (B, S, T)
    lowest = jnp.finfo(scores.dtype).min  # not -inf: a slot without a text has no place at all
    by_slot = jnp.where(own[..., None], scores[:, None], lowest)
    loss, correct = label_losses(jnp.moveaxis(by_slot, -1, -2), labels)
    return loss.mean(-1), correct.all(-1)


def similarity_losses(embeddings: jax.Array, there: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Each text's own pair told from all pairs, and all negatives, of the batch (SimCSE, arXiv 2104.08821, eq. 5).

    Args:
      embeddings: (C, B, D) of the texts, their pairs and, with C = 3, negatives.
      there: (B,) bool, whether it is a record.
      temperature: that cosines are divided by.

    Returns:
      (B,) cross-entropy and (B,) bool, the pair is the nearest.
    """
    count = embeddings.shape[1]
    squares = jnp.square(embeddings).sum(-1, keepdims=True)
    unit = embeddings * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))  # finite gradients in a row of padding too
    others = unit[1:].reshape(-1, unit.shape[-1])
    cosines = unit[0] @ others.T / temperature
    cosines = jnp.where(jnp.tile(there, len(unit) - 1)[None], cosines, jnp.finfo(cosines.dtype).min)
    return label_losses(cosines, jnp.arange(count))
