"""A run, told in order: config, mesh, data, model, state, step, loop."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from typing import Any

import jax

from llm_jax import distributed, metrics, sharding
from llm_jax.config import Config, LogConfig, check_devices, check_vocab, run_steps, to_dict
from llm_jax.data import loader, store
from llm_jax.errors import Preempted
from llm_jax.generation.generate import Generator
from llm_jax.models import flops, registry
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.training import checkpoint, optim, report, run_folder
from llm_jax.training import state as train_state
from llm_jax.training.evaluate import Evaluator, make_evaluator
from llm_jax.training.restore import default_prompt
from llm_jax.training.step import make_train_step


def train(cfg: Config, workdir: str) -> None:
    """Train as `cfg` says, in `workdir`; go on where an earlier session of the same run stopped.

    Args:
      cfg: checked (`config.check`).
      workdir: absolute path or URL of the run's folder, on every process the same.

    Raises:
      UserError: what was asked for cannot be done; nothing was changed.
      Preempted: the machine was asked to stop; the state is saved.
      BadStepsError: too many non-finite steps in a row.
    """
    distributed.initialize()
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(distributed.Watchdog())
        check_devices(cfg, jax.device_count())
        layout = sharding.make_layout(cfg.mesh)

        stores = prepare_data(cfg)
        tokenizer = stores[0].tokenizer
        if cfg.data.tokenizer == "none":
            store.require_ids_below(stores, cfg.model.vocab_size)
        cfg = with_vocabulary(cfg, tokenizer.vocab_size)
        batch_size, seed = cfg.train.global_batch_size, cfg.seed
        data = stack.enter_context(
            contextlib.closing(loader.make_train(stores, cfg.data, batch_size, seed, layout))
        )
        steps = total_steps(cfg, data.epoch_rows)

        model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
        shapes, axes = model.shapes(), model.axes()
        objective = LanguageObjective(cfg.train.z_loss, cfg.train.label_smoothing, cfg.data.mask_documents)
        tx = optim.make(cfg.optim, steps, shapes, axes)
        abstract_state = train_state.abstract(model, tx, layout, ema=cfg.train.ema_decay > 0)
        evaluator = make_evaluator(cfg, stores, model, objective, layout) if has_validation(cfg) else None

        distributed.assert_same_everywhere("the config", json.dumps(to_dict(cfg), sort_keys=True))
        checkpoints = stack.enter_context(checkpoint.Checkpointer(workdir, cfg.checkpoint))  # locks the folder
        run_folder.check_same_config(workdir, to_dict(cfg))
        start = checkpoint.start(
            cfg.checkpoint, checkpoints, abstract_state, lambda: train_state.init(model, tx, abstract_state, seed)
        )
        state = start.state
        if start.data_state is not None:
            data.restore(start.data_state)
        run_folder.write(workdir, to_dict(cfg), tokenizer, shapes, axes)

        out = stack.enter_context(
            metrics.Metrics(
                workdir,
                cfg.log.trackers,
                name=cfg.name,
                config=to_dict(cfg),
                total_steps=steps,
                restored_step=start.step,
                main=distributed.is_main(),
            )
        )
        cost = flops.training_flops(cfg.model, shapes, axes, cfg.data.sequence_length)
        tokens = batch_size * cfg.data.sequence_length
        out.say(start.how)
        out.say(report.parameter_table(registry.count_parameters(shapes), tokens, cost))

        step_report = report.StepReport(
            out, data, cost, every=cfg.log.every, last=steps, max_bad_steps=cfg.train.max_bad_steps
        )
        train_step = make_train_step(
            model,
            objective,
            tx,
            optim.learning_rate(cfg.optim, steps),
            layout,
            abstract_state,
            seed=seed,
            accumulation=cfg.train.accumulation,
            ema_decay=cfg.train.ema_decay,
            trainable=optim.trainable_mask(cfg.optim, shapes),
        )
        profiler = stack.enter_context(Profiler(cfg.log, f"{workdir}/profile"))
        preemption = stack.enter_context(distributed.Preemption())  # before this, a signal ends the process at once
        compiled, evaluation = None, {}
        for i in range(start.step, steps):
            batch = next(data)  # drawn after the save of the step before, so that a save never holds a drawn batch
            if compiled is None:
                compiled = compile_step(train_step, state, batch, out)
                step_report.pause()
            profiler.before(i)
            state, values = compiled(state, batch)  # of fixed shapes: another shape is an error, never a recompilation
            step_report.add(i + 1, values)
            watchdog.progress()

            last, stopping = i + 1 == steps, preemption.preempted(i + 1)
            if last or (cfg.eval.every and (i + 1) % cfg.eval.every == 0):
                step_report.pause()
                evaluation = evaluate(evaluator, state, i + 1, out)
                step_report.pause()
            if last or stopping or (cfg.checkpoint.every and (i + 1) % cfg.checkpoint.every == 0):
                step_report.pause()
                checkpoints.save(i + 1, state, data.state(), evaluation)
                evaluation = {}
                step_report.pause()
            if stopping and not last:
                checkpoints.wait()
                raise Preempted(f"Asked to stop: step {i + 1} of {steps} is saved in {workdir}; run it again to go on.")
        checkpoints.wait()
        finish(cfg, workdir, out, stores, Generator(model, evaluated(state), tokenizer, default_prompt(cfg)))


def prepare_data(cfg: Config) -> list[store.Store]:
    """The token stores, tokenized by the main process where they are missing."""
    if distributed.is_main():
        store.prepare(cfg.data)
    distributed.barrier("data prepared")
    return store.prepare(cfg.data)


def with_vocabulary(cfg: Config, size: int) -> Config:
    """`cfg` with the model's vocabulary taken from the tokenizer where the config leaves it open."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=check_vocab(cfg, size)))


def total_steps(cfg: Config, epoch_rows: int) -> int:
    """The run's length in steps, given in steps, tokens or epochs; a step begun is a whole one."""
    return run_steps(cfg) or max(math.ceil(cfg.train.epochs * epoch_rows / cfg.train.global_batch_size), 1)


def has_validation(cfg: Config) -> bool:
    return bool(cfg.data.validation_fraction) or any(s.validation_path for s in cfg.data.sources().values())


def evaluated(state: train_state.TrainState) -> Any:
    """The parameters that evaluation and generation use: the running average where there is one."""
    return state.params if state.ema is None else state.ema


def evaluate(
    evaluator: Evaluator | None, state: train_state.TrainState, step: int, out: metrics.Metrics
) -> dict[str, float]:
    if evaluator is None:
        return {}
    results = evaluator(evaluated(state), step)
    out.write(step, results)
    return results


def compile_step(train_step: Any, state: train_state.TrainState, batch: Any, out: metrics.Metrics) -> Any:
    began = time.monotonic()
    compiled = train_step.lower(state, batch).compile()
    out.say(f"compiled the step in {time.monotonic() - began:.1f} s")
    return compiled


class Profiler:
    """Records a trace of the steps that the config names, for TensorBoard or XProf; a context manager."""

    def __init__(self, cfg: LogConfig, folder: str):
        self._steps = range(cfg.profile_start, cfg.profile_start + cfg.profile_steps)
        self._folder, self._tracing = folder, False

    def before(self, i: int) -> None:
        """Call before step i; a run that goes on inside the window traces the rest of it."""
        if i in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif i not in self._steps:
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


def finish(cfg: Config, workdir: str, out: metrics.Metrics, stores: list[store.Store], generator: Generator) -> None:
    """The end of a run: loss curve, sampled text, where it all is."""
    sample = ""
    if cfg.generate.max_tokens and cfg.data.tokenizer != "none":
        prompt = cfg.generate.prompt or generator.default_prompt
        sample = prompt + generator([prompt], cfg.generate, cfg.seed)[0]
    history = out.history()
    out.close()
    if distributed.is_main():
        yardsticks = stores[0].manifest.get("yardsticks", {}) if len(stores) == 1 else {}
        command = os.environ.get("LLM_JAX_COMMAND", "llm-jax")  # launch/local.sh says how it was called
        print(report.closing_block(workdir, command, history, yardsticks, sample), flush=True)


def describe(cfg: Config) -> str:
    """What `train` would run, without touching data beyond its tokenizer or making any array."""
    num_devices = math.prod(size for size in (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor) if size != -1)
    if -1 in (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor):
        num_devices = jax.device_count()
    check_devices(cfg, num_devices)
    layout = sharding.abstract_layout(cfg.mesh, num_devices)
    cfg = with_vocabulary(cfg, cfg.model.vocab_size or store.vocab_size(cfg.data))
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    shapes, axes = model.shapes(), model.axes()
    tx = optim.make(cfg.optim, run_steps(cfg) or sys.maxsize, shapes, axes)  # the data alone knows an epoch's length
    state = train_state.abstract(model, tx, layout, ema=cfg.train.ema_decay > 0)
    cost = flops.training_flops(cfg.model, shapes, axes, cfg.data.sequence_length)
    tokens = cfg.train.global_batch_size * cfg.data.sequence_length
    mesh = " x ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    gradient = sharding.bytes_a_device(state.params)
    return "\n".join(
        [
            json.dumps(to_dict(cfg), indent=2),
            report.parameter_table(registry.count_parameters(shapes), tokens, cost),
            f"FLOPs a token: {flops.FORMULA}",
            f"mesh: {mesh} ({num_devices} devices)",
            f"memory a device: {sharding.bytes_a_device(state) / 2**20:,.1f} MiB of state and "
            f"{gradient / 2**20:,.1f} MiB of gradients, activations not counted",
        ]
    )
