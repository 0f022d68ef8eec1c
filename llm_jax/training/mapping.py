"""`llm-jax convert --dry_run` and `--list`: what would become what, and which families there are."""

import importlib.resources
import json
from collections.abc import Sequence

import jax
import numpy as np

from llm_jax import sharding
from llm_jax.config.checks import MESH_AXES
from llm_jax.convert import families, hub, source
from llm_jax.convert.rules import Move
from llm_jax.convert.safetensors import Tensor
from llm_jax.errors import DataError
from llm_jax.models import registry
from llm_jax.sharding import Layout
from llm_jax.training.arrays import by_path
from llm_jax.training.convert import built, moves_of, run_config


def mapping(name: str, *, overrides: Sequence[str] = (), dtype: str | None = None, revision: str | None = None) -> str:
    """`--dry_run`: each of their tensors, what it becomes, shape, dtype, how the mesh splits it. Reads no weights."""
    found = source.open_folder(hub.folder_of(name, revision, weights=False))
    try:
        tensors = found.tensors()
    except DataError:  # a name on the hub, of which the small files alone were fetched
        tensors = {}
    widest = source.widest(tensors, found.family.wide).name if tensors else stated_dtype(found)
    kept = dtype or widest or "float32"
    cfg = run_config(found, name, overrides, "float32" if kept == "float16" else kept)
    sizes = [getattr(cfg.mesh, axis) for axis in MESH_AXES]
    layout = sharding.abstract_layout(cfg.mesh, jax.device_count() if -1 in sizes else int(np.prod(sizes)))
    model = built(cfg, layout)
    moves = moves_of(found.family, found.cfg.vocab_size, model, tensors)
    if tensors:
        source.check_names(found, tensors, moves)
    return table(moves, tensors, model, layout, cfg.precision.params)


def stated_dtype(found: source.Source) -> str | None:
    """Of config.json: transformers 5 writes dtype, those before torch_dtype."""
    return found.values.get("dtype") or found.values.get("torch_dtype")


def table(moves: Sequence[Move], tensors: dict[str, Tensor], model: registry.Model, layout: Layout, params: str) -> str:
    splits = by_path(layout.parameter_shardings(model.shapes(), model.axes()))
    lines = [("theirs", "ours", "shape", "dtype", "split over")]
    for move in moves:
        for i, slot in enumerate(move.ours):
            name = move.theirs[i] if i < len(move.theirs) else ""
            tensor = tensors.get(name)
            dtype = f"{tensor.dtype.name} to {params}" if tensor and tensor.dtype.name != params else params
            place = slot.path + (str(list(slot.index)) if slot.index else "")
            lines.append((name, place, "x".join(map(str, slot.shape)), dtype, split_over(splits[slot.path])))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    row = lambda line: [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)] + [line[4]]  # noqa: E731
    return "\n".join("  ".join(row(line)).rstrip() for line in lines)


def split_over(placed: jax.sharding.NamedSharding) -> str:
    """The mesh axes that split a parameter, those of size 1 left out."""
    axes = [axis for part in placed.spec if part for axis in ([part] if isinstance(part, str) else part)]
    return " ".join(axis for axis in axes if placed.mesh.shape[axis] > 1)


def support_table() -> str:
    """`--list`: the families that can be converted, and how many of each the tests compare.

    They are counted when support.json is made, by tests/golden/make_support.py.
    """
    proven = json.loads(importlib.resources.files("llm_jax.convert").joinpath("support.json").read_text("utf-8"))
    lines = [("architecture", "models", "compared with transformers")]
    for name, family in families.FAMILIES.items():
        count = len(proven.get(name, ()))
        lines.append((name, family.title, f"{count} model{'s' * (count > 1)}" if count else "no"))
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]}" for line in lines)
