"""Every key of the config changes something: one table says where each shows (those of the model: test_decoder.py)."""

import json

import numpy as np
import pytest
import test_decoder
from key_observers import (
    answered,
    beginning,
    beginning_again,
    caches,
    choices,
    coefficients,
    cut,
    devices,
    evaluation,
    judged,
    kept,
    length,
    meshed,
    places,
    program,
    rates,
    reading,
    run,
    sampled,
    shards,
    similarities,
    stores,
    stream,
    traced,
    updates,
    where,
)

from llm_jax.config import check, load
from llm_jax.config.resolve import all_keys
from llm_jax.data import tokenizers
from llm_jax.errors import DataError, UserError

BASE = [
    "train.steps=20", "train.global_batch_size=8", "data.sequence_length=16", "model.max_length=16",
    "model.num_layers=1", "model.embed_dim=16", "model.num_heads=2", "data.path=PATH/a.txt", "optim.learning_rate=0.01",
]  # fmt: skip
STORY = "Ada has 3 apples. Ben gives her 4 more, so now she has 7.\n\n"
JSONL = '{"text": "%s", "body": "%s"}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(STORY * 60)
    (folder / "b.txt").write_text(STORY.upper() * 60)
    (folder / "records.jsonl").write_text("".join(JSONL % (f"story {i} " * 9, f"other {i} " * 9) for i in range(80)))
    (folder / "lines.txt").write_text("".join("x" * (1 + 5 * i % 13) + "\n" for i in range(300)))
    story = "Ada has {} apples.\nBen gives her {} more unhappily.\nNow she has so many more apples.\n\n"
    # Words of several pieces.
    rare = ["".join(np.random.default_rng(n).choice(list("abcdefghijklmno"), 9)) for n in range(48)]
    (folder / "stories.txt").write_text("".join(story.format(*rare[2 * n : 2 * n + 2]) for n in range(24)))
    plain = "Ada has {} apples.\nBen gives her two more unhappily.\nNow she has so many more apples.\n\n"
    # Rows have room, and are few.
    (folder / "short.txt").write_text("".join(plain.format(number) for number in range(24)))
    labelled = [
        {"text": f"one text {i % 5}", "body": f"another {i} one", "third": "a third", "label": "xy"[i % 2],
         "tag": "uv"[i % 3 > 0], "number": i % 2, "answers": {"text": ["another"], "answer_start": [0]}}
        for i in range(80)
    ]  # fmt: skip
    (folder / "labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in labelled))
    texts = [story, *(record["text"] + record["body"] for record in labelled)]
    tokenizers.train_wordpiece(texts, 300).save(folder / "pieces")
    (folder / "bad.jsonl").write_text((JSONL % ("fine " * 9, "") * 80) + "{\n")
    return folder


MIXED = ("data.path=stdlib", "data.mixture.a.path=PATH/a.txt", "data.mixture.b.path=PATH/b.txt")
RECORDS = ("data.path=PATH/records.jsonl",)
WARM = ("optim.warmup_steps=4",)
WSD = ("optim.schedule=wsd",)
LINES = ("data.path=PATH/lines.txt", "data.separator=\n")
FIT = ("data.packing=best_fit",)
EXPERTS = ("model.moe.num_experts=4",)
STAGES = ("mesh.stage=2", "mesh.data=1", "mesh.fsdp=-1", "model.num_layers=4", "model.vocab_multiple=2",
          "train.global_batch_size=16")  # fmt: skip

ENCODER = ("model.family=encoder",)
MASKED = (*ENCODER, "data.task=masked", "model.head=masked_pairs", "data.path=PATH/stories.txt", "data.separator=\n\n",
          "data.tokenizer=wordpiece", "data.tokenizer_vocab_size=300", "data.eos=lines")  # fmt: skip
REPLACED = (*MASKED, "data.task=replaced", "model.head=replaced", "model.generator_divisor=2")
LABELLED = (*ENCODER, "data.task=classification", "model.head=text", "data.path=PATH/labels.jsonl",
            "data.tokenizer=PATH/pieces/tokenizer.json")  # fmt: skip
TOKENS = (*LABELLED, "model.head=token")
QUESTIONS = (*TOKENS, "data.task=questions", "data.columns.pair=body", "data.columns.label=answers", "data.stride=1",
             "data.sequence_length=10")  # fmt: skip
SIMILARITY = (*LABELLED, "data.task=similarity", "model.head=embedding", "data.columns.pair=body",
              "data.columns.label=label")  # fmt: skip
CHOICE = (*LABELLED, "data.task=choice", "data.columns.choices=body,third", "data.columns.label=number")

# key: (observer, new value, what the base has besides)
KEYS = {
    "name": (where, "other"),
    "seed": (stream, 5),
    "data.path": (stores, "PATH/b.txt"),
    "data.format": (stores, "jsonl", *RECORDS, "data.format=text"),
    "data.validation_path": (stores, "PATH/b.txt"),
    "data.text_key": (stores, "body", *RECORDS),
    "data.separator": (stores, "\n\n"),
    "data.mixture.NAME.path": (stores, "PATH/b.txt", *MIXED),
    "data.mixture.NAME.format": (stores, "text", *MIXED, "data.mixture.a.path=PATH/records.jsonl"),
    "data.mixture.NAME.validation_path": (stores, "PATH/b.txt", *MIXED),
    "data.mixture.NAME.text_key": (stores, "body", *MIXED, "data.mixture.a.path=PATH/records.jsonl"),
    "data.mixture.NAME.separator": (stores, "\n\n", *MIXED),
    "data.mixture.NAME.weight": (stream, 9, *MIXED),
    "data.mixture_temperature": (stream, 4, *MIXED, "data.mixture.a.weight=9"),
    "data.tokenizer": (stores, "char"),
    "data.tokenizer_vocab_size": (stores, 262, "data.tokenizer=bpe", "data.tokenizer_vocab_size=280"),
    "data.eos": (stores, "none"),
    "data.sequence_length": (stream, 8),
    "data.packing": (stream, "first_fit", *LINES),
    "data.long_documents": (stream, "drop", *FIT),
    "data.mask_documents": (stream, False, "data.separator=\n\n"),
    "data.task": (stream, "multilabel", *LABELLED),
    "data.masking.rate": (stream, 0.4, *MASKED),
    "data.masking.max_predictions": (stream, 1, *MASKED),
    "data.masking.whole_words": (stream, True, *MASKED, "data.masking.rate=0.5"),
    "data.masking.redraw": (stream, False, *MASKED),
    "data.masking.next_sentence": (stream, False, *MASKED),
    "data.masking.short_rows": (stream, 0.9, *MASKED),
    "data.masking.copies": (stream, 2, *MASKED, "data.path=PATH/short.txt"),
    "data.masking.phases": (stream, "2=8", *MASKED),
    "data.columns.text": (stream, "body", *LABELLED),
    "data.columns.pair": (stream, "body", *LABELLED),
    "data.columns.label": (stream, "tag", *LABELLED),
    "data.columns.choices": (stream, "third,body", *CHOICE),
    "data.columns.negative": (stream, "third", *SIMILARITY),
    "data.columns.names": (stream, "y,x", *LABELLED),
    "data.buckets": (stream, "8", *LABELLED),
    "data.pack_texts": (stream, True, *LABELLED),
    "data.stride": (stream, 3, *QUESTIONS),
    "data.answer_length": (answered, 5, *QUESTIONS),
    "data.shuffle": (stream, False),
    "data.validation_fraction": (stores, 0.2),
    "data.validation_split": (stores, "tail", "data.separator=\n\n"),
    "data.max_bad_records": (stores, 1, "data.path=PATH/bad.jsonl"),
    "data.cache_dir": (caches, "PATH/cache"),
    "data.prefetch": (reading, 3),
    "data.workers": (reading, 2),
    "train.steps": (length, 30),
    "train.tokens": (length, 4096, "train.steps=0", "train.tokens=2048"),
    "train.epochs": (length, 2.0, "train.steps=0", "train.epochs=1"),
    "train.global_batch_size": (stream, 16),
    "train.per_device_batch_size": (devices, 2),
    "train.accumulation": (program, 2),
    "train.z_loss": (program, 1e-3),
    "train.label_smoothing": (program, 0.1),
    "train.discriminator_weight": (coefficients, 2.0, *REPLACED),
    "train.temperature": (similarities, 1.0, *SIMILARITY),
    "train.loss_chunk": (program, 4),
    "train.max_bad_steps": None,  # e2e/test_kill.py: the run stops after as many
    "train.ema_decay": (program, 0.9),
    "optim.name": (updates, "lion"),
    "optim.learning_rate": (rates, 1.0),
    "optim.schedule": (rates, "linear"),
    "optim.warmup_steps": (rates, 4),
    "optim.warmup_ratio": (rates, 0.5),
    "optim.warmup_form": (rates, "i/w", *WARM),
    "optim.decay_steps": (rates, 10),
    "optim.cooldown_ratio": (rates, 0.4, *WSD),
    "optim.final_ratio": (rates, 0.5),
    "optim.beta1": (updates, 0.5),
    "optim.beta2": (updates, 0.5),
    "optim.eps": (updates, 0.1),
    "optim.bias_correction": (updates, False),
    "optim.weight_decay": (updates, 1.0),
    "optim.decay_mask": (updates, "all"),
    "optim.clip_norm": (updates, 1e-3, "optim.name=sgd"),
    "optim.normalize_gradients": (updates, True, "optim.name=sgd"),
    "optim.lr_multipliers": (updates, ".*scale=2.0"),
    "optim.freeze": (updates, ".*scale"),
    "optim.offload": (shards, ".*"),
    "model.moe.balance_loss": (program, 0.5, *EXPERTS),
    "model.moe.router_z_loss": (program, 0.5, *EXPERTS),
    "model.moe.balance_rate": (updates, 0.5, *EXPERTS, "model.moe.balance_bias=True"),
    "mesh.stage": (shards, 2, "model.num_layers=2", "model.vocab_multiple=2"),
    "mesh.stage_microbatches": (meshed, 4, *STAGES),
    "mesh.stage_repeats": (meshed, 2, *STAGES),
    "mesh.data": (shards, 2, "mesh.data=1", "mesh.fsdp=-1"),
    "mesh.expert": (shards, 2, *EXPERTS),
    "mesh.across_slices": (places, "tensor=2", "mesh.tensor=2", "model.vocab_multiple=2"),
    "mesh.gradient_rules": (meshed, "mlp=data"),
    "mesh.activation_rules": (meshed, "residual_length=tensor"),
    "mesh.fsdp": (shards, 2),
    "mesh.sequence": (shards, 2),
    "mesh.tensor": (shards, 2, "model.vocab_multiple=2"),
    "mesh.parameter_rules": (shards, "mlp=data"),
    "mesh.optimizer_rules": (shards, "mlp=data"),
    "precision.params": (program, "bfloat16"),
    "precision.compute": (program, "bfloat16"),
    "precision.products": (program, "int8"),
    "checkpoint.every": (run, 3),
    "checkpoint.keep_latest": (kept, 4),
    "checkpoint.keep_best": (kept, 3),
    "checkpoint.keep_every": (kept, 4),
    "checkpoint.use": None,  # test_finetune.py: evaluate and predict take the best
    "checkpoint.resume": (beginning, "must"),
    "checkpoint.resume_from": (beginning, "/nowhere"),
    "checkpoint.init_from": (beginning, "/nowhere"),
    "eval.every": (run, 4),
    "eval.batches": (evaluation, 1),
    "eval.batch_size": (evaluation, 4),
    "eval.best": (judged, "accuracy"),
    "eval.patience": (judged, 2),
    "eval.sampling": (evaluation, "random", "eval.batches=2"),
    "log.every": (run, 4),
    "log.trackers": (run, ""),
    "log.profile_start": (traced, 2, "log.profile_steps=3"),
    "log.profile_steps": (traced, 1),
    "generate.prompt": (sampled, "Ada"),
    "generate.max_tokens": (sampled, 0),
    "generate.temperature": (choices, 0.5),
    "generate.top_k": (choices, 2),
    "generate.top_p": (choices, 0.6),
    "generate.min_p": (choices, 0.5),
    "generate.stop": (cut, "two"),
}  # fmt: skip
MORE = [  # other values of keys with several
    ("seed", (program, 5, "model.dropout.embedding=0.5")),
    ("data.packing", (stream, "crops", "data.mask_documents=False")),
    ("data.packing", (stream, "best_fit", "data.packing=first_fit", *LINES)),
    ("data.long_documents", (stream, "error", *FIT)),
    ("data.eos", (stores, "prepend", "data.separator=\n\n")),
    ("optim.name", (updates, "muon")),
    ("optim.name", (updates, "lamb")),
    ("data.pack_texts", (stream, True, *MASKED, "data.path=PATH/short.txt")),
    ("data.eos", (stores, "lines", "data.tokenizer=wordpiece")),
    ("optim.name", (updates, "adafactor", "model.scan_layers=False")),
    ("optim.name", (updates, "sgd")),
    ("optim.schedule", (rates, "constant")),
    ("optim.schedule", (rates, "inverse_sqrt")),
    ("optim.schedule", (rates, "wsd")),
    ("optim.warmup_form", (rates, "(i+1)/w", *WARM)),
    ("optim.decay_mask", (updates, "hidden")),
    ("checkpoint.resume", (beginning_again, "never")),
]
RUN = [key for key, case in KEYS.items() if case and case[0] is run]


def config(folder, items):
    cfg = load("", [item.replace("PATH", str(folder)) for item in (*BASE, *items)])
    check(cfg)
    return cfg


def observe(observer, cfg, folder):
    try:
        return observer(cfg, folder)
    except (UserError, DataError) as error:
        return str(error)


def test_every_key_has_an_entry():
    model = {f"model.{key}" for key in test_decoder.KEYS} | {"model.family"}
    assert KEYS.keys() | model == set(all_keys())
    assert not KEYS.keys() & model


CASES = [(key, case) for key, case in KEYS.items() if case and key not in RUN] + MORE


@pytest.mark.parametrize(("key", "case"), CASES, ids=[f"{key}={case[1]}" for key, case in CASES])
def test_a_changed_key_changes_something(folder, key, case):
    observer, value, *base = case
    old = config(folder, base)
    new = config(folder, [*base, f"{key.replace('NAME', 'a')}={value}"])
    before, after = (observe(observer, cfg, folder) for cfg in (old, new))
    assert before != after
    if not isinstance(before, str):  # a refusal
        assert before == observe(observer, old, folder)  # so it is the key that did


@pytest.fixture(scope="module")
def two_runs(folder):
    """One as it comes, and one with every key that shows in a whole run changed at once: each in its own trace."""
    base = ["train.steps=7", "data.validation_fraction=0.1", "generate.max_tokens=0", "eval.batches=1"]
    changes = [f"{key}={KEYS[key][1]}" for key in RUN]
    return run(config(folder, base), folder), run(config(folder, [*base, *changes]), folder)


@pytest.mark.parametrize("key", RUN)
def test_keys_that_show_in_a_whole_run(two_runs, key):
    before, after = (found[key] for found in two_runs)
    assert before != after


def test_what_a_whole_run_leaves(two_runs):
    assert two_runs == (
        {"log.every": [7], "eval.every": [7], "checkpoint.every": [7], "log.trackers": True},
        {"log.every": [4, 7], "eval.every": [4, 7], "checkpoint.every": [6, 7], "log.trackers": False},
    )
