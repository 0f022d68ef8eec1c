"""The end of a conversion: the logits of the source against those of what was written."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.convert import reference
from llm_jax.convert.safetensors import Tensor
from llm_jax.convert.source import Source
from llm_jax.errors import Unproven
from llm_jax.models import registry
from llm_jax.precision import Precision
from llm_jax.sharding import path_name
from llm_jax.training import restore


def of_import(
    folder: Path, found: Source, model: registry.Model, tensors: dict[str, Tensor]
) -> reference.Missing | None:
    params = model.module.precision.params
    narrowed = any(np.promote_types(tensor.dtype, params) != params for tensor in tensors.values())
    count = registry.count_parameters(model.shapes())
    theirs = reference.of_checkpoint(found.folder, count, params.name if narrowed else None)
    if isinstance(theirs, reference.Missing):
        return theirs
    run = restore.restore(str(folder), overrides=["precision.compute=float32", "precision.products=native"])
    print(reference.compare(logits(run, theirs), theirs), flush=True)
    return None


def of_export(folder: Path, run: restore.TrainedModel, dtypes: dict[str, str]) -> reference.Missing | None:
    """What was written against the run's model, its parameters rounded to the `dtypes` in which they were written."""
    theirs = reference.from_transformers(folder, registry.count_parameters(run.model.shapes()))
    if isinstance(theirs, reference.Missing):
        return theirs

    def rounded(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtypes[path_name(path)]).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(rounded, run.params)
    precision = dataclasses.replace(run.cfg.precision, compute="float32", products="native")
    model = registry.build(run.cfg.model, run.model.module.layout, Precision.make(precision))
    ours = logits(dataclasses.replace(run, model=model, params=params), theirs)
    print(reference.compare(ours, theirs), flush=True)
    return None


def logits(run: restore.TrainedModel, theirs: reference.Reference) -> np.ndarray:
    """Our logits of the reference's prompts at its positions, (B, P, V) float32: products in full float32."""
    layout = run.model.module.layout
    rows, length = theirs.tokens.shape
    parts = layout.activation_pieces("length")
    wide = -(-length // parts) * parts  # causal: what is behind the prompt changes nothing
    padded = np.zeros((rows, wide), np.int32)
    padded[:, :length] = theirs.tokens
    apply = jax.jit(lambda params, tokens: run.model.apply(params, tokens)[:, theirs.positions])
    found = []
    with jax.default_matmul_precision("highest"):
        for row in padded:  # one prompt at a time, as often as the mesh splits the batch
            several = np.repeat(row[None], layout.batch_shards, axis=0)
            found.append(np.asarray(apply(run.params, several)[0]))
    return np.stack(found)[..., : theirs.logits.shape[-1]].astype(np.float64)


def say_unproven(missing: reference.Missing | None) -> None:
    if missing is not None:
        raise Unproven(
            f"UNPROVEN: the logits were compared with nothing ({missing.reason}). It is kept. Install the extra "
            "`parity`, or store a reference beside the checkpoint: python -m llm_jax.convert.torch_reference FOLDER"
        )
