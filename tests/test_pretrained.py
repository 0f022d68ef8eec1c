"""A run that starts from a checkpoint of the hub: whose keys win, which numbers come over, what is kept for later."""

import json

import hub_encoders
import hub_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert_command import tokenizer
from tiny import mesh_layout, quick_compiler

from llm_jax import cli, config
from llm_jax.convert import reference
from llm_jax.errors import ConfigError
from llm_jax.models import registry
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import pretrained

DROPOUTS = dict(attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)


@pytest.fixture
def gpt2(tmp_path):
    values, arrays = hub_models.stored("GPT-2")
    return hub_models.write(tmp_path / "source", values | DROPOUTS, arrays)


def adopted(folder, *overrides):
    overrides = [f"init_from=hf:{folder}", "data.tokenizer=none", *overrides]
    return pretrained.adopt(config.load("", overrides), config.given("", overrides)).model


@pytest.mark.parametrize("given", [None, 0.0, 0.2])
def test_a_key_that_was_given_wins_and_its_neighbours_stay_theirs(gpt2, given, tmp_path, capsys):
    overrides = [] if given is None else [f"model.dropout.attention={given}"]
    expected = dict(embedding=0.1, attention=0.1 if given is None else given, attention_output=0.1, mlp_output=0.1)
    assert config.to_dict(adopted(gpt2, *overrides).dropout) == expected

    group = {} if given is None else dict(dropout=dict(attention=given))
    (tmp_path / "run.json").write_text(json.dumps(dict(model=group, data=dict(tokenizer="none"))))
    code = cli.main(["train", f"--config={tmp_path}/run.json", f"--config.init_from=hf:{gpt2}", "--print_config"])
    assert code == 0 and json.loads(capsys.readouterr().out)["model"]["dropout"] == expected


def test_of_a_config_alone_what_is_not_at_its_default_counts_as_given(gpt2):
    cfg = config.load("", [f"init_from=hf:{gpt2}", "data.tokenizer=none", "model.dropout.mlp_output=0.3"])
    found = pretrained.adopt(cfg).model
    assert (found.dropout.attention, found.dropout.mlp_output, found.positions) == (0.1, 0.3, "learned")


def test_one_key_of_rope_leaves_its_scaling(tmp_path):
    folder = hub_models.checkpoint(tmp_path / "source", "LLaMA 3.1, tied")
    rope = adopted(folder, "model.rope.base=10000").rope  # the default, and not theirs
    assert (rope.base, rope.scaling, rope.factor, rope.original_length) == (10_000.0, "llama3", 4.0, 12)


def test_a_model_of_another_family_is_refused(gpt2):
    with pytest.raises(ConfigError, match="is of the family decoder; leave the model out"):
        adopted(gpt2, "model.family=encoder")


def started(folder, layout=None, *overrides):
    overrides = [f"init_from=hf:{folder}", "data.tokenizer=none", *overrides]
    cfg = pretrained.adopt(config.load("", overrides), config.given("", overrides))
    model = registry.build(cfg.model, Layout(), Precision.make(cfg.precision))
    fresh = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), model.shapes())
    if layout:
        fresh = jax.device_put(fresh, layout.parameter_shardings(model.shapes(), model.axes()))
    params, told = pretrained.start_from(cfg.checkpoint.init_from, fresh, cfg)
    same = jax.tree.map(lambda a, b: (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding), params, fresh)
    assert all(jax.tree.leaves(same))
    return params, told


@pytest.mark.parametrize("mesh", [None, dict(fsdp=2, tensor=2)])
def test_an_untied_head_and_a_padded_vocabulary(tmp_path, mesh):
    folder = hub_models.checkpoint(tmp_path / "source", "GPT-2, head untied")  # 61 tokens
    params, _ = started(folder, mesh and mesh_layout(**mesh), "model.vocab_multiple=8")
    theirs = hub_models.read(folder)
    head, table = np.asarray(params["head"]["kernel"]), np.asarray(params["embedding"]["table"])
    assert head.shape == (32, 64) and table.shape == (64, 32)
    np.testing.assert_array_equal(head, np.pad(theirs["lm_head.weight"].T, ((0, 0), (0, 3))))
    np.testing.assert_array_equal(table, np.pad(theirs["transformer.wte.weight"], ((0, 3), (0, 0))))
    up = [theirs[f"transformer.h.{layer}.mlp.c_fc.weight"] for layer in range(2)]
    np.testing.assert_array_equal(params["stack"]["blocks"]["mlp"]["up"]["kernel"], np.stack(up))


def test_a_dry_run_tells_what_is_left_out_and_what_starts_anew(gpt2, tmp_path, capsys):
    data = dict(tokenizer="none", sequence_length=16)
    lora = dict(model=dict(lora=dict(rank=2, targets=["up"])), train=dict(steps=1), data=data)
    (tmp_path / "run.json").write_text(json.dumps(lora))
    options = [f"--config.init_from=hf:{gpt2}", "--dry_run"]
    assert cli.main(["train", f"--config={tmp_path}/run.json", *options]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    adapters = "stack/blocks/mlp/up/lora_a, stack/blocks/mlp/up/lora_b"
    assert line == f"begins at step 0 with 20 parameters of hf:{gpt2}; fresh: {adapters}"

    folder = hub_encoders.checkpoint(tmp_path / "bert", "BertForPreTraining")
    (folder / "tokenizer.json").write_text("{}")
    cfg = pretrained.adopt(config.load("", [f"init_from=hf:{folder}", "data.task=classification"]))
    model = registry.build(cfg.model, Layout(), Precision.make(cfg.precision))
    (line,) = pretrained.preview(cfg, model.shapes())
    assert "; fresh: labels/classifier/linear/bias, labels/classifier/linear/kernel" in line
    assert "; not taken over: cls.predictions" in line and "cls.seq_relationship.weight" in line
    assert "pooler" not in line


def test_keys_that_make_it_another_model_are_refused(gpt2):
    with pytest.raises(ConfigError, match=r"is another model than this config's .*query_norm.*; leave the keys of mod"):
        started(gpt2, None, "model.qk_norm=head")


def test_what_computes_otherwise_than_it_was_trained_is_told(gpt2):
    assert "trained with" not in started(gpt2, None)[1]
    _, told = started(gpt2, None, "model.norm_eps=0.1", "model.dropout.attention=0.2")
    assert "with model.norm_eps = 0.1, where it was trained with 1e-05" in told and "dropout" not in told


def test_float64_is_not_rounded(tmp_path, x64):
    values, arrays = hub_models.stored("GPT-2, head untied")
    arrays = {name: array + np.float64(1e-12) for name, array in arrays.items()}
    folder = hub_models.write(tmp_path / "source", values, arrays, dtype="float64")
    params, _ = started(folder, None, "precision.params=float64", "precision.compute=float64")
    head = params["head"]["kernel"]
    assert head.dtype == jnp.float64
    np.testing.assert_array_equal(head, arrays["lm_head.weight"].T)


def test_an_export_gives_back_what_lay_beside_the_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)  # as where torch is not installed
    source, run, back = tmp_path / "source", tmp_path / "run", tmp_path / "back"
    hub_models.checkpoint(source, "Qwen 2, tied")
    tokenizer(source)
    beside = {"generation_config.json": '{"temperature": 0.6}', "chat_template.jinja": "{{ messages }}"}
    for name, text in beside.items():
        (source / name).write_text(text)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    (tmp_path / "run.json").write_text(json.dumps(dict(
        checkpoint=dict(init_from=f"hf:{source}"), log=dict(trackers=[]), generate=dict(max_tokens=0),
        data=dict(path=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"), sequence_length=16),
        train=dict(steps=1, global_batch_size=8),
    )))  # fmt: skip
    with quick_compiler():
        code = cli.main(["train", f"--config={tmp_path}/run.json", f"--workdir={run}"])
        assert code == 0, capsys.readouterr().err
        assert cli.main(["convert", f"--from={run}", f"--to=hf:{back}"]) == 6, capsys.readouterr().err
    assert json.loads((run / "hf" / "llm_jax.json").read_text())["name"] == str(source)
    for name, text in beside.items():
        assert (back / name).read_text() == text
    assert (back / "tokenizer_config.json").read_text() == (source / "tokenizer_config.json").read_text()
