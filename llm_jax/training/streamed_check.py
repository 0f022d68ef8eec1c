"""Logits of a model that is too large to be in memory: its parameters are read and dropped layer by layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config
from llm_jax.config.kinds import layer_kinds, places
from llm_jax.convert.reference import Reference, available_memory
from llm_jax.models import registry
from llm_jax.models.layerwise import Layerwise
from llm_jax.precision import Precision
from llm_jax.sharding import Layout

Read = Callable[[str, tuple[int, ...]], np.ndarray]  # a parameter's path and index to its numbers
SHARE = 0.5  # of the memory that is free, which parameters may take before they are streamed


def is_needed(cfg: Config, parameters: int) -> bool:
    """Whether the parameters, in their dtype, would take more than `SHARE` of the machine's free memory."""
    there = available_memory()
    return there is not None and parameters * np.dtype(cfg.precision.params).itemsize > SHARE * there


def logits(cfg: Config, read: Read, theirs: Reference) -> np.ndarray:
    """Our logits of the reference's prompts at its positions, (B, P, V) float64: as `convert_check.logits`.

    Args:
      cfg: of a decoder. Whatever it computes in, here it is float32.
      read: its parameters, by path, and in a stack by layer.
    """
    precision = Precision.make(cfg.precision)
    exact = Precision(precision.params, jnp.dtype(jnp.float32))
    model = registry.build(cfg.model, Layout(), exact)
    parts, layers = Layerwise(model), layer_paths(cfg, model)
    with jax.default_matmul_precision("highest"):
        outer = {path: read(path, ()) for path in parts.of_embedding}
        rows = [parts.embed(outer, row[None]) for row in theirs.tokens]
        del outer
        for kind, paths in zip(layer_kinds(cfg.model), layers, strict=True):
            params = {name: read(path, index) for name, (path, index) in paths.items()}
            rows = [(parts.layer(kind, params, x, shared), shared) for x, shared in rows]
            jax.block_until_ready(rows)  # before the next layer is read: so there is one at a time
            del params
        outer = {path: read(path, ()) for path in parts.of_head}
        found = [np.asarray(parts.logits(outer, x)[0, theirs.positions]) for x, _ in rows]
    return np.stack(found)[..., : theirs.logits.shape[-1]].astype(np.float64)


def layer_paths(cfg: Config, model: registry.Model) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """For each layer, its parameters' names in the block, and their paths and indices in the model."""
    leaves = jax.tree_util.tree_leaves_with_path(model.shapes()["stack"])
    names = ["/".join(part.key for part in path) for path, _ in leaves]
    found = []
    for stack, index in places(cfg.model):
        mine = [name for name in names if name.startswith(f"{stack}/")]
        found.append({name.removeprefix(f"{stack}/"): (f"stack/{name}", index) for name in mine})
    return found
