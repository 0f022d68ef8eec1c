"""A trained model from its run folder, and the commands that use one: evaluate, generate, export."""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.flax

from llm_jax import config, distributed, sharding
from llm_jax.backend import start_backend
from llm_jax.config import Config, MeshConfig
from llm_jax.config.mesh import MESH_AXES, check_splits, mesh_sizes
from llm_jax.data import store, tasks, tokenizers
from llm_jax.errors import ConfigError, DataError, UserError
from llm_jax.generation.generate import Generator
from llm_jax.models import registry
from llm_jax.objectives import registry as objectives
from llm_jax.precision import Precision
from llm_jax.sharding import path_name
from llm_jax.training import checkpoint, run_folder
from llm_jax.training.back_end import fall_back
from llm_jax.training.evaluate import make_evaluator


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its parameters (the running average where the run keeps one), from step `step` of a run."""

    cfg: Config
    model: registry.Model
    params: Any
    tokenizer: tokenizers.Tokenizer
    step: int


def restore(workdir: str, step: int | None = None, overrides: Sequence[str] = ()) -> TrainedModel:
    """The model of a run, needing nothing but its folder.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None: the latest, or with checkpoint.use=best the best.
      overrides: "key=value" changes to its config, such as another mesh for another machine.

    Raises:
      UserError: the folder is no run, is damaged, or has no such checkpoint.
    """
    distributed.initialize()
    cfg = config.override(read_config(workdir), overrides)
    config.check(cfg)
    start_backend(cfg)  # 64 bits, where the run has them
    fixed = any(item.startswith("mesh.") for item in overrides)
    cfg = fitted(cfg, fixed=fixed)
    if not fixed and not splits_evenly(cfg):
        cfg = with_mesh(cfg, "data")
        print("note: the parameters do not split over the devices here; each holds all of them", file=sys.stderr)
    layout = sharding.make_layout(cfg.mesh)
    if not any(item.startswith("model.attention_kernel=") for item in overrides):
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention_kernel=fall_back(cfg, layout)))
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    shapes = model.shapes()
    shardings = layout.parameter_shardings(shapes, model.axes())
    name, wide = ("ema", True) if cfg.train.ema_decay else ("params", False)
    kept = lambda dtype: jnp.promote_types(dtype, jnp.float32) if wide else dtype  # noqa: E731 as state.fresh
    abstract = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, kept(s.dtype), sharding=at), shapes, shardings)
    if step is None and cfg.checkpoint.use == "best":
        step = checkpoint.best_step(workdir)
    params, step = checkpoint.restore_params(workdir, step, abstract, name)
    return TrainedModel(cfg, model, params, tokenizers.load(f"{workdir}/tokenizer"), step)


def read_config(workdir: str) -> Config:
    try:
        return config.from_dict(run_folder.read(workdir).config)
    except ConfigError as error:
        raise UserError(f"{workdir}/config.json cannot be read by this version: {error}") from None


def fitted(cfg: Config, *, fixed: bool) -> Config:
    """`cfg` with a mesh that fits the devices here: its own, or, unless `fixed`, all of them on the axis fsdp."""
    if not fixed:  # which axis goes over slices matters to speed alone
        cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, across_slices=()))
    try:
        check_splits(cfg, mesh_sizes(cfg.mesh, jax.device_count()))
        return cfg
    except ConfigError as error:
        if fixed:
            raise
        print(f"note: the run's mesh does not fit here ({error}); using mesh.fsdp=-1", file=sys.stderr)
        return with_mesh(cfg, "fsdp")


def with_mesh(cfg: Config, axis: str) -> Config:
    """`cfg` with all devices on one axis of the mesh, and the usual rules."""
    return dataclasses.replace(cfg, mesh=MeshConfig(**dict.fromkeys(MESH_AXES, 1) | {axis: -1}))


def splits_evenly(cfg: Config) -> bool:
    """Whether every parameter has as many equal parts as its rules ask for."""
    layout = sharding.make_layout(cfg.mesh)
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    try:
        layout.parameter_shardings(model.shapes(), model.axes())
    except ConfigError:
        return False
    return True


def evaluate(workdir: str, step: int | None = None, overrides: Sequence[str] = ()) -> dict[str, float]:
    """`llm-jax evaluate`: the evaluation that the run itself makes at this step, or what `eval.*` overrides say."""
    run = restore(workdir, step, overrides)
    stores = tasks.prepare(run.cfg.data)
    check_same_tokens(run, stores)
    check_same_labels(workdir, run, stores)
    objective = objectives.make(run.cfg)
    evaluator = make_evaluator(run.cfg, stores, run.model, objective, run.model.module.layout)
    return {"step": run.step} | evaluator(run.params, run.step)


def export(workdir: str, folder: str, step: int | None = None) -> str:
    """`llm-jax export`: the model as files that need nothing of ours to be read.

    Args:
      workdir: the run's folder.
      folder: gets `model.safetensors` (each parameter under its path, such as "stack/blocks/mlp/up/kernel"),
        `config.json` and `tokenizer/`; it must not exist yet.
      step: which checkpoint; None: the latest.

    Returns:
      What was written, in words.
    """
    if os.path.exists(folder):
        raise UserError(f"--to={folder}: it exists already; give a new folder, nothing is overwritten")
    run = restore(workdir, step)
    if jax.process_count() > 1:
        raise UserError("export runs as one process: start it on one machine, without the others")
    partial = f"{folder}.partial"  # a killed export leaves no half model under the final name
    os.makedirs(partial, exist_ok=True)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(run.params)}
    safetensors.flax.save_file(leaves, f"{partial}/model.safetensors", metadata={"format": "llm_jax"})
    run_folder.write_json(Path(partial) / "config.json", config.to_dict(run.cfg))
    run.tokenizer.save(f"{partial}/tokenizer")
    os.rename(partial, folder)
    return f"{len(leaves)} parameters of step {run.step} are in {folder}/model.safetensors"


def check_same_tokens(run: TrainedModel, stores: Sequence[store.Store]) -> None:
    """Refuse data in which an id is not what the model learned it as: its text or the tokenizer's file has changed."""
    if run.cfg.data.tokenizer == "none":
        store.require_ids_below(stores, run.model.cfg.vocab_size)
    elif stores[0].tokenizer.identity() != run.tokenizer.identity():
        raise DataError(
            f"The tokenizer ({run.cfg.data.tokenizer}) that {stores[0].manifest['source']['path']} gives now is not "
            "the one that this run was trained with: its ids mean other text. Evaluate on the data as they were."
        )


def check_same_labels(workdir: str, run: TrainedModel, stores: Sequence[Any]) -> None:
    """Refuse labels that are not those, in the order, that the model learned."""
    learned, found = run_folder.read_labels(workdir), tuple(getattr(stores[0], "names", ()))
    if learned != found:
        raise DataError(
            f"{run.cfg.data.path} gives the labels {', '.join(found)} now, and the run learned {', '.join(learned)}; "
            "evaluate on the data as they were, or set data.columns.names to the run's"
        )


def generate(
    workdir: str,
    prompts: Sequence[str],
    given: Mapping[str, Any],
    seed: int,
    *,
    stream: bool,
    step: int | None = None,
) -> list[str]:
    """`llm-jax generate`: continue prompts with a checkpoint of the run, printing as it goes.

    Args:
      workdir: the run's folder.
      prompts: texts to continue.
      given: fields of `GenerateConfig` that differ from the run's own.
      seed: of the sampling.
      step: which checkpoint; None: the latest.
      stream: print each piece as soon as it is certain (one prompt), else each text when all are done.
    """
    run = restore(workdir, step)
    cfg = dataclasses.replace(run.cfg.generate, **given)
    generator = Generator(run.model, run.params, run.tokenizer)
    say = print if distributed.is_main() else lambda *_, **__: None
    if stream:
        say(prompts[0], end="", flush=True)
        texts = generator(prompts, cfg, seed, lambda row, piece: say(piece, end="", flush=True))
        say()
        return texts
    texts = generator(prompts, cfg, seed)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        say(f"--- {number + 1} of {len(prompts)}\n{prompt}{text}", flush=True)
    return texts
