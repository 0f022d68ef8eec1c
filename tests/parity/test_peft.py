"""Adapters against the library peft: its models' logits are ours, merged and not, and it reads what we write."""

import json

import hub_models
import jax
import numpy as np
import pytest
from tiny import quick_compiler

from llm_jax.convert import safetensors
from llm_jax.errors import Unproven
from llm_jax.training import convert, restore

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]
torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `parity`)")
peft = pytest.importorskip("peft", reason="needs peft (the extra `parity`)")


@pytest.fixture(autouse=True)
def quick():
    with quick_compiler():
        yield


def model_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def adapter(source, folder, **options):
    """An adapter with random A and B, as peft saves it; gives the logits of its model."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**dict(r=3, lora_alpha=6, task_type="CAUSAL_LM", **options))
    model = peft.get_peft_model(model_of(source), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(hub_models.tokens(2, 24)).long()).logits.numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


def ours(run):
    run = restore.restore(str(run))
    return np.asarray(jax.jit(run.model.apply)(run.params, hub_models.tokens(2, 24)))


def imported(source, run, given, **options):
    with pytest.raises(Unproven):
        convert.from_hub(str(source), str(run), adapter=str(given), check=False, **options)


EXACT = {
    "LLaMA 3.1, tied": dict(target_modules=["q_proj", "v_proj"]),
    "Qwen 3": dict(target_modules="all-linear", use_rslora=True),
    "GPT-2": dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
    "Phi-3": dict(target_modules=["qkv_proj", "gate_up_proj", "down_proj"], lora_dropout=0.1),
    "Mixtral": dict(target_modules=["q_proj", "o_proj"]),
}


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", EXACT)
def test_adapters_in_and_out(name, scan, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", name)
    expected = adapter(source, tmp_path / "peft", **EXACT[name])
    imported(source, tmp_path / "run", tmp_path / "peft", overrides=[f"model.scan_layers={scan}"])
    cfg = restore.read_config(str(tmp_path / "run")).model
    assert cfg.lora.rank == 3 and "lora_a" in (tmp_path / "run" / "parameters.json").read_text()
    assert_close(ours(tmp_path / "run"), expected)

    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), adapter=True, check=False)
    mine, its = ({n: t.read() for n, t in safetensors.read_header(f / "adapter_model.safetensors").items()}
                 for f in (tmp_path / "back", tmp_path / "peft"))  # fmt: skip
    assert mine.keys() == its.keys()
    assert all(mine[key].tobytes() == array.tobytes() for key, array in its.items())
    again = peft.PeftModel.from_pretrained(model_of(source), tmp_path / "back")
    assert again.peft_config["default"].r == 3
    assert_close(logits(again), expected)

    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "merged"), check=False)
    assert_close(logits(model_of(tmp_path / "merged")), expected)
    imported(source, tmp_path / "merged_run", tmp_path / "peft", merge=True)
    assert not restore.read_config(str(tmp_path / "merged_run")).model.lora.rank
    assert_close(ours(tmp_path / "merged_run"), expected)


MERGED = {
    "head of a tied model": ("LLaMA 3.1, tied", dict(target_modules=["q_proj", "lm_head"])),
    "embedding of a tied model": ("Qwen 2, tied", dict(target_modules=["embed_tokens", "up_proj"])),
    "embedding": ("LLaMA 2", dict(target_modules=["embed_tokens"])),
    "ranks of their own": (
        "Qwen 3",
        dict(
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"q_proj": 2},
            alpha_pattern={"layers.1.mlp.down_proj": 5},
        ),
    ),
    "some layers": ("LLaMA 2", dict(target_modules=["o_proj"], layers_to_transform=[1])),
    "GPT-2's embedding": ("GPT-2", dict(target_modules=["wte", "c_fc"], fan_in_fan_out=True)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", MERGED)
def test_what_only_merging_can_say(case, tmp_path):
    name, options = MERGED[case]
    source = hub_models.checkpoint(tmp_path / "source", name)
    expected = adapter(source, tmp_path / "peft", **options)
    imported(source, tmp_path / "run", tmp_path / "peft", merge=True)
    assert_close(ours(tmp_path / "run"), expected)
    tied = case in ("embedding of a tied model", "head of a tied model", "GPT-2's embedding")
    assert not restore.read_config(str(tmp_path / "run")).model.tie_embeddings or not tied
    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), check=False)
    assert_close(logits(model_of(tmp_path / "back")), expected)


@pytest.mark.parametrize("name", ["GPT-2", "Phi-3", "LLaMA 2"])
def test_adapters_that_were_trained_here_are_read_by_peft(name, tmp_path, capsys):
    """Those of layers that the family fuses have parted from one another: a wider adapter holds them all."""
    source = hub_models.checkpoint(tmp_path / "source", name)
    targets = dict(target_modules=["c_attn", "c_fc"] if name == "GPT-2" else ["qkv_proj", "gate_up_proj"])
    if name == "LLaMA 2":
        targets = dict(target_modules=["q_proj", "k_proj"])
    adapter(source, tmp_path / "peft", **targets, fan_in_fan_out=name == "GPT-2")
    imported(source, tmp_path / "run", tmp_path / "peft")
    scatter(tmp_path / "run")
    expected = ours(tmp_path / "run")
    convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), adapter=True)
    assert "against transformers and peft" in capsys.readouterr().out
    again = peft.PeftModel.from_pretrained(model_of(source), tmp_path / "back")
    assert_close(logits(again), expected)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == (name != "LLaMA 2")
    imported(source, tmp_path / "merged", tmp_path / "back", merge=True)
    assert_close(ours(tmp_path / "merged"), expected)


def scatter(run):
    """Train one step by hand: other numbers in every adapter."""
    from llm_jax.config import CheckpointConfig
    from llm_jax.training import arrays, checkpoint

    found = arrays.by_path(restore.restore(str(run)).params)
    draw = np.random.default_rng(5)
    moved = {
        f"params/{path}": jax.numpy.asarray(leaf + 0.1 * draw.normal(size=leaf.shape).astype(leaf.dtype))
        if "lora_" in path else leaf
        for path, leaf in found.items()
    }  # fmt: skip
    with checkpoint.Checkpointer(run, CheckpointConfig()) as saving:
        saving.save(1, arrays.nested(moved), {})


def test_the_commands_own_check_runs_peft_in_its_own_process(tmp_path, capsys):
    source = hub_models.checkpoint(tmp_path / "source", "LLaMA 3.1, tied", dtype="bfloat16")
    adapter(source, tmp_path / "peft", target_modules=["q_proj", "down_proj"])
    convert.from_hub(str(source), str(tmp_path / "run"), adapter=str(tmp_path / "peft"))
    convert.from_hub(str(source), str(tmp_path / "merged"), adapter=str(tmp_path / "peft"), merge=True)
    assert restore.read_config(str(tmp_path / "merged")).precision.params == "bfloat16"
    convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"))
    convert.to_hub(str(tmp_path / "run"), str(tmp_path / "adapter"), adapter=True)
    assert capsys.readouterr().out.count("checked: ") == 4
