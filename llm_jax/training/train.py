"""A run, told in order: config, mesh, data, model, state, step, loop."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax import __version__, backend, distributed, metrics, sharding
from llm_jax.config import Config, LogConfig, check_devices, check_vocab, run_steps, to_dict
from llm_jax.config.mesh import MESH_AXES
from llm_jax.config.schema import LABELLED_TASKS
from llm_jax.data import labelled, loader, store, tasks
from llm_jax.errors import Preempted, UserError
from llm_jax.generation.generate import Generator
from llm_jax.kernels.attention import home
from llm_jax.models import flops, registry
from llm_jax.models.quantize import require_library
from llm_jax.objectives import registry as objectives
from llm_jax.objectives.base import Objective
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import checkpoint, executable, optim, pretrained, report, run_folder, starts
from llm_jax.training import state as train_state
from llm_jax.training.back_end import check_attention
from llm_jax.training.evaluate import Evaluator, Judge, make_evaluator
from llm_jax.training.lower import model_flops
from llm_jax.training.state import TrainState
from llm_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop works with, in the order in which it is made."""

    cfg: Config
    workdir: str
    layout: Layout
    stores: list[Any]
    data: loader.TrainLoader
    steps: int
    model: registry.Model
    objective: Objective
    tx: optax.GradientTransformation
    abstract_state: TrainState
    evaluator: Evaluator | None
    checkpoints: checkpoint.Checkpointer
    start: starts.Start
    out: metrics.Metrics
    executable: str = ""  # a compiled step to load; "": it is compiled

    @property
    def flops(self) -> flops.Flops:
        """Of training on one token."""
        return model_flops(self.cfg, self.model)


def train(cfg: Config, workdir: str, step_file: str = "") -> None:
    """Train as `cfg` says, in `workdir`; go on where an earlier session of the same run stopped.

    Args:
      cfg: checked (`config.check`).
      workdir: absolute path of the run's folder, on every process the same.
      step_file: of the compiled step that `llm-jax plan --save_executable` wrote for these devices.

    Raises:
      UserError: what was asked for cannot be done; nothing was changed.
      Preempted: the machine was asked to stop; the state is saved.
      BadStepsError: too many non-finite steps in a row.
    """
    distributed.initialize()
    distributed.assert_same_everywhere("config or code", same_on_all_hosts(cfg))
    with contextlib.ExitStack() as stack:
        run = dataclasses.replace(open_run(cfg, workdir, stack), executable=step_file)
        run.out.say(run.start.how)
        run.out.say(report.cost_line(run.model, run.cfg, run.flops))
        state = loop(run, stack)
        run.checkpoints.wait()
        finish(run, state)


def same_on_all_hosts(cfg: Config) -> str:
    """What must agree before processes run one program together, as text."""
    return json.dumps([__version__, jax.__version__, sys.version, to_dict(cfg)], sort_keys=True)


def open_run(cfg: Config, workdir: str, stack: contextlib.ExitStack) -> Run:
    """Mesh, data, model, optimizer, state: everything before the first step. `stack` closes what must be closed."""
    check_devices(cfg, jax.device_count())
    require_library(cfg.precision.products)  # told before the data are prepared
    layout = sharding.make_layout(cfg.mesh)
    check_attention(cfg, layout)

    stores = distributed.main_first(lambda: tasks.prepare(cfg.data))  # tokenized where it is missing; then all open it
    if cfg.data.tokenizer == "none":
        store.require_ids_below(stores, cfg.model.vocab_size)
    cfg = with_vocabulary(cfg, stores[0].tokenizer.vocab_size, layout.num_devices)
    cfg = with_labels(cfg, stores)
    data = loader.make_train(stores, cfg.data, cfg.train.global_batch_size, cfg.seed, layout)
    stack.enter_context(contextlib.closing(data))
    distributed.assert_same_everywhere("training data", data.state()["fingerprint"])
    steps = total_steps(cfg, data.epoch_rows)

    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    shapes, axes = model.shapes(), model.axes()
    objective = objectives.make(cfg)
    tx = optim.make(cfg.optim, steps, shapes, axes, balance_rate=cfg.model.moe.balance_rate)
    abstract_state = train_state.abstract(model, tx, layout, ema=cfg.train.ema_decay > 0, offload=cfg.optim.offload)
    evaluator = make_evaluator(cfg, stores, model, objective, layout) if has_validation(cfg) else None

    checkpoints = stack.enter_context(checkpoint.Checkpointer(workdir, cfg.checkpoint))  # locks the folder
    run_folder.check_same_config(workdir, to_dict(cfg))
    init = lambda: train_state.init(model, tx, abstract_state, cfg.seed)  # noqa: E731
    from_hub = lambda name, params: pretrained.start_from(name, params, cfg, workdir)  # noqa: E731
    start = starts.start(cfg.checkpoint, checkpoints, abstract_state, init, from_hub)
    if start.step > steps:
        raise UserError(
            f"train.steps: the run is {steps} steps long, and {start.how} is beyond that; ask for more steps."
        )
    if start.data_state is not None:
        data.restore(start.data_state)
    run_folder.write(workdir, to_dict(cfg), stores[0].tokenizer, shapes, axes, getattr(stores[0], "names", ()))

    out = metrics.Metrics(
        workdir,
        cfg.log.trackers,
        name=cfg.name,
        config=to_dict(cfg),
        total_steps=steps,
        restored_step=start.step,
        main=distributed.is_main(),
    )
    stack.enter_context(out)
    return Run(
        cfg,
        workdir,
        layout,
        stores,
        data,
        steps,
        model,
        objective,
        tx,
        abstract_state,
        evaluator,
        checkpoints,
        start,
        out,
    )


def loop(run: Run, stack: contextlib.ExitStack) -> TrainState:
    """Draw, step, report, evaluate, save, until the last step; returns the final state."""
    cfg, state, data = run.cfg, run.start.state, run.data
    train_step = make_train_step(
        run.model,
        run.objective,
        run.tx,
        optim.learning_rate(cfg.optim, run.steps),
        run.layout,
        run.abstract_state,
        seed=cfg.seed,
        accumulation=cfg.train.accumulation,
        ema_decay=cfg.train.ema_decay,
        trainable=optim.trainable_mask(cfg.optim, run.model.shapes()),
    )
    told = report.StepReport(
        run.out, data, run.flops, every=cfg.log.every, last=run.steps, max_bad_steps=cfg.train.max_bad_steps
    )
    watchdog = stack.enter_context(distributed.Watchdog())
    profiler = stack.enter_context(Profiler(cfg.log, f"{run.workdir}/profile"))
    preemption = stack.enter_context(distributed.Preemption())  # before this, a signal ends the process at once

    judge = Judge(cfg.eval, run.out.history())
    distributed.assert_same_everywhere("evaluations so far", str(judge.waited))
    if judge.has_enough:
        return state  # it had ended before
    compiled: dict[Any, Any] = {}  # by the batch's shape: one, or one a bucket
    for i in range(run.start.step, run.steps):
        batch = next(data)  # drawn after the save of the step before, so that a save never holds a drawn batch
        shape = batch["tokens"].shape
        if shape not in compiled:
            told.pause()
            compiled[shape] = compile_step(train_step, state, batch, run)
            told.pause()
        profiler.before(i)
        state, values = compiled[shape](state, batch)
        told.add(i + 1, values)
        watchdog.progress()

        last, stopping, evaluation, best = i + 1 == run.steps, preemption.preempted(i + 1), None, False
        if run.evaluator and (last or due(i + 1, cfg.eval.every)):
            told.pause()
            evaluation = run.evaluator(evaluated(state), i + 1, watchdog.progress)
            run.out.write(i + 1, evaluation)
            evaluation = judge.add(evaluation)
            told.pause()
            best = judge.waited == 0 and cfg.checkpoint.use == "best"
            last = last or judge.has_enough
        if last or stopping or best or due(i + 1, cfg.checkpoint.every):
            told.pause()
            run.checkpoints.save(i + 1, state, data.state(), evaluation)
            told.pause()
        if stopping and not last:
            run.checkpoints.wait()
            raise Preempted(
                f"Asked to stop: step {i + 1} of {run.steps} is saved in {run.workdir}; run it again to go on."
            )
        if judge.has_enough:
            run.out.say(f"{judge.waited} evaluations in a row did not better eval/{cfg.eval.best}: that is enough")
            break
    return state


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def with_vocabulary(cfg: Config, size: int, num_devices: int) -> Config:
    """`cfg` with the model's vocabulary taken from the tokenizer where the config leaves it open."""
    vocab_size = check_vocab(cfg, size, num_devices)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))


def with_labels(cfg: Config, stores: Sequence[Any]) -> Config:
    """`cfg` with a head of as many outputs as the labelled data have labels; without stores, a guess."""
    if cfg.data.task not in LABELLED_TASKS or cfg.data.task == "similarity":  # which has no scores
        return cfg
    names = stores[0].names if stores else cfg.data.columns.names or ("?", "?")
    found = labelled.num_labels(cfg.data, names)
    given = cfg.model.num_labels
    if given not in (type(cfg.model)().num_labels, found):
        raise UserError(
            f"model.num_labels = {given}: the data of the task {cfg.data.task} have {found} "
            f"({', '.join(names[:12]) or 'by the task'}); leave it out, and it is taken from the data"
        )
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_labels=found))


def total_steps(cfg: Config, epoch_rows: int) -> int:
    """The run's length in steps, given in steps, tokens or epochs; a step begun is a whole one."""
    return run_steps(cfg) or max(math.ceil(cfg.train.epochs * epoch_rows / cfg.train.global_batch_size), 1)


def has_validation(cfg: Config) -> bool:
    return bool(cfg.data.validation_fraction) or any(s.validation_path for s in cfg.data.sources().values())


def evaluated(state: TrainState) -> Any:
    """The parameters that evaluation and generation use: the running average where there is one."""
    return state.params if state.ema is None else state.ema


def compile_step(train_step: Any, state: TrainState, batch: Any, run: Run) -> Any:
    began = time.monotonic()
    lowered = train_step.lower(state, batch)
    if run.executable:
        compiled = executable.load(run.executable, lowered, executable.fingerprint(run.cfg, jax.devices(), batch))
        run.out.say(f"loaded the step from {run.executable} in {time.monotonic() - began:.1f} s")
        return compiled
    compiled = backend.compiled(lowered)
    run.out.say(f"compiled the step in {time.monotonic() - began:.1f} s")
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


def finish(run: Run, state: TrainState) -> None:
    """The end of a run: loss curve, sampled text, where it all is."""
    cfg, sample = run.cfg, ""
    if cfg.generate.max_tokens and cfg.data.tokenizer != "none" and cfg.data.task == "language":
        generator = Generator(run.model, evaluated(state), run.stores[0].tokenizer)
        prompt = cfg.generate.prompt or generator.default_prompt
        sample = prompt + generator([prompt], cfg.generate, cfg.seed)[0]
    history = run.out.history()
    run.out.close()
    if distributed.is_main():
        yardsticks = run.stores[0].manifest["yardsticks"] if len(run.stores) == 1 else {}
        whole = cfg.eval.sampling == "sequential" and not cfg.eval.batches
        if not whole or yardsticks.get("bytes") != yardsticks.get("all_bytes"):
            yardsticks = {}  # measured on other bytes than the evaluation
        print(report.closing_block(run.workdir, history, yardsticks, sample, cfg.data.task), flush=True)


def describe(cfg: Config, workdir: str) -> str:
    """What `train` would run in `workdir`, without touching data beyond its tokenizer or making any array."""
    cfg, layout, model, state = planned(cfg)
    cost = model_flops(cfg, model)
    mesh = " x ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    shardings = layout.parameter_shardings(model.shapes(), model.axes(), layout.gradient_rules)
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    gradient = sharding.bytes_a_device(jax.tree.map(placed, state.params, shardings))
    if cfg.train.accumulation > 1:  # the sum, in at least float32, and a micro-batch's own
        wide = lambda leaf: leaf.update(dtype=jnp.promote_types(leaf.dtype, jnp.float32))  # noqa: E731
        gradient += sharding.bytes_a_device(jax.tree.map(lambda x, s: wide(placed(x, s)), state.params, shardings))
    return "\n".join(
        [
            json.dumps(to_dict(cfg), indent=2),
            report.cost_line(model, cfg, cost),
            f"FLOPs a token: {flops.FORMULA}",
            f"mesh: {mesh} ({layout.num_devices} devices)",
            f"memory a device: {sharding.bytes_a_device(state) / 2**20:,.1f} MiB of state and "
            f"{gradient / 2**20:,.1f} MiB of gradients, activations not counted",
            *beginning(cfg, model, workdir),
        ]
    )


def beginning(cfg: Config, model: registry.Model, workdir: str) -> list[str]:
    """Lines on what the run begins with, where that is not random numbers."""
    if (own := checkpoint.steps(workdir)) and cfg.checkpoint.resume != "never":
        return [f"goes on from step {own[-1]} of {workdir}"]
    lines = pretrained.preview(cfg, model.shapes())
    if lines and cfg.data.task in labelled.NAMED and not cfg.data.columns.names:
        lines.append(f"its head is told as for {cfg.model.num_labels} labels; how many there are the data will say")
    return lines


def sharding_table(cfg: Config) -> str:
    """How `train` would split every parameter: path, shape, logical axes, mesh axes, bytes a device."""
    _, _, model, state = planned(cfg)
    return report.sharding_table(state.params, model.axes())


def planned(cfg: Config) -> tuple[Config, Layout, registry.Model, TrainState]:
    """The run's parts as far as they exist without data or devices: the resolved config, layout, model, state."""
    sizes = [getattr(cfg.mesh, axis) for axis in MESH_AXES]
    num_devices = jax.device_count() if -1 in sizes else math.prod(sizes)
    check_devices(cfg, num_devices)
    layout = sharding.abstract_layout(cfg.mesh, num_devices, home(cfg.model.attention_kernel, jax.default_backend()))
    check_attention(cfg, layout)
    cfg = with_vocabulary(cfg, cfg.model.vocab_size or store.vocab_size(cfg.data), num_devices)
    cfg = with_labels(cfg, [])
    model = registry.build(cfg.model, layout, Precision.make(cfg.precision))
    updates = run_steps(cfg) or sys.maxsize  # the data alone knows an epoch's length
    tx = optim.make(cfg.optim, updates, model.shapes(), model.axes(), balance_rate=cfg.model.moe.balance_rate)
    ema = cfg.train.ema_decay > 0
    return cfg, layout, model, train_state.abstract(model, tx, layout, ema=ema, offload=cfg.optim.offload)
