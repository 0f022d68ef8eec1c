"""Next-token prediction as named loss terms, each (sum, weight, coefficient)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import Config, MoEConfig
from llm_jax.models.decoder import TokenLosses
from llm_jax.models.registry import Model
from llm_jax.objectives.base import Batch


@dataclasses.dataclass(frozen=True)
class LanguageObjective:
    """Cross-entropy over the tokens with weight, and PaLM's z-loss (arXiv 2204.02311, section 5).

    A term is a sum over tokens and the weight to divide it by. The weight depends on the batch alone and is totalled
    over the whole global batch, devices and micro-batches together, before anything is divided: so that micro-batches
    with unequal numbers of tokens give the gradient of the whole.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    segments: bool = True  # rows hold several documents; without, masks are plain causal ones
    chunk: int = 0  # tokens of a row whose logits exist at a time; 0: all
    moe: MoEConfig = MoEConfig()  # its terms are means over real tokens and layers
    num_layers: int = 1  # with experts

    @classmethod
    def make(cls, cfg: Config) -> "LanguageObjective":
        train, model = cfg.train, cfg.model
        segments = cfg.data.mask_documents
        layers = model.num_layers - model.moe.dense_layers
        return cls(train.z_loss, train.label_smoothing, segments, train.loss_chunk, model.moe, layers)

    def coefficients(self) -> dict[str, float]:
        """Of each term that is reported; the loss is the sum of those times their means."""
        coefficients = {"loss": 1.0}
        if self.z_loss:
            coefficients["z_loss"] = self.z_loss
        if self.moe.num_experts:
            coefficients |= {"router_balance": self.moe.balance_loss, "router_z": self.moe.router_z_loss}
            coefficients |= {"router_dropped": 0.0}
        if self.moe.balance_bias:
            coefficients["router_pull"] = 1.0
        return coefficients

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Each term's weight over this batch, scalar float32."""
        predicted = batch["loss_weights"].sum()
        real = (batch["segment_ids"] != 0).sum() if self.segments else batch["tokens"].size
        routed = jnp.asarray(real, predicted.dtype) * self.num_layers
        weights = {
            "loss": predicted,
            "z_loss": predicted,
            "router_balance": routed,
            "router_z": routed,
            "router_dropped": routed * self.moe.top_k,
            "router_pull": jnp.ones_like(predicted),  # its gradient stays whole numbers: see `kernels.experts.route`
        }
        return {name: weights[name] for name in self.coefficients()}

    def tokens(self, batch: Batch) -> jax.Array:
        """The targets that count."""
        return batch["loss_weights"].sum()

    def sums(self, model: Model, params: Any, batch: Batch, dropout_key: jax.Array | None) -> dict[str, jax.Array]:
        """Each term's sum over this batch, scalar."""
        found = self._losses(model, params, batch, dropout_key, self.label_smoothing)
        sums = {"loss": (found.loss * batch["loss_weights"]).sum()}
        if self.z_loss:
            sums["z_loss"] = (jnp.square(found.log_z) * batch["loss_weights"]).sum()
        if found.routing is not None:
            parts = found.routing._asdict().items()
            sums |= {f"router_{name}": values.sum() for name, values in parts if values is not None}
        return sums

    def evaluation(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Sums for an honest evaluation: plain cross-entropy, no smoothing, no other term.

        Returns:
          Scalars: "nats", "tokens", "correct" (the likeliest token is the target) and, where the bytes that targets
          stand for are known, "bytes".
        """
        found = self._losses(model, params, batch)
        weights = batch["loss_weights"]
        sums = {
            "nats": (found.loss * weights).sum(),
            "tokens": weights.sum(),
            "correct": (found.correct * weights).sum(),
        }
        if "target_bytes" in batch:
            sums["bytes"] = batch["target_bytes"].astype(jnp.float32).sum()
        return sums

    def results(self, totals: dict[str, float]) -> dict[str, float]:
        """ "loss" (nats a token), "accuracy", "tokens" and, where the tokenizer knows the bytes that each token stands
        for, "bits_per_byte", which compares across tokenizers."""
        tokens = max(totals["tokens"], 1e-9)
        found = {"loss": totals["nats"] / tokens, "accuracy": totals["correct"] / tokens, "tokens": totals["tokens"]}
        if totals.get("bytes"):
            found["bits_per_byte"] = totals["nats"] / math.log(2) / totals["bytes"]
        return found

    def _losses(
        self, model: Model, params: Any, batch: Batch, dropout_key: jax.Array | None = None, smoothing: float = 0.0
    ) -> TokenLosses:
        places = (batch["positions"], batch["segment_ids"]) if self.segments else ()
        return model.apply(
            params,
            batch["tokens"],
            batch["targets"],
            *places,
            rows=batch.get("rows"),
            label_smoothing=smoothing,
            chunk=self.chunk,
            dropout_key=dropout_key,
            method="token_losses",
        )
