"""llm_jax: training of large models in JAX, readable, capable and exact."""

__version__ = "0.1.0"
