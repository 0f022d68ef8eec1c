"""Cross-entropy from logits, for each token."""

import jax
import jax.numpy as jnp

from llm_jax.precision import at_least_float32


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target] and log Z, for each token, in at least float32.

    Args:
      logits: (..., V). Entries of -inf (ids that no text can have) take no part, in smoothing neither.
      targets: (...) int32 in [0, V).
      label_smoothing: e in (1 - e) * onehot + e * uniform over the ids that can occur.

    Returns:
      (...) negative log-likelihood, less the constant that smoothing adds, so that a perfect prediction has 0 (t5x
      `losses.py`); and (...) log Z = logsumexp(logits).
    """
    logits = at_least_float32(logits)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - target
    if label_smoothing:
        possible = jnp.isfinite(logits)
        count = possible.sum(-1)
        mean = jnp.where(possible, logits, 0).sum(-1) / count
        high, low = 1 - label_smoothing + label_smoothing / count, label_smoothing / count
        entropy = -(high * jnp.log(high) + (count - 1) * low * jnp.log(low))
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - mean) - entropy
    return loss, log_z
