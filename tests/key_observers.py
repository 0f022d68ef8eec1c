"""What a key of the config can show in: each takes a config and returns something to compare.

An error of ours is an answer too.
"""

import dataclasses
import types

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, quick_compiler

from llm_jax import cli, commands, metrics
from llm_jax.data import loader, questions, store, tasks
from llm_jax.data.text_pieces import Pieces
from llm_jax.errors import UserError
from llm_jax.generation.generate import Row
from llm_jax.generation.sampling import filtered
from llm_jax.models import registry
from llm_jax.objectives import registry as objectives
from llm_jax.objectives.language import LanguageObjective
from llm_jax.precision import Precision
from llm_jax.sharding import Layout, abstract_layout, make_layout
from llm_jax.training import checkpoint, optim, starts, train
from llm_jax.training import state as train_state
from llm_jax.training.evaluate import Judge
from llm_jax.training.step import make_train_step


def stores(cfg, folder):
    """Tokens, documents and split of each source."""
    return [store.manifest["splits"] for store in store.prepare(cfg.data)]


def caches(cfg, folder):
    return [store.folder for store in store.prepare(cfg.data)]


def stream(cfg, folder):
    """The first batches."""
    with_stores = tasks.prepare(cfg.data)
    batches = loader.make_train(with_stores, cfg.data, cfg.train.global_batch_size, cfg.seed, Layout())
    try:
        return [{name: np.asarray(array).tolist() for name, array in next(batches).items()} for _ in range(6)]
    finally:
        batches.close()


def answered(cfg, folder):
    """The best answer of a window of twenty pieces, the first and the last of which are the likeliest ends."""
    count = 20
    scores = np.zeros((count, 2))
    scores[0], scores[1, 0], scores[-1, 1] = -9, 3, 3
    window = Pieces(*(np.zeros(count, np.int32),) * 2, np.ones(count, np.int32), *(np.zeros(count, np.int32),) * 2)
    window = dataclasses.replace(window, spans=np.stack([np.arange(count), np.arange(count) + 1], 1))
    return questions.best_answer([(scores, window)], "a" * count, cfg.data.answer_length)


def similarities(cfg, folder):
    """The loss of four texts and their pairs, whose embeddings are given."""
    batch = next(loader.make_train(tasks.prepare(cfg.data), cfg.data, 4, cfg.seed, Layout()))
    model = types.SimpleNamespace(apply=lambda *_, **__: jnp.cos(jnp.arange(8.0 * 3)).reshape(8, 1, 3))
    return float(objectives.make(cfg).sums(model, None, batch, None)["loss"])


def coefficients(cfg, folder):
    return objectives.make(cfg).coefficients()


def judged(cfg, folder):
    """How long the best evaluation was ago, and whether that is enough."""
    history = [{"eval/loss": loss, "eval/accuracy": loss} for loss in (3.0, 1.0, 2.0, 2.5)]
    judge = Judge(cfg.eval, history)
    return judge.waited, judge.has_enough


def reading(cfg, folder):
    """How Grain is asked to read ahead."""
    asked = {}

    def note_and_stop(**options):
        asked.update(options)
        raise UserError()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grain, "ReadOptions", note_and_stop)
        patch.setattr(grain, "MultiprocessingOptions", lambda **options: asked.update(options))
        batches = loader.make_train(store.prepare(cfg.data), cfg.data, 8, 0, Layout())
        with pytest.raises(UserError):
            next(batches)
        batches.close()
    return asked


def rates(cfg, folder):
    return [float(optim.learning_rate(cfg.optim, train.run_steps(cfg))(i)) for i in range(20)]


def model_of(cfg, layout):
    cfg = train.with_vocabulary(cfg, 257, layout.num_devices)
    return registry.build(cfg.model, layout, Precision.make(cfg.precision))


def updates(cfg, folder):
    """Two updates of the optimizer, on fixed parameters and gradients."""
    model = model_of(cfg, Layout())
    shapes = model.shapes()
    tx = optim.make(cfg.optim, 20, shapes, model.axes(), balance_rate=cfg.model.moe.balance_rate)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)
    update, state, found = jax.jit(tx.update, compiler_options=QUICK), tx.init(params), []
    for scale in (0.5, 2.0):
        grads = jax.tree.map(lambda x: scale * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), shapes)  # noqa: B023
        changes, state = update(grads, state, params)
        found.append(jax.tree.map(lambda x: np.asarray(x).tolist(), changes))
    return found


def meshed(cfg, folder):
    """The step of training, as it is traced for eight devices."""
    return program(cfg, folder, abstract_layout(cfg.mesh, 8))


def program(cfg, folder, layout=Layout()):  # noqa: B008
    """The step of training, as it is traced."""
    model = model_of(cfg, layout)
    tx = optim.make(cfg.optim, 20, model.shapes(), model.axes(), balance_rate=cfg.model.moe.balance_rate)
    state = train_state.abstract(model, tx, layout, ema=cfg.train.ema_decay > 0)
    shape = (cfg.train.global_batch_size, cfg.data.sequence_length)
    whole = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    objective = LanguageObjective.make(cfg)
    step = make_train_step(
        model, objective, tx, optim.learning_rate(cfg.optim, 20), layout, state,
        seed=cfg.seed, accumulation=cfg.train.accumulation, ema_decay=cfg.train.ema_decay,
    )  # fmt: skip
    return str(jax.make_jaxpr(step)(state, whole | {"loss_weights": jax.ShapeDtypeStruct(shape, jnp.float32)}))


def length(cfg, folder):
    return train.total_steps(cfg, epoch_rows=1000)


def shards(cfg, folder):
    """How parameters, optimizer state and the batch are split."""
    layout = abstract_layout(cfg.mesh, 8)
    model = model_of(cfg, layout)
    tx = optim.make(cfg.optim, 20, model.shapes(), model.axes(), balance_rate=cfg.model.moe.balance_rate)
    state = train_state.abstract(model, tx, layout, ema=False, offload=cfg.optim.offload)
    held = [(str(x.sharding.spec), x.sharding.memory_kind) for x in jax.tree.leaves(state)]
    return held, layout.mesh.shape, layout.batch_sharding()


def places(cfg, folder):
    """Which device stands where in the mesh."""
    return [device.id for device in make_layout(cfg.mesh).mesh.devices.flat]


def devices(cfg, folder):
    train.check_devices(cfg, 8)


def evaluation(cfg, folder):
    batch_size = cfg.eval.batch_size or cfg.train.global_batch_size
    batches = loader.make_eval(
        store.prepare(cfg.data), cfg.data, batch_size, cfg.eval.batches, cfg.eval.sampling, cfg.seed, Layout()
    )
    return [np.asarray(batch["tokens"]).tolist() for batch in batches.at(3)]


def kept(cfg, folder):
    """Which of ten checkpoints stay; the earlier, the better."""
    keep = checkpoint._Keep(cfg.checkpoint, {step: float(step) for step in range(1, 11)})
    return keep.should_preserve([types.SimpleNamespace(step=step) for step in range(1, 11)], context=None)


NO_PARAMETERS = types.SimpleNamespace(params={})


def beginning(cfg, folder):
    empty = types.SimpleNamespace(workdir=folder, steps=list)
    return starts.start(cfg.checkpoint, empty, NO_PARAMETERS, lambda: "fresh").how


def beginning_again(cfg, folder):
    there = types.SimpleNamespace(workdir=folder, steps=lambda: [5], put_aside=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "_whole_state", lambda *args, **_: types.SimpleNamespace(how="goes on"))
        return starts.start(cfg.checkpoint, there, NO_PARAMETERS, None).how


def choices(cfg, folder):
    """Logits from which the next token is drawn."""
    return filtered(jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]])), cfg.generate).tolist()


def cut(cfg, folder):
    row = Row([0], cfg.generate.stop)
    return [row.add(b"one "), row.add(b"two"), row.done]


def sampled(cfg, folder):
    """What is sampled at the end of a run."""
    asked = []

    class Generator:
        default_prompt = "\n"

        def __init__(self, *_):
            pass

        def __call__(self, prompts, cfg, seed):
            asked.append((prompts, cfg.max_tokens, seed))
            return [""]

    out = types.SimpleNamespace(history=list, close=lambda: None)
    state = types.SimpleNamespace(params=None, ema=None)
    manifest = types.SimpleNamespace(manifest={"yardsticks": {}}, tokenizer=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Generator", Generator)
        run = types.SimpleNamespace(cfg=cfg, out=out, stores=[manifest], workdir=str(folder), model=None)
        train.finish(run, state)
    return asked


def where(cfg, folder):
    """The folder of a run that names none."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "make_writable", found.append)
        patch.setattr(train, "train", lambda *_: None)
        cli.main(["train", "--config=quickstart", f"--config.name={cfg.name}"])
    return found


def traced(cfg, folder):
    """Before which steps a profiler trace starts and ends."""
    found, now = [], None
    with pytest.MonkeyPatch.context() as patch, train.Profiler(cfg.log, "") as profiler:
        patch.setattr(jax.profiler, "start_trace", lambda _: found.append(now))
        patch.setattr(jax.profiler, "stop_trace", lambda: found.append(now))
        for now in range(10):
            profiler.before(now)
    return found


def run(cfg, folder):
    """A whole run of a few steps, and the traces that it leaves."""
    workdir = folder / "runs" / str(len(list((folder / "runs").glob("*"))))
    workdir.mkdir(parents=True)
    with quick_compiler():
        train.train(cfg, str(workdir))
    records = metrics.read_jsonl(workdir / "metrics.jsonl")
    return {
        "log.every": [r["step"] for r in records if "tokens_per_second" in r],
        "eval.every": [r["step"] for r in records if "eval/loss" in r],
        "checkpoint.every": checkpoint.steps(workdir),
        "log.trackers": (workdir / "tensorboard").exists(),
    }
