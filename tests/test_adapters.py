"""Adapters in the format of peft, without peft: read, merged, written; and what cannot be said is refused by name."""

import json

import hub_models
import jax
import ml_dtypes
import numpy as np
import pytest
from test_convert import assert_same_bits, export, put_reference, unchecked
from tiny import quick_compiler, slow

from llm_jax import cli
from llm_jax.config import CheckpointConfig
from llm_jax.convert import peft, reference, rules, safetensors, torch_reference
from llm_jax.errors import ConversionMismatch, Unproven, UserError
from llm_jax.training import adapters, arrays, checkpoint, convert, restore

RANK, ALPHA = 3, 6
LLAMA, TIED = "LLaMA 2", "LLaMA 3.1, tied"


@pytest.fixture(autouse=True)
def quick():
    with quick_compiler():
        yield


def adapter(folder, modules, *, tables=(), dtype=np.float32, tensors=None, **config):
    """{module: (out, in)} with random A and B; gives {module: change of its weight}, float32."""
    folder.mkdir()
    draw, found, changes = np.random.default_rng(7), {}, {}
    for module, (outputs, inputs) in modules.items():
        a, b = ((0.3 * draw.normal(size=size)).astype(dtype) for size in ((RANK, inputs), (outputs, RANK)))
        names = (".lora_embedding_A", ".lora_embedding_B") if module in tables else (".lora_A.weight", ".lora_B.weight")
        found |= {f"base_model.model.{module}{name}": x for name, x in zip(names, (a, b), strict=True)}
        changes[module] = np.float32(ALPHA / RANK) * (b.astype(np.float32) @ a.astype(np.float32))
        changes[module] = changes[module].T if module in tables else changes[module]
    found |= tensors or {}
    planned = [safetensors.Planned(name, array.dtype, array.shape) for name, array in found.items()]
    safetensors.write_file(folder / peft.TENSORS, planned, lambda tensor: np.ascontiguousarray(found[tensor.name]))
    said = dict(peft_type="LORA", r=RANK, lora_alpha=ALPHA, target_modules=["x"], bias="none", lora_dropout=0.0)
    (folder / peft.CONFIG).write_text(json.dumps(said | config))
    return changes


def layers(name, sizes, count=2):
    return {f"model.layers.{layer}.{name}": sizes for layer in range(count)}


QUERY = layers("self_attn.q_proj", (32, 32))
MODULES = QUERY | layers("mlp.down_proj", (32, 40))
GPT2 = {f"transformer.h.{layer}.{name}": sizes for layer in range(2)
        for name, sizes in (("attn.c_attn", (96, 32)), ("mlp.c_proj", (32, 72)))}  # fmt: skip
PHI3 = layers("self_attn.qkv_proj", (64, 32)) | layers("mlp.gate_up_proj", (80, 32))


def logits(run):
    run = restore.restore(str(run))
    rows = np.tile(hub_models.tokens(2, 24), (4, 1))  # one for each device
    return np.asarray(jax.jit(run.model.apply)(run.params, rows))


def merged_source(folder, name, changes, *, conv=False, head_from=None):
    """The checkpoint with the changes in its weights, by hand."""
    config, weights = hub_models.stored(name)
    if head_from:
        config = config | {"tie_word_embeddings": False}
        weights["lm_head.weight"] = weights[head_from].copy()
    for module, change in changes.items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + (change.T if conv else change)
    return hub_models.write(folder, config, weights)


@pytest.mark.parametrize(
    "name, modules, scan",
    [
        (LLAMA, MODULES, True),
        slow(LLAMA, MODULES, False),
        ("GPT-2", GPT2, False),
        slow("GPT-2", GPT2, True),
        slow("Phi-3", PHI3, True),
        slow("Phi-3", PHI3, False),
    ],
)
def test_kept_or_merged_the_model_is_the_same_and_the_adapter_comes_back(name, modules, scan, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", name)
    conv = name == "GPT-2"
    changes = adapter(tmp_path / "peft", modules, fan_in_fan_out=conv)
    unchecked(merged_source(tmp_path / "by_hand", name, changes, conv=conv), tmp_path / "expected")
    expected = logits(tmp_path / "expected")

    given = dict(adapter=str(tmp_path / "peft"), overrides=[f"model.scan_layers={scan}"])
    unchecked(source, tmp_path / "run", **given)
    assert restore.read_config(str(tmp_path / "run")).model.lora.rank == RANK
    np.testing.assert_allclose(logits(tmp_path / "run"), expected, rtol=0, atol=2e-5)
    unchecked(source, tmp_path / "merged", **given, merge=True)
    assert not restore.read_config(str(tmp_path / "merged")).model.lora.rank
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, rtol=0, atol=2e-5)

    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), adapter=True, check=False)
    assert_same_bits(read(tmp_path / "back"), read(tmp_path / "peft"))
    config = json.loads((tmp_path / "back" / peft.CONFIG).read_text())
    assert config["r"] == RANK and config["lora_alpha"] == ALPHA and config["fan_in_fan_out"] == conv
    assert config["base_model_name_or_path"] == str(source) and not config["rank_pattern"]
    whole = export(tmp_path / "run", tmp_path / "whole")
    for key, array in hub_models.read(tmp_path / "by_hand").items():
        np.testing.assert_allclose(whole[key], array, rtol=0, atol=1e-6, err_msg=key)


def read(folder):
    return {name: tensor.read() for name, tensor in safetensors.read_header(folder / peft.TENSORS).items()}


@pytest.mark.slow
def test_adapters_of_fused_layers_that_have_parted_are_one_of_more_ranks(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "Phi-3")
    adapter(tmp_path / "peft", PHI3)
    unchecked(source, tmp_path / "run", adapter=str(tmp_path / "peft"))
    params = arrays.by_path(restore.restore(str(tmp_path / "run")).params)
    found = {f"params/{path}": leaf for path, leaf in params.items()}
    draw = np.random.default_rng(1)
    for path in (path for path in found if path.endswith("lora_a")):
        found[path] = found[path] + draw.normal(size=found[path].shape).astype(np.float32)
    with checkpoint.Checkpointer(tmp_path / "run", CheckpointConfig()) as saving:
        saving.save(1, arrays.nested(found), {})
    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), adapter=True, check=False)
    config = json.loads((tmp_path / "back" / peft.CONFIG).read_text())
    assert config["rank_pattern"] == {"qkv_proj": 9, "gate_up_proj": 6}
    assert config["alpha_pattern"] == {"qkv_proj": 18, "gate_up_proj": 12}
    unchecked(source, tmp_path / "merged", adapter=str(tmp_path / "back"), merge=True)
    np.testing.assert_allclose(logits(tmp_path / "merged"), logits(tmp_path / "run"), rtol=0, atol=2e-4)
    with pytest.raises(UserError, match="rank_pattern.*our adapters have one rank.*give --merge"):
        convert.from_hub(str(source), str(tmp_path / "other"), adapter=str(tmp_path / "back"))


@pytest.mark.parametrize("table", [True, slow(False)], ids=["embedding", "head"])
def test_merging_into_a_tied_table_unties_it(table, tmp_path, capsys):
    module, sizes = ("model.embed_tokens", (32, 61)) if table else ("lm_head", (61, 32))
    source = hub_models.checkpoint(tmp_path / "source", TIED)
    changes = adapter(tmp_path / "peft", {module: sizes}, tables=[module] if table else [])
    embedding = "model.embed_tokens.weight"
    unchecked(merged_source(tmp_path / "by_hand", TIED, changes, head_from=embedding), tmp_path / "expected")
    unchecked(source, tmp_path / "run", adapter=str(tmp_path / "peft"), merge=True)
    assert "the head is no longer tied to the embedding" in capsys.readouterr().err
    np.testing.assert_allclose(logits(tmp_path / "run"), logits(tmp_path / "expected"), rtol=0, atol=2e-5)
    export(tmp_path / "run", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(UserError, match=f"the adapter changes {module}.*give --merge"):
        convert.from_hub(str(source), str(tmp_path / "other"), adapter=str(tmp_path / "peft"))


def test_a_weight_that_was_changed_beside_its_adapter_is_refused(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", LLAMA)
    weight = hub_models.stored(LLAMA)[1]["lm_head.weight"]
    for name, kept in (("same", weight), ("other", weight + (weight > 0.3))):
        tensors = {"base_model.model.lm_head.base_layer.weight": kept}
        adapter(tmp_path / name, {"lm_head": (61, 32)}, tensors=tensors)
    unchecked(source, tmp_path / "run", adapter=str(tmp_path / "same"), merge=True)
    with pytest.raises(UserError, match="lm_head.base_layer.weight is not the model's own"):
        convert.from_hub(str(source), str(tmp_path / "run2"), adapter=str(tmp_path / "other"), merge=True)


def test_merging_sums_in_float32_and_rounds_once(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", LLAMA, dtype="bfloat16")
    changes = adapter(tmp_path / "peft", QUERY)
    unchecked(source, tmp_path / "run", adapter=str(tmp_path / "peft"), merge=True)
    back, base = export(tmp_path / "run", tmp_path / "back"), hub_models.read(source)
    for module, change in changes.items():
        expected = (base[f"{module}.weight"].astype(np.float32) + change).astype(ml_dtypes.bfloat16)
        different = np.mean(back[f"{module}.weight"] != expected)  # a sum in another order may round another way
        assert different < 0.01


@pytest.mark.slow
def test_the_base_keeps_its_dtype_and_adapters_are_float32(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", LLAMA, dtype="bfloat16")
    adapter(tmp_path / "peft", QUERY, dtype=ml_dtypes.bfloat16)
    unchecked(source, tmp_path / "run", adapter=str(tmp_path / "peft"))
    query = restore.restore(str(tmp_path / "run")).params["stack"]["blocks"]["attention"]["query"]
    assert query["kernel"].dtype == ml_dtypes.bfloat16 and query["lora_a"].dtype == np.float32
    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), adapter=True, dtype="bfloat16", check=False)
    assert_same_bits(read(tmp_path / "back"), read(tmp_path / "peft"))


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_the_check_takes_the_logits_stored_beside_the_adapter(streamed, tmp_path, capsys):
    source = hub_models.checkpoint(tmp_path / "source", LLAMA)
    put_reference(source, LLAMA)  # of the model without the adapter: must not be taken
    changes = adapter(tmp_path / "peft", MODULES)
    unchecked(merged_source(tmp_path / "by_hand", LLAMA, changes), tmp_path / "expected")
    tokens = hub_models.tokens()
    run = restore.restore(str(tmp_path / "expected"))
    found = np.array(run.model.apply(run.params, np.repeat(tokens, 8, 0)))[:1]
    file, places = tmp_path / "peft" / reference.STORED, np.arange(hub_models.LENGTH, dtype=np.int32)
    torch_reference.write(file, tokens, places, found)
    for name, merge in (("kept", False), ("merged", True)):
        given = dict(adapter=str(tmp_path / "peft"), merge=merge, streamed=streamed)
        convert.from_hub(str(source), str(tmp_path / name), **given)
    assert capsys.readouterr().out.count("checked: ") == 2
    found[0, 3, 5] += 0.1
    torch_reference.write(file, tokens, places, found)
    with pytest.raises(ConversionMismatch):
        convert.from_hub(str(source), str(tmp_path / "other"), **given)


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(peft_type="IA3"), "peft_type = 'IA3': only LORA"),
        (dict(use_dora=True), "use_dora = True: our adapters are plain low-rank ones"),
        (dict(bias="all"), "bias = 'all': our adapters change no bias"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\]"),
        (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa': such a start changes the model"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices"),
        (dict(something_new=7), "something_new = 7"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out = true: this model's weights are"),
        (dict(r=4), r"the shapes \[3, 32\] and \[32, 3\], and the rank is 4"),
        (dict(alpha_pattern={"layers.1.self_attn.q_proj": 3}), "alpha_pattern.*give --merge"),
    ],
    ids=str,
)
def test_options_that_cannot_be_said_are_refused_by_name(config, message, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", LLAMA)
    adapter(tmp_path / "peft", QUERY, **config)
    with pytest.raises(UserError, match=message):
        convert.from_hub(str(source), str(tmp_path / "run"), adapter=str(tmp_path / "peft"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "modules, message",
    [
        ({"model.layers.2.self_attn.q_proj": (32, 32)}, "layers.2.self_attn.q_proj has an adapter, and no layer"),
        ({"model.layers.1.self_attn.q_proj": (32, 32)}, "changes 0 of the 1 layers|changes 1 of the 2 layers"),
        ({"model.layers.1.self_attn.q_proj": (30, 32)}, r"are of \[30, 32\], its weight of \[32, 32\]"),
        ({"model.norm": (32, 32)}, "the module model.norm has an adapter, and no layer"),
    ],
)
def test_modules_that_do_not_fit_are_refused(modules, message, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", LLAMA)
    adapter(tmp_path / "peft", modules)
    with pytest.raises(UserError, match=message):
        convert.from_hub(str(source), str(tmp_path / "run"), adapter=str(tmp_path / "peft"))


@pytest.mark.slow
def test_an_adapter_of_experts_is_merged_or_refused(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "Mixtral")
    modules = {f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1": (40, 32)
               for layer in range(2) for expert in range(3)}  # fmt: skip
    changes = adapter(tmp_path / "peft", modules)
    with pytest.raises(UserError, match="moe/gate/kernel can have no adapter"):
        convert.from_hub(str(source), str(tmp_path / "run"), adapter=str(tmp_path / "peft"))
    unchecked(source, tmp_path / "run", adapter=str(tmp_path / "peft"), merge=True)
    unchecked(merged_source(tmp_path / "by_hand", "Mixtral", changes), tmp_path / "expected")
    np.testing.assert_allclose(logits(tmp_path / "run"), logits(tmp_path / "expected"), rtol=0, atol=2e-5)


def test_what_is_no_folder_of_peft_is_refused(tmp_path):
    folder = tmp_path / "peft"
    adapter(folder, QUERY, tensors={"base_model.model.lm_head.weight": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="base_model.model.lm_head.weight is left over"):
        peft.read(folder)
    (folder / peft.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin alone, a pickle"):
        peft.read(folder)
    (folder / peft.CONFIG).unlink()
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        peft.read(folder)


def test_a_run_without_adapters_has_none_to_write(tmp_path):
    unchecked(hub_models.checkpoint(tmp_path / "source", LLAMA), tmp_path / "run")
    with pytest.raises(UserError, match="the run .* has none"):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), adapter=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from=hf:a", "--to=b", "--adapter"], "say which adapter"),
        (["--from=hf:a", "--to=b", "--merge"], "say which adapter"),
        (["--from=a", "--to=hf:b", "--adapter=c"], "give --adapter alone"),
        (["--from=a", "--to=hf:b", "--merge"], "--merge is for converting from hf: to a run"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, capsys):
    assert cli.main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tables_that_mix_inputs_have_no_adapters():
    class Odd(rules.Same):
        """Puts the inputs into another order."""

        def to_theirs(self, ours):
            return [ours[0][::-1]]

    way = adapters.outputs_alone.__wrapped__
    assert way(rules.Swapped(), 5, (4,)) == "linear" and way(rules.Same(), 5, (4,)) == "conv"
    assert way(rules.Chain((rules.Cut(-2, (4, 2)), rules.Swapped())), 5, (4, 2)) == "linear"
    assert way(Odd(), 5, (4,)) == ""


def test_a_run_trains_adapters_and_writes_them(tmp_path, capsys):
    source = hub_models.checkpoint(tmp_path / "source", LLAMA)
    (tmp_path / "run.txt").write_text("some words to learn\n" * 200)
    unchecked(source, tmp_path / "base", overrides=[f"data.path={tmp_path / 'run.txt'}"])
    given = ["train", f"--config={tmp_path / 'base' / 'config.json'}", f"--workdir={tmp_path / 'tuned'}",
             f"--config.checkpoint.init_from={tmp_path / 'base'}", "--config.model.lora.rank=2",
             "--config.model.lora.targets=query,value", "--config.train.steps=2", "--config.train.global_batch_size=8",
             "--config.data.tokenizer=char", "--config.data.sequence_length=16", "--config.log.trackers=()",
             "--config.generate.max_tokens=0"]  # fmt: skip
    assert cli.main(given) == 0
    assert "fresh arrays of adapters" in capsys.readouterr().out
    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "tuned"), str(tmp_path / "back"), adapter=True, check=False)
    assert json.loads((tmp_path / "back" / peft.CONFIG).read_text())["target_modules"] == ["q_proj", "v_proj"]
    tuned, base = (restore.restore(str(tmp_path / name)).params for name in ("tuned", "base"))
    assert np.any(tuned["stack"]["blocks"]["attention"]["query"]["lora_b"])
    for path, leaf in arrays.by_path(base).items():
        np.testing.assert_array_equal(arrays.by_path(tuned)[path], leaf)
