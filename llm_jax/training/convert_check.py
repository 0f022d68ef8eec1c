"""The end of a conversion: the logits of the source against those of what was written."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config, EncoderConfig, LoraConfig
from llm_jax.convert import reference
from llm_jax.convert.peft import Adapter
from llm_jax.convert.reference import Reference
from llm_jax.convert.rules import matches
from llm_jax.convert.safetensors import Tensor
from llm_jax.convert.source import Source
from llm_jax.errors import Unproven, UserError
from llm_jax.models import lora, registry
from llm_jax.models.encoder import Texts
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import checkpoint, restore, streamed_check
from llm_jax.training.arrays import by_path, nested
from llm_jax.training.parameters import SavedParameters

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
    kept = [tensor.dtype for name, tensor in tensors.items() if not matches(name, found.family.wide)]
    narrowed |= any(np.promote_types(dtype, params) != params for dtype in kept)
    theirs = reference.of_checkpoint(
        found.folder,
        registry.count_parameters(model.shapes()),
        params.name if narrowed else None,
        adapter=adapter.folder if adapter else None,
        merge=merge,
    )
    if isinstance(theirs, reference.Missing):
        return theirs
    print(reference.compare(of_run(str(folder), 0, theirs, streamed), theirs), flush=True)
    return None


def of_run(workdir: str, step: int, theirs: Reference, streamed: bool | None) -> np.ndarray:
    """Logits of a run's model, whole or layer by layer."""
    if not streams(restore.read_config(workdir), counted(workdir), streamed):
        return logits(restore.restore(workdir, step, EXACT), theirs)
    cfg = restore.read_config(workdir)
    with SavedParameters(checkpoint.folder_of(workdir, step), cfg) as saved:
        return streamed_check.logits(cfg, saved.read, theirs)


def streams(cfg: Config, parameters: int, asked: bool | None) -> bool:
    """Whether the model is computed layer by layer: as asked, else where it is too large for the memory here."""
    if cfg.model.family != "decoder":
        if asked:
            raise UserError("--check=streamed: only decoders are computed layer by layer; leave it out")
        return False
    return streamed_check.is_needed(cfg, parameters) if asked is None else asked


def as_written(cfg: Config) -> Config:
    """With the model that an export writes: its adapters are merged, and the generator that trained it is left out."""
    alone = {"generator_divisor": 0} if isinstance(cfg.model, EncoderConfig) else {}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, lora=LoraConfig(), **alone))


def of_export(
    folder: Path, workdir: str, step: int, dtypes: Mapping[str, str], *, streamed: bool | None
) -> reference.Missing | None:
    """What was written against the run's model, its parameters rounded to the `dtypes` in which they were written."""
    theirs = reference.from_transformers(folder, counted(workdir))
    if isinstance(theirs, reference.Missing):
        return theirs
    saved_as = restore.read_config(workdir)
    if streams(saved_as, counted(workdir), streamed):
        plain = as_written(saved_as)
        with SavedParameters(checkpoint.folder_of(workdir, step), saved_as) as saved:
            read = lambda path, index: saved.merged(path, index).astype(dtypes[path]).astype(np.float32)  # noqa: E731
            ours = streamed_check.logits(plain, read, theirs)
        print(reference.compare(ours, theirs), flush=True)
        return None
    run = restore.restore(workdir, step, EXACT)
    cfg = as_written(run.cfg)
    wide = lambda leaf: leaf.astype(np.promote_types(leaf.dtype, np.float32))  # noqa: E731
    merged = lora.merge({path: wide(leaf) for path, leaf in by_path(run.params).items()}, run.cfg.model.lora)
    params = {path: merged[path].astype(dtype).astype(merged[path].dtype) for path, dtype in dtypes.items()}
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
    print(reference.compare(of_run(workdir, step, theirs, streamed), theirs), flush=True)
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
    wide = -(-length // parts) * parts  # what is behind the prompt is padding: nothing sees it
    padded = np.zeros((rows, wide), np.int32)
    padded[:, :length] = theirs.tokens
    outputs = functools.partial(encoder_outputs if isinstance(run.cfg.model, EncoderConfig) else decoder_outputs, run)
    apply = jax.jit(functools.partial(outputs, length=length, positions=theirs.positions))
    found = []
    with jax.default_matmul_precision("highest"):
        for row in padded:  # one prompt at a time, as often as the mesh splits the batch
            several = np.repeat(row[None], layout.batch_shards, axis=0)
            found.append(np.asarray(apply(run.params, several)[0]))
    return np.stack(found)[..., : theirs.logits.shape[-1]].astype(np.float64)


def decoder_outputs(run: restore.TrainedModel, params: Any, tokens: Any, length: int, positions: np.ndarray) -> Any:
    return run.model.apply(params, tokens)[:, positions]


def encoder_outputs(run: restore.TrainedModel, params: Any, tokens: Any, length: int, positions: np.ndarray) -> Any:
    """What `torch_reference.encoder_outputs` keeps: what the head makes of tokens, what it makes of the text behind."""
    model, (rows, wide) = run.model, tokens.shape
    segments = jnp.broadcast_to(jnp.asarray(np.arange(wide) < length, jnp.int32)[None], (rows, wide))
    starts = jnp.zeros((rows, 1), jnp.int32)
    places = jnp.broadcast_to(jnp.asarray(positions)[None], (rows, len(positions)))
    texts = Texts(tokens, segment_ids=segments)

    def everywhere(of_text: jax.Array) -> jax.Array:
        return jnp.broadcast_to(of_text, (rows, len(positions), of_text.shape[-1]))

    match model.cfg.head:
        case "masked" | "masked_pairs":
            logits = model.apply(params, texts, places, method="masked_logits")[..., : model.cfg.vocab_size]
            if model.cfg.head == "masked":
                return logits
            *_, pairs = model.apply(params, texts, places, places, starts=starts, method="masked_losses")
            return jnp.concatenate([logits, everywhere(pairs)], -1)
        case "text":
            return everywhere(model.apply(params, texts, starts, method="text_logits"))
        case "token":
            return model.apply(params, texts, method="token_logits")[:, positions]
        case "replaced":
            return model.apply(params, texts, method="replaced_logits")[:, positions, None]
    hidden = model.apply(params, texts, method="hidden")[:, positions]
    if model.cfg.head == "embedding":
        return hidden
    return jnp.concatenate([hidden, everywhere(model.apply(params, texts, starts, method="text_logits"))], -1)


def say_unproven(missing: reference.Missing | None) -> None:
    if missing is not None:
        raise Unproven(
            f"UNPROVEN: the logits were compared with nothing ({missing.reason}). It is kept. Install the extra "
            "`parity`, or store a reference beside the checkpoint: python -m llm_jax.convert.torch_reference FOLDER"
        )
