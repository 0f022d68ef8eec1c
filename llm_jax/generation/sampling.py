"""From logits to the next token: temperature, then top-k, top-p and min-p, each on what the one before left."""

import jax
import jax.numpy as jnp

from llm_jax.config import GenerateConfig


def filtered(logits: jax.Array, cfg: GenerateConfig) -> jax.Array:
    """`logits` (B, V) over the temperature, with -inf where a token may not be drawn. The likeliest always may, and
    tokens that are equally likely stay or go together.

    top_k keeps the k likeliest; top_p (arXiv 1904.09751) the smallest set whose probability reaches p; min_p
    (arXiv 2407.01082) those with at least min_p times the probability of the likeliest.
    """
    logits = logits / cfg.temperature
    if cfg.top_k and cfg.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, cfg.top_k)[0][:, -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if cfg.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.where(before < cfg.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if cfg.min_p:
        logits = jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(cfg.min_p), logits, -jnp.inf)
    return logits


def sample(logits: jax.Array, keys: jax.Array, cfg: GenerateConfig) -> jax.Array:
    """The next token of each row: (B, V) logits and (B,) keys to (B,) int32. Temperature 0 takes the likeliest.

    Each row has a key of its own, so what it says does not depend on its neighbours in the batch.
    """
    if not cfg.temperature:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, cfg)).astype(jnp.int32)
