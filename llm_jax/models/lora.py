"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): which parameters they are, and how they join their layer's."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax.config import LoraConfig
from llm_jax.config.values import did_you_mean, refuse
from llm_jax.sharding import path_name

A, B = "lora_a", "lora_b"
Array = Any  # of numpy or jax


def has_adapter(lora: LoraConfig, name: str) -> bool:
    """Whether the linear layer of this name, as "query", has an adapter."""
    return lora.rank > 0 and any(re.fullmatch(pattern, name) for pattern in lora.targets)


def is_adapter(path: str) -> bool:
    """Whether the parameter of this path, as "stack/blocks/mlp/up/lora_a", belongs to an adapter."""
    return path.rpartition("/")[2] in (A, B)


def layers(paths: Iterable[str]) -> set[str]:
    """Of a model's parameters, those layers, as "stack/blocks/attention/query", that have an adapter."""
    return {layer for layer, _, name in (path.rpartition("/") for path in paths) if name == A}


def check_targets(lora: LoraConfig, shapes: Any) -> None:
    """Refuse a pattern that gives no layer an adapter. `shapes`: the model's parameters.

    Raises ConfigError with the names of the layers that can have one.
    """
    if not lora.rank:
        return
    paths = [path_name(path).split("/") for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    adapted = {path[-2] for path in paths if path[-1] == A}
    kernels = {"/".join(path) for path in paths if path[-1] == "kernel"}
    possible = {path.split("/")[-2] for path in kernels if path.startswith("stack/") and "/moe/" not in path}
    others = {path[-2]: "/".join(path) for path in paths if len(path) > 1 and path[-2] not in possible}
    for pattern in lora.targets:
        if any(re.fullmatch(pattern, name) for name in adapted):
            continue
        found = [path for name, path in others.items() if re.fullmatch(pattern, name)]
        reason = "it names no linear layer of this model's blocks"
        if found:
            reason = f"{found[0]} can have no adapter: embedding, head, router, experts and norms cannot"
        fix = did_you_mean(pattern, possible, f"there are {', '.join(sorted(possible))}")
        raise refuse("model.lora.targets", pattern, reason, fix)


def merged(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """W + s A B of kernels (..., in, out), in float32 (float64, where any is in it)."""
    wide = np.promote_types(np.promote_types(kernel.dtype, np.float32), a.dtype)
    return kernel.astype(wide) + scale * (a.astype(wide) @ b.astype(wide))


def merge(leaves: Mapping[str, Array], lora: LoraConfig) -> dict[str, Array]:
    """Parameters by path without adapters: each is in its layer's kernel, rounded to the kernel's dtype."""
    found = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    for path in leaves:
        layer, _, name = path.rpartition("/")
        if name == A:
            kernel = leaves[f"{layer}/kernel"]
            whole = merged(kernel, leaves[path], leaves[f"{layer}/{B}"], lora.scale)
            found[f"{layer}/kernel"] = whole.astype(kernel.dtype)
    return found
