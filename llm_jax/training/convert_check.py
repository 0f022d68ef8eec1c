"""The end of a conversion: the logits of the source against those of what was written."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from llm_jax.config import LoraConfig
from llm_jax.convert import reference
from llm_jax.convert.peft import Adapter
from llm_jax.convert.reference import Reference
from llm_jax.convert.safetensors import Tensor
from llm_jax.convert.source import Source
from llm_jax.errors import Unproven
from llm_jax.models import lora, registry
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import restore
from llm_jax.training.arrays import by_path, nested

NOT_ASKED = reference.Missing("--no_check was given")
EXACT = ("precision.compute=float32", "precision.products=native")


def of_import(
    folder: Path,
    found: Source,
    model: registry.Model,
    tensors: dict[str, Tensor],
    adapter: Adapter | None,
    *,
    merge: bool,
    streamed: bool | None,
) -> reference.Missing | None:
    """The run in `folder` against its source, and its adapter where it has one."""
    params = model.module.precision.params
    narrowed = merge and np.promote_types(params, np.float32) != params
    narrowed |= any(np.promote_types(tensor.dtype, params) != params for tensor in tensors.values())
    theirs = reference.of_checkpoint(
        found.folder,
        registry.count_parameters(model.shapes()),
        params.name if narrowed else None,
        adapter=adapter.folder if adapter else None,
        merge=merge,
    )
    if isinstance(theirs, reference.Missing):
        return theirs
    print(reference.compare(logits(restore.restore(str(folder), overrides=EXACT), theirs), theirs), flush=True)
    return None


def of_export(
    folder: Path, workdir: str, step: int, dtypes: Mapping[str, str], *, streamed: bool | None
) -> reference.Missing | None:
    """What was written against the run's model, its parameters rounded to the `dtypes` in which they were written."""
    theirs = reference.from_transformers(folder, counted(workdir))
    if isinstance(theirs, reference.Missing):
        return theirs
    run = restore.restore(workdir, step, EXACT)
    cfg = dataclasses.replace(run.cfg, model=dataclasses.replace(run.cfg.model, lora=LoraConfig()))
    wide = lambda leaf: leaf.astype(np.promote_types(leaf.dtype, np.float32))  # noqa: E731
    merged = lora.merge({path: wide(leaf) for path, leaf in by_path(run.params).items()}, run.cfg.model.lora)
    params = {path: leaf.astype(dtypes[path]).astype(leaf.dtype) for path, leaf in merged.items()}
    model = registry.build(cfg.model, run.model.module.layout, Precision.make(run.cfg.precision))
    ours = logits(dataclasses.replace(run, model=model, params=nested(params)), theirs)
    print(reference.compare(ours, theirs), flush=True)
    return None


def of_adapter(
    folder: Path, workdir: str, step: int, base: str | None, *, streamed: bool | None
) -> reference.Missing | None:
    """Adapters that were written, on the model that the run was converted from, against the run's model."""
    if base is None or not Path(base).is_dir():
        return reference.Missing("an adapter has logits with its model alone, and that is not known here as a path")
    cfg = restore.read_config(workdir)
    rounded = None if cfg.precision.params in ("float32", "float64") else cfg.precision.params
    theirs = reference.of_checkpoint(Path(base), counted(workdir), rounded, adapter=folder)
    if isinstance(theirs, reference.Missing):
        return theirs
    print(reference.compare(logits(restore.restore(workdir, step, EXACT), theirs), theirs), flush=True)
    return None


def counted(workdir: str) -> int:
    """Parameters of a run."""
    cfg = restore.read_config(workdir)
    return registry.count_parameters(registry.build(cfg.model, Layout(), Precision.make(cfg.precision)).shapes())


def logits(run: restore.TrainedModel, theirs: Reference) -> np.ndarray:
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
