"""Conversion of every family, both ways, against logits that transformers computed for the same tiny models."""

import dataclasses
import json
from typing import Any

import hub_models
import jax
import ml_dtypes
import numpy as np
import pytest
from tiny import quick_compiler, slow

from llm_jax.config import DecoderConfig, MoEConfig
from llm_jax.convert import families, reference, rules, safetensors, torch_reference
from llm_jax.errors import ConversionMismatch, Unproven, UserError
from llm_jax.training import convert, mapping, restore, run_folder, starts


@pytest.fixture(autouse=True)
def quick():
    with quick_compiler():
        yield


@dataclasses.dataclass
class State:
    """What a start of parameters alone touches of a training state."""

    params: Any
    ema: Any


def put_reference(folder, name):
    logits = np.load(hub_models.LOGITS)[name]
    positions = np.arange(hub_models.LENGTH, dtype=np.int32)
    torch_reference.write(folder / reference.STORED, hub_models.tokens(), positions, logits)


def export(run, folder, **options):
    with pytest.raises(Unproven):
        convert.to_hub(str(run), str(folder), check=False, **options)
    return hub_models.read(folder)


def unchecked(source, run, **options):
    with pytest.raises(Unproven):
        convert.from_hub(str(source), str(run), check=False, **options)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def first_of_each_architecture() -> list:
    """All models; but for the first of each architecture they are slow tests."""
    first = {kind: name for name, (kind, _) in reversed(hub_models.CASES.items())}
    return [pytest.param(name, marks=[] if first[kind] == name else [pytest.mark.slow])
            for name, (kind, _) in hub_models.CASES.items()]  # fmt: skip


@pytest.mark.parametrize("name", first_of_each_architecture())
def test_logits_are_those_of_the_source_and_the_way_back_keeps_every_bit(name, tmp_path, capsys):
    source = hub_models.checkpoint(tmp_path / "source", name)
    put_reference(source, name)
    convert.from_hub(str(source), str(tmp_path / "run"))
    assert "checked: largest difference" in capsys.readouterr().out
    back = export(tmp_path / "run", tmp_path / "back")
    assert_same_bits(back, hub_models.stored(name)[1])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == hub_models.stored(name)[0]["architectures"]


@pytest.mark.parametrize("name", ["Gemma 3", *map(slow, ("GPT-2", "Phi-3", "Qwen 3 MoE", "Pythia"))])
def test_layers_that_are_not_stacked(name, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", name)
    put_reference(source, name)
    convert.from_hub(str(source), str(tmp_path / "run"), overrides=["model.scan_layers=False", "mesh.fsdp=2"])
    assert_same_bits(export(tmp_path / "run", tmp_path / "back"), hub_models.stored(name)[1])


@pytest.mark.parametrize(
    "name", ["LLaMA 3.1, tied", *map(slow, ("Mixtral", "GPT-2, head untied", "Gemma 2", "Pythia"))]
)
def test_shards_bf16_and_a_padded_vocabulary(name, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", name, dtype="bfloat16", largest=9000)
    assert len(list(source.glob("*.safetensors"))) > 2
    unchecked(source, tmp_path / "run", overrides=["model.vocab_multiple=16"])
    run = restore.restore(str(tmp_path / "run"))
    assert run.cfg.precision.params == "bfloat16"
    table = np.asarray(run.params["embedding"]["table"])
    assert table.shape[0] == 64 and not table[61:].any() and table[:61].any(1).all()
    back = export(tmp_path / "run", tmp_path / "back", shard_bytes=9000)
    expected = {key: array.astype(ml_dtypes.bfloat16) for key, array in hub_models.stored(name)[1].items()}
    assert_same_bits(back, expected)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert all((tmp_path / "back" / file).stat().st_size < 9000 + 2000 for file in index["weight_map"].values())


def test_every_tensor_keeps_its_own_dtype(tmp_path):
    config, arrays = hub_models.stored("LLaMA 2")
    arrays = {key: array.astype(ml_dtypes.bfloat16) for key, array in arrays.items()}
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float32) + np.float32(1e-6)
    folder = tmp_path / "source"
    hub_models.write(folder, config, {})
    planned = [hub_models.Planned(key, array.dtype, array.shape) for key, array in arrays.items()]
    hub_models.safetensors.write_folder(folder, planned, lambda tensor: arrays[tensor.name], largest=1 << 30)
    unchecked(folder, tmp_path / "run")
    assert restore.read_config(str(tmp_path / "run")).precision.params == "float32"
    assert_same_bits(export(tmp_path / "run", tmp_path / "back"), arrays)


def test_a_balance_bias_is_in_float32_in_a_model_of_bf16(tmp_path):
    """As DeepSeek-V3's checkpoints are; the way back keeps both."""
    config, arrays = hub_models.stored("DeepSeek-V3")
    bf16 = np.dtype(ml_dtypes.bfloat16)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    wide = ".e_score_correction_bias"
    mixed = {name: array if name.endswith(wide) else array.astype(bf16) for name, array in arrays.items()}
    planned = [safetensors.Planned(name, array.dtype, array.shape) for name, array in mixed.items()]
    safetensors.write_folder(source, planned, lambda tensor: mixed[tensor.name], largest=1 << 30)
    unchecked(source, tmp_path / "run")
    run = restore.restore(str(tmp_path / "run"))
    assert run.cfg.precision.params == "bfloat16"
    bias = run.params["stack"]["blocks"]["moe"]["balance_bias"]
    assert bias.dtype == np.float32 and {str(x.dtype) for x in jax.tree.leaves(run.params)} == {"bfloat16", "float32"}
    assert_same_bits(export(tmp_path / "run", tmp_path / "back"), mixed)


@pytest.mark.parametrize("depth, more", [(3, 1), (2, 2)])
def test_layers_that_predict_further_tokens_are_left_out_with_a_word(depth, more, tmp_path, capsys):
    """As in DeepSeek-V3's checkpoints, of any depth: they are numbered on from the model's own layers."""
    config, arrays = hub_models.stored("DeepSeek-V3")
    layer = lambda name: int(name.split(".")[2]) if name.startswith("model.layers.") else -1  # noqa: E731
    own = {name: array for name, array in arrays.items() if layer(name) < depth}
    of_last = {name: array for name, array in own.items() if layer(name) == depth - 1}
    for number in range(depth, depth + more):
        further = {name.replace(f".{depth - 1}.", f".{number}.", 1): array for name, array in of_last.items()}
        further[f"model.layers.{number}.eh_proj.weight"] = np.ones((32, 64), np.float32)
        arrays = (own if number == depth else arrays) | further
    config |= {"num_hidden_layers": depth, "num_nextn_predict_layers": more}
    source = hub_models.write(tmp_path / "source", config, arrays)
    unchecked(source, tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    names = ", ".join(f"model.layers.{n} ({len(of_last) + 1} tensors)" for n in range(depth, depth + more))
    assert told == [f"left out, of layers that predict further tokens: {names}; on the way back they are missing"]
    assert_same_bits(export(tmp_path / "run", tmp_path / "back"), own)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("count, error", [(0, "model.layers.3.eh_proj.weight is left over"), ("1", "number of layers")])
def test_further_layers_that_config_json_does_not_count_are_refused(count, error, tmp_path):
    config, arrays = hub_models.stored("DeepSeek-V3")
    arrays["model.layers.3.eh_proj.weight"] = np.ones((32, 64), np.float32)
    source = hub_models.write(tmp_path / "source", config | {"num_nextn_predict_layers": count}, arrays)
    with pytest.raises(UserError, match=error):
        convert.from_hub(str(source), str(tmp_path / "run"))


def test_float16_is_held_by_float32_and_comes_back(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "Qwen 3", dtype="float16")
    unchecked(source, tmp_path / "run")
    assert restore.read_config(str(tmp_path / "run")).precision.params == "float32"
    assert_same_bits(export(tmp_path / "run", tmp_path / "back"), hub_models.read(source))


def test_dtype_changes_what_is_written(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "LLaMA 2")
    unchecked(source, tmp_path / "run", dtype="bfloat16")
    back = export(tmp_path / "run", tmp_path / "back", dtype="float32")
    for name, array in hub_models.stored("LLaMA 2")[1].items():
        np.testing.assert_array_equal(back[name], array.astype(ml_dtypes.bfloat16).astype(np.float32), err_msg=name)


def test_names_of_a_checkpoint_without_its_head_class(tmp_path):
    config, arrays = hub_models.stored("GPT-2")
    bare = {key.removeprefix("transformer."): array for key, array in arrays.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)  # the causal mask, in old checkpoints
    source = hub_models.write(tmp_path / "source", config, bare)
    put_reference(source, "GPT-2")
    convert.from_hub(str(source), str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["Qwen 3 MoE", slow("Mixtral")])
def test_experts_fused_as_transformers_5_holds_them(name, tmp_path):
    config, arrays = hub_models.stored(name)
    source = hub_models.write(tmp_path / "source", config, fused(arrays))
    put_reference(source, name)
    convert.from_hub(str(source), str(tmp_path / "run"))
    assert_same_bits(export(tmp_path / "run", tmp_path / "back"), arrays)


def fused(arrays):
    """gate and up of all experts in one tensor (E, 2F, D), down in another (E, D, F)."""
    names = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    found, experts = {}, {}
    for key, array in arrays.items():
        key = key.replace("block_sparse_moe", "mlp")
        if ".experts." not in key:
            found[key] = array
            continue
        place, _, rest = key.partition(".experts.")
        number, name, _ = rest.split(".")
        experts.setdefault(place, {}).setdefault(names[name], {})[int(number)] = array
    for place, parts in experts.items():
        stacks = {name: np.stack([part[i] for i in range(len(part))]) for name, part in parts.items()}
        found[f"{place}.experts.gate_up_proj"] = np.concatenate([stacks["gate"], stacks["up"]], 1)
        found[f"{place}.experts.down_proj"] = stacks["down"]
    return found


def test_query_key_and_value_dealt_out_head_by_head():
    """GPT-NeoX's fused projection of two heads of two numbers."""
    dealt = rules.Interleaved(-2, groups=2, parts=3)
    theirs = np.arange(12)[:, None] + np.zeros(5)
    query, key, value = dealt.to_ours([theirs])
    assert (query[:, 0] == [0, 1, 6, 7]).all() and (key[:, 4] == [2, 3, 8, 9]).all()
    assert (value[:, 1] == [4, 5, 10, 11]).all()
    np.testing.assert_array_equal(dealt.to_theirs([query, key, value])[0], theirs)
    assert dealt.their_shapes([(4, 5)] * 3) == [(12, 5)]


def test_a_tied_head_that_is_stored_too_is_dropped_where_it_is_the_same(tmp_path):
    config, arrays = hub_models.stored("Qwen 2, tied")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    unchecked(hub_models.write(tmp_path / "source", config, arrays), tmp_path / "run")
    arrays["lm_head.weight"][3, 4] += 1
    other = hub_models.write(tmp_path / "other", config, arrays)
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert.from_hub(str(other), str(tmp_path / "run2"))


# ------------------------------------------------------------------------------------------------ the check


def test_a_wrong_model_is_not_kept(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "LLaMA 2")
    put_reference(source, "LLaMA with biases, linear scaling")
    with pytest.raises(ConversionMismatch, match="not the source.*at most 0.0001"):
        convert.from_hub(str(source), str(tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_check_fails_on_what_is_no_number(tmp_path):
    theirs = reference.Reference(hub_models.tokens(), np.arange(2), np.ones((1, 2, 3), np.float32), "here")
    with pytest.raises(ConversionMismatch):
        reference.compare(np.full((1, 2, 3), np.nan), theirs)


def test_without_a_reference_it_is_kept_and_called_unproven(tmp_path, monkeypatch):
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None)
    source = hub_models.checkpoint(tmp_path / "source", "LLaMA 2")
    with pytest.raises(Unproven, match="UNPROVEN.*torch and transformers are not installed here"):
        convert.from_hub(str(source), str(tmp_path / "run"))
    assert restore.restore(str(tmp_path / "run")).step == 0


def test_a_stored_reference_may_hold_a_few_positions_of_longer_prompts(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "Mistral with a window")
    logits = np.load(hub_models.LOGITS)["Mistral with a window"]
    kept = np.array([2, hub_models.LENGTH - 1], np.int32)
    torch_reference.write(source / reference.STORED, hub_models.tokens(), kept, logits[:, kept])
    convert.from_hub(str(source), str(tmp_path / "run"))


def test_kept_positions_end_at_the_last_and_fit_the_budget():
    np.testing.assert_array_equal(reference.kept_positions(4, 10), [0, 1, 2, 3])
    found = reference.kept_positions(512, 128_256, budget=16 * 4 * 128_256)
    assert len(found) == 16 and found[0] == 0 and found[-1] == 511


# ------------------------------------------------------------------------------------------------- the run


def test_the_run_folder_is_a_run(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "Qwen 3 MoE")
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    unchecked(source, tmp_path / "run", overrides=["mesh.expert=5", "mesh.data=1", "model.vocab_multiple=4"])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints", "config.json", "hf", "parameters.json", "sessions.json", "tokenizer"
    ]  # fmt: skip
    described = run_folder.read(tmp_path / "run").parameters
    assert described["stack/blocks/moe/up/kernel"]["shape"] == [2, 5, 32, 24]
    export(tmp_path / "run", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"eos_token_id": 7}


def test_another_architecture_that_can_say_the_model(tmp_path):
    unchecked(hub_models.checkpoint(tmp_path / "source", "LLaMA 2"), tmp_path / "run")
    back = export(tmp_path / "run", tmp_path / "back", architecture="Phi3ForCausalLM")
    assert "model.layers.0.self_attn.qkv_proj.weight" in back
    with pytest.raises(UserError, match="GPT2LMHeadModel cannot say this model: .*activation_function"):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "other"), architecture="GPT2LMHeadModel")
    with pytest.raises(UserError, match="did you mean LlamaForCausalLM"):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "other"), architecture="LamaForCausalLM")
    assert not (tmp_path / "other").exists()


def test_families_say_what_they_can():
    base = DecoderConfig(vocab_size=30)
    assert families.that_can_say(base).architecture == "LlamaForCausalLM"
    gemma = dict(norm_scale="zero", embedding_scale=True, activation="geglu")
    neox = dict(norm="layernorm", activation="gelu", bias="all")
    for changes, architecture in (
        (dict(sliding_window=8), "MistralForCausalLM"),
        (dict(bias="qkv"), "Qwen2ForCausalLM"),
        (dict(qk_norm="head"), "Qwen3ForCausalLM"),
        (dict(moe=MoEConfig(num_experts=4)), "MixtralForCausalLM"),
        (dict(moe=MoEConfig(num_experts=4, renormalize=False), qk_norm="head"), "Qwen3MoeForCausalLM"),
        (dict(sliding_window=8, layer_pattern=("window", "full")), "MinistralForCausalLM"),
        (dict(layer_pattern=("full", "full_without_positions")), "SmolLM3ForCausalLM"),
        (dict(norm_placement="output", qk_norm="all"), "Olmo2ForCausalLM"),
        (gemma, "GemmaForCausalLM"),
        (gemma | dict(norm_placement="sandwich", sliding_window=8, attention_softcap=5.0), "Gemma2ForCausalLM"),
        (gemma | dict(norm_placement="sandwich", sliding_window=8, qk_norm="head"), "Gemma3ForCausalLM"),
        (neox | dict(norm_placement="parallel"), "GPTNeoXForCausalLM"),
        (dict(positions="learned", norm="layernorm", activation="gelu", bias="all"), "GPT2LMHeadModel"),
    ):
        cfg = DecoderConfig(vocab_size=30, **changes)
        assert families.that_can_say(cfg).architecture == architecture
    with pytest.raises(UserError, match="no family of the hub can say this model:\n  LlamaForCausalLM cannot"):
        families.that_can_say(DecoderConfig(vocab_size=30, attention_output_scale=2.0))


def test_the_mapping_names_every_tensor_and_parameter_without_reading_weights(tmp_path, monkeypatch):
    source = hub_models.checkpoint(tmp_path / "source", "Phi-3")
    monkeypatch.setattr(hub_models.safetensors.Tensor, "read", None)
    mesh = ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "mesh.stage=2", "model.vocab_multiple=4"]
    text = mapping.mapping(str(source), overrides=mesh)
    lines = text.splitlines()
    assert lines[0].split() == ["theirs", "ours", "shape", "dtype", "split", "over"]
    row = next(line for line in lines if "layers.1.self_attn.qkv_proj" in line).split()
    assert row[1:] == ["stack/blocks/attention/query/kernel[1]", "32x32", "float32", "stage", "fsdp", "tensor"]
    assert all(name in text for name in hub_models.stored("Phi-3")[1])


def test_a_run_in_float32_starts_from_parameters_in_bf16(tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", "LLaMA 2", dtype="bfloat16")
    unchecked(source, tmp_path / "run")
    narrow = restore.restore(str(tmp_path / "run")).params
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), narrow)
    state = State(wide, None)
    start = starts._parameters_only(str(tmp_path / "run"), state, lambda: state)
    table = np.asarray(start.state.params["embedding"]["table"])
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, hub_models.read(source)["model.embed_tokens.weight"].astype(np.float32))
