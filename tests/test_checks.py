"""Pairs of keys that are refused, with key, value, reason and fix; and their neighbours that are not."""

import pytest

from llm_jax.config import Config, check, check_devices, check_vocab, config_names, load
from llm_jax.config.checks import run_steps
from llm_jax.config.mesh import MESH_AXES, mesh_sizes
from llm_jax.errors import ConfigError
from llm_jax.training.restore import fitted, splits_evenly

BASE = ("train.steps=100",)
# Four periods of six layers, and two more.
PERIOD = "window,window,window,window,window,full"
GEMMA_3 = ("model.num_layers=26", "model.sliding_window=8", f"model.layer_pattern={PERIOD}")


def message_of(function, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and " = " in message and "; " in message  # key = value: reason; fix
    return message


@pytest.mark.parametrize("name", [name for name in config_names() if "/finetune" not in name])  # see test_finetune.py
def test_every_shipped_config_passes(name):
    check(load(name))


def test_defaults_lack_only_a_length():
    assert message_of(check, Config()).startswith("train.steps = 0")
    check(load("", BASE))


REFUSED = [
    # the run
    (["name=a/b"], ["name = 'a/b'", "slashes"]),
    (["name="], ["name = ''"]),
    (["name=.."], ["name = '..'"]),
    (["seed=4294967296"], ["seed = 4294967296", "4294967295"]),
    (["train.steps=0"], ["train.steps, train.tokens, train.epochs"]),
    (["train.tokens=1e6"], ["train.steps = 100", "train.tokens = 1000000"]),
    (["train.steps=0", "train.tokens=1e6", "train.epochs=1"], ["train.tokens = 1000000", "train.epochs = 1.0"]),
    (["train.global_batch_size=10", "train.accumulation=4"], ["train.global_batch_size = 10", "8 or 12"]),
    (["checkpoint.resume_from=a", "checkpoint.init_from=b"], ["checkpoint.resume_from = 'a'", "init_from = 'b'"]),
    (["eval.sampling=random"], ["eval.batches = 0"]),
    (["log.profile_start=5"], ["log.profile_start = 5", "log.profile_steps"]),
    (["log.trackers=tensorboard,wanb"], ["log.trackers = 'wanb'", "did you mean wandb?"]),
    # the model
    (["model.embed_dim=130"], ["model.embed_dim = 130", "model.num_heads = 4", "128 or 132"]),
    (["model.num_kv_heads=3"], ["model.num_kv_heads = 3", "1, 2, 4"]),
    (["model.num_kv_heads=8"], ["model.num_kv_heads = 8"]),
    (["model.head_dim=31"], ["model.head_dim = 31", "pairs"]),
    (["model.rope.fraction=0.3"], ["model.rope.fraction = 0.3", "9.6 of each head's 32"]),
    (["model.rope.scaling=yarn"], ["model.rope.scaling = 'yarn'", "model.rope.factor is 1"]),
    (["model.rope.factor=4"], ["model.rope.factor = 4.0", "model.rope.scaling"]),
    (["model.rope.beta_fast=3"], ["model.rope.beta_fast = 3.0", "yarn"]),
    (
        ["model.rope.scaling=llama3", "model.rope.factor=8", "model.rope.high_freq_factor=1"],
        ["model.rope.high_freq_factor = 1.0", "low_freq_factor = 1"],
    ),
    (
        ["model.positions=sinusoidal", "model.num_heads=1", "model.embed_dim=129"],
        ["model.embed_dim = 129", "even"],
    ),
    (
        ["model.positions=relative", "model.relative_max_distance=16"],
        ["model.relative_max_distance = 16", "more than 16"],
    ),
    (["model.rope.base=5e5", "model.positions=learned"], ["model.rope.base = 500000", "model.positions = rotary"]),
    (["model.relative_buckets=16"], ["model.relative_buckets = 16", "model.positions = relative"]),
    (["model.norm=layernorm", "model.bias=all", "model.norm_scale=none"], ["model.norm_scale = 'none'"]),
    (["model.padded_vocab_in_softmax=true"], ["model.padded_vocab_in_softmax = True", "vocab_multiple"]),
    (["model.init=torch", "model.init_std=0.1"], ["model.init_std = 0.1"]),
    (["model.moe.top_k=3"], ["model.moe.top_k = 3", "num_experts is 0"]),
    (["model.moe.num_experts=2", "model.moe.top_k=3"], ["model.moe.top_k = 3", "at most 2"]),
    (["model.moe.num_experts=2", "model.moe.top_k=1"], ["model.moe.renormalize = True", "could not train the router"]),
    (["model.moe.groups=2"], ["model.moe.groups = 2", "num_experts is 0"]),
    (["model.moe.num_experts=6", "model.moe.groups=4"], ["model.moe.groups = 4", "1, 2, 3, 6"]),
    (["model.moe.num_experts=6", "model.moe.groups=2", "model.moe.top_groups=3"], ["top_groups = 3", "at most 2"]),
    (
        ["model.moe.num_experts=8", "model.moe.groups=4", "model.moe.top_k=3"],
        ["model.moe.top_groups = 1", "groups of 2 experts", "top_k = 3", "at least 2"],
    ),
    (
        ["model.moe.num_experts=4", "model.moe.groups=4", "model.moe.top_groups=2", "model.moe.scores=sigmoid"],
        ["model.moe.groups = 4", "best two experts"],
    ),
    (["model.moe.num_experts=4", "model.moe.dense_layers=4"], ["model.moe.dense_layers = 4", "num_layers = 4"]),
    (["model.moe.num_experts=4", "model.moe.balance_rate=0.1"], ["model.moe.balance_rate = 0.1", "balance_bias=True"]),
    (["model.remat=names"], ["model.remat = 'names'", "remat_save names nothing"]),
    (["model.remat_save=query"], ["model.remat_save", "model.remat = names"]),
    (["model.remat=names", "model.remat_save=querry"], ["model.remat_save = 'querry'", "did you mean query?"]),
    (["model.remat=names", "model.remat_save=query,query=host"], ["model.remat_save = 'query'", "named twice"]),
    (["model.remat=names", "model.activation=gelu", "model.remat_save=mlp_gate"], ["'mlp_gate'", "has no gate"]),
    (["model.remat=names", "model.remat_save=query=disk"], ["model.remat_save = 'query=disk'", "NAME=host"]),
    # the data
    (["data.sequence_length=2048"], ["data.sequence_length = 2048", "model.max_length = 1024"]),
    (
        ["model.positions=learned", "data.sequence_length=2048"],
        ["data.sequence_length = 2048", "model.max_length=2048"],
    ),
    (["data.packing=crops"], ["data.mask_documents = True", "crops"]),
    (["data.path=x", "data.mixture.a.path=y"], ["data.path = 'x'", "data.mixture.NAME.path"]),
    (["data.mixture.a.weight=1"], ["data.mixture.a.path = ''"]),
    (["data.path="], ["data.path = ''"]),
    (["data.mixture_temperature=2"], ["data.mixture_temperature = 2.0"]),
    (["data.tokenizer=none", "model.vocab_size=99", "data.format=jsonl"], ["data.format = 'jsonl'", "nanogpt"]),
    (["data.tokenizer=none"], ["model.vocab_size = 0"]),
    (["data.long_documents=drop"], ["data.long_documents = 'drop'", "first_fit or best_fit"]),
    # the optimizer
    (["optim.warmup_steps=5", "optim.warmup_ratio=0.1"], ["optim.warmup_steps = 5", "warmup_ratio = 0.1"]),
    (["optim.warmup_steps=100"], ["optim.warmup_steps = 100", "100 steps"]),
    (["optim.warmup_ratio=1"], ["optim.warmup_ratio = 1.0"]),
    (["optim.decay_steps=101"], ["optim.decay_steps = 101", "100 steps"]),
    (["optim.decay_steps=10", "optim.warmup_steps=10"], ["optim.decay_steps = 10", "update 10"]),
    (["optim.decay_steps=10", "optim.schedule=constant"], ["optim.decay_steps = 10", "cosine or linear or wsd"]),
    (["optim.cooldown_ratio=0.1"], ["optim.cooldown_ratio = 0.1", "wsd"]),
    (["optim.schedule=wsd", "optim.cooldown_ratio=0.9", "optim.warmup_steps=20"], ["optim.cooldown_ratio = 0.9"]),
    (
        ["train.steps=0", "train.epochs=1", "optim.schedule=wsd", "optim.cooldown_ratio=0.9", "optim.warmup_ratio=0.2"],
        ["optim.cooldown_ratio = 0.9", "warmup_ratio = 0.2"],
    ),
    # the mesh
    (["mesh.fsdp=-1"], ["mesh.fsdp = -1", "mesh.data"]),
    (["mesh.tensor=0"], ["mesh.tensor = 0"]),
    (["mesh.tensor=3"], ["model.num_heads = 4", "3 or 6"]),
    (["mesh.tensor=2", "model.num_kv_heads=1"], ["model.num_kv_heads = 1"]),
    (["mesh.tensor=4", "model.mlp_dim=514"], ["model.mlp_dim = 514", "512 or 516"]),
    (["mesh.tensor=2", "model.vocab_size=65"], ["model.vocab_multiple = 1", "model.vocab_multiple=2"]),
    (["mesh.stage=2", "mesh.tensor=2", "model.vocab_size=66"], ["vocab_multiple = 1", "vocab_multiple=4"]),
    (["mesh.expert=2"], ["mesh.expert = 2", "num_experts is 0", "mesh.fsdp"]),
    (["mesh.expert=4", "model.moe.num_experts=6"], ["model.moe.num_experts = 6", "4 or 8"]),
    (["mesh.across_slices=data"], ["mesh.across_slices = 'data'", "AXIS=SIZE"]),
    (["mesh.across_slices=dat=2"], ["mesh.across_slices = 'dat=2'", "did you mean data?"]),
    (["mesh.across_slices=data=1"], ["mesh.across_slices = 'data=1'", "2 or more"]),
    (["mesh.across_slices=data=2,data=2"], ["mesh.across_slices = 'data=2'", "at most once"]),
    (["mesh.across_slices=data=4", "mesh.data=6"], ["mesh.across_slices = 'data=4'", "mesh.data = 6", "multiple of 4"]),
    (["mesh.stage=3"], ["mesh.stage = 3", "model.num_layers = 4", "2, 4"]),
    ([*GEMMA_3, "mesh.stage=5"], ["mesh.stage = 5", "num_layers = 26, less the 2 that every stage computes,", "2, 4"]),
    ([*GEMMA_3, "mesh.stage=8"], ["model.layer_pattern = 'window,", "8 pieces", "3 layers each", "a multiple of 6"]),
    (["mesh.stage=2", "model.scan_layers=false"], ["model.scan_layers = False", "mesh.stage = 2"]),
    (["mesh.stage_repeats=2"], ["mesh.stage_repeats = 2", "mesh.stage is 1"]),
    (["mesh.stage_microbatches=2"], ["mesh.stage_microbatches = 2", "train.accumulation"]),
    (
        ["mesh.stage=2", "mesh.stage_repeats=2", "mesh.stage_microbatches=1"],
        ["mesh.stage_microbatches = 1", "at least 2"],
    ),
    (
        ["mesh.stage=2", "mesh.data=2", "mesh.stage_microbatches=5", "train.global_batch_size=32"],
        ["mesh.stage_microbatches = 5", "32 rows"],
    ),
    (
        ["mesh.stage=2", "mesh.data=2", "eval.batch_size=6"],
        ["eval.batch_size = 6", "4 equal parts", "4 or 8"],
    ),
]


@pytest.mark.parametrize("overrides, words", REFUSED, ids=[",".join(overrides) for overrides, _ in REFUSED])
def test_refused_with_key_value_reason_and_fix(overrides, words):
    message = message_of(check, load("", [*BASE, *overrides]))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.embed_dim=130", "model.head_dim=32"],
        [*GEMMA_3, "mesh.stage=4"],
        ["model.num_kv_heads=2"],
        ["model.rope.fraction=0.25"],
        ["model.rope.scaling=linear", "model.rope.factor=4"],
        ["model.positions=learned", "data.sequence_length=1024"],
        ["model.bias=all"],
        ["model.attention_kernel=cudnn", "precision.compute=bfloat16"],
        ["data.packing=crops", "data.mask_documents=False"],
        ["data.mixture.a.path=x", "data.mixture.b.path=y", "data.mixture_temperature=2"],
        ["data.tokenizer=none", "model.vocab_size=99"],
        ["data.tokenizer=none", "model.vocab_size=99", "data.format=llmc"],
        ["optim.warmup_steps=99"],
        ["optim.decay_steps=100"],
        ["optim.schedule=wsd", "optim.cooldown_ratio=0.8", "optim.warmup_steps=20"],
        ["train.steps=0", "train.tokens=1"],
        ["train.steps=0", "train.epochs=0.5", "optim.warmup_steps=10000"],
        ["mesh.tensor=2", "model.vocab_size=65", "model.vocab_multiple=4"],
        ["mesh.data=2", "mesh.fsdp=-1"],
        ["eval.sampling=random", "eval.batches=10"],
    ],
    ids=",".join,
)
def test_accepted(overrides):
    check(load("", [*BASE, *overrides]))


def test_run_steps():
    assert run_steps(load("", ["train.steps=7"])) == 7
    assert run_steps(load("", ["train.tokens=8193"])) == 2  # 32 x 256 a step
    assert run_steps(load("", ["train.epochs=3"])) is None


def test_vocabulary_is_the_tokenizers_or_at_least_as_large():
    assert check_vocab(load(""), 257) == 257
    assert check_vocab(load("", ["model.vocab_size=300"]), 257) == 300
    assert "at least 257" in message_of(check_vocab, load("", ["model.vocab_size=256"]), 257)
    assert "vocab_multiple=4" in message_of(check_vocab, load("", ["mesh.tensor=4"]), 257)
    rest = load("", ["mesh.tensor=-1", "mesh.data=1"])
    assert check_vocab(rest, 257) == 257  # how many devices the rest is cannot be told
    assert "vocab_multiple=8" in message_of(check_vocab, rest, 257, 8)


# -------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    "overrides, num_devices, expected",
    [
        ([], 8, (1, 8, 1, 1, 1, 1)),
        (["mesh.tensor=2"], 8, (1, 4, 1, 1, 1, 2)),
        (["mesh.sequence=4"], 8, (1, 2, 1, 1, 4, 1)),
        (["mesh.stage=2", "mesh.expert=4"], 8, (2, 1, 1, 4, 1, 1)),
        (["mesh.data=2", "mesh.fsdp=-1"], 8, (1, 2, 4, 1, 1, 1)),
        (["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"], 4, (1, 1, 2, 1, 1, 2)),
    ],
)
def test_mesh_sizes(overrides, num_devices, expected):
    sizes = mesh_sizes(load("", overrides).mesh, num_devices)
    assert tuple(sizes.items()) == tuple(zip(MESH_AXES, expected, strict=True))


@pytest.mark.parametrize(
    "overrides, num_devices, words",
    [
        (["mesh.data=3"], 8, ["mesh.data = 3", "there are 8", "mesh.data=8"]),
        (["mesh.data=2", "mesh.fsdp=3"], 8, ["mesh.fsdp = 3", "mesh.fsdp=4"]),
        (["mesh.tensor=3"], 8, ["mesh.tensor = 3", "does not divide the 8 devices", "1 or 2 or 4 or 8"]),
        (["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"], 6, ["makes 8 devices, and there are 6"]),
        (["mesh.data=1"], 2, ["mesh.data = 1", "mesh.data=2"]),
        (["mesh.tensor=-1", "mesh.data=1", "model.num_heads=2"], 4, ["model.num_heads = 2", "mesh.tensor = 4"]),
        (["train.global_batch_size=12"], 8, ["train.global_batch_size = 12", "mesh.data 8", "8 or 16"]),
        (["train.global_batch_size=16", "train.accumulation=4"], 8, ["train.global_batch_size = 16", "give 32"]),
        (["train.per_device_batch_size=2"], 8, ["train.per_device_batch_size = 2", "16 sequences", "set it to 4"]),
        (["mesh.sequence=8", "data.sequence_length=100"], 8, ["length = 100", "mesh.sequence = 8", "give 96 or 104"]),
        (["eval.batch_size=12"], 8, ["eval.batch_size = 12", "8 or 16"]),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(overrides, num_devices, words):
    message = message_of(check_devices, load("", overrides), num_devices)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.per_device_batch_size=4"],
        ["train.per_device_batch_size=2", "train.accumulation=2"],
        ["train.per_device_batch_size=8", "mesh.tensor=2"],
        ["eval.batch_size=24"],
    ],
)
def test_what_fits_the_devices(overrides):
    check_devices(load("", overrides), 8)


def test_rules_of_ones_own_are_left_to_the_layout():
    """Which alone knows what they split: 257 ids over two stages, four heads beside eight devices."""
    free = ["model.vocab_size=257", "mesh.stage=2", "mesh.parameter_rules=vocab=", "mesh.activation_rules=vocab="]
    check(load("", [*BASE, *free]))
    heads = "heads=", "kv_heads="
    rules = [f"mesh.{kind}_rules={','.join(heads)}" for kind in ("parameter", "activation")]
    check(load("", [*BASE, "mesh.tensor=8", *rules]))


def test_parameters_that_do_not_split_over_the_devices_here():
    sizes = ["model.embed_dim=12", "model.num_heads=2", "mesh.data=1", "mesh.fsdp=-1", "model.vocab_size=257"]
    assert not splits_evenly(load("", sizes))
    assert splits_evenly(load("", [*sizes, "model.embed_dim=16"]))


def test_a_run_over_slices_is_restored_where_there_are_none(capsys):
    found = fitted(load("", ["mesh.across_slices=data=2"]), fixed=False).mesh
    assert found.across_slices == () and mesh_sizes(found, 8)["data"] == 8
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("changes", [["mesh.sequence=16"], ["mesh.tensor=16"], ["mesh.sequence=3", "mesh.data=1"]])
def test_a_run_of_another_machine_is_restored_on_the_devices_here(capsys, changes):
    """All of them on fsdp, whatever axes its mesh had; but not where the run goes on."""
    cfg = load("", changes)
    found = fitted(cfg, fixed=False).mesh
    assert mesh_sizes(found, 8) == dict.fromkeys(MESH_AXES, 1) | {"fsdp": 8}
    assert "does not fit here" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        fitted(cfg, fixed=True)


MASKED = ["data.task=masked", "model.family=encoder", "model.head=masked_pairs", "data.eos=lines",
          "data.tokenizer=wordpiece", "train.steps=100"]  # fmt: skip
ELECTRA = [*MASKED, "data.task=replaced", "model.head=replaced", "data.masking.next_sentence=False"]
LABELLED = [
    "data.task=classification", "data.path=t.jsonl", "model.family=encoder", "model.head=text", "data.tokenizer=t.json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.task=masked"], ["data.task = 'masked'", "model.family = 'decoder'", "set model.family=encoder"]),
        (["model.family=encoder"], ["data.task = 'language'", "no next one to predict"]),
        ([*MASKED, "model.head=text"], ["model.head = 'text'", "set model.head=masked_pairs"]),
        ([*MASKED, "model.head=masked"], ["data.masking.next_sentence = True", "has no output for pairs"]),
        ([*MASKED, "data.eos=append"], ["data.eos = 'append'", "set data.eos=lines"]),
        ([*MASKED, "data.masking.phases=10:64"], ["data.masking.phases = '10:64'", "write it as 900000=128"]),
        ([*MASKED, "data.masking.phases=100=64"], ["they leave none of train.steps = 100"]),
        ([*ELECTRA, "train.discriminator_weight=9"], ["train.discriminator_weight = 9", "there is no generator"]),
        ([*MASKED, "train.discriminator_weight=9"], ["train.discriminator_weight = 9", "there is no generator"]),
        ([*ELECTRA, "model.generator_divisor=4", "model.vocab_multiple=2", "mesh.tensor=2"],
         ["model.num_heads = 4: the generator's part (1, of model.generator_divisor) does not split"]),
        ([*MASKED, "data.columns.text=x"], ["data.columns.text = 'x'", "it is read only with data.task"]),
        ([*MASKED, "mesh.sequence=4", "data.masking.phases=9=30"],
         ["data.masking.phases = '9=30'", "mesh.sequence = 4"]),
        ([*LABELLED, "data.masking.rate=0.3"], ["data.masking.rate = 0.3", "it is read only with data.task = masked"]),
        ([*LABELLED, "data.tokenizer=byte"], ["data.tokenizer = 'byte'", "checkpoint.init_from=hf:PATH"]),
        ([*LABELLED, "data.buckets=999"], ["data.buckets = '999'", "from 1 to data.sequence_length"]),
        ([*LABELLED, "data.path=package_docstrings"], ["data.path = 'package_docstrings'", "only docstrings has"]),
        ([*LABELLED, "data.format=text"], ["data.format = 'text'", "jsonl, csv, tsv or parquet"]),
        ([*LABELLED, "data.task=choice"], ["data.columns.choices = ()", "name two columns or more"]),
        ([*LABELLED, "data.task=similarity", "model.head=embedding"], ["data.columns.pair = ''", "second column"]),
        ([*LABELLED, "data.task=similarity", "model.head=embedding", "data.columns.pair=b", "train.accumulation=2"],
         ["train.accumulation = 2", "no sum over micro-batches"]),
        ([*LABELLED, "data.task=regression", "train.label_smoothing=0.1"], ["train.label_smoothing = 0.1"]),
        ([*LABELLED, "optim.name=sgd", "optim.bias_correction=false"], ["optim.bias_correction = False"]),
        (["data.format=csv"], ["data.format = 'csv'", "tables are read by labelled tasks"]),
    ],
)  # fmt: skip
def test_tasks_ask_for_what_they_need(overrides, words):
    message = message_of(check, load("", [*BASE, *overrides]))
    for word in words:
        assert word in message
