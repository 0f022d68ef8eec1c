"""llm_jax: training of large models in JAX, readable, capable and exact."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`from llm_jax import finetune`, without loading JAX for those who do not ask for it."""
    if name == "finetune":
        return importlib.import_module("llm_jax.training.finetune").finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
