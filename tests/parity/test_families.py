"""Converted models against transformers in torch: logits, gradients, greedy text; and what we write, read by it."""

import functools
import importlib.util

import hub_models
import jax
import numpy as np
import pytest
from tiny import quick_compiler

from llm_jax.config import GenerateConfig
from llm_jax.convert import families, rules
from llm_jax.errors import Unproven
from llm_jax.generation.generate import Generator
from llm_jax.objectives.language import LanguageObjective
from llm_jax.sharding import Layout, path_name
from llm_jax.training import convert, restore, step

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `parity`)")

NEW_TOKENS = 64
WITH_EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")


@pytest.fixture(autouse=True)
def quick():
    with quick_compiler():
        yield


@pytest.fixture(scope="module")
def maker():
    path = hub_models.GOLDEN / "make_convert_references.py"
    spec = importlib.util.spec_from_file_location("make_convert_references", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ids:
    """A tokenizer whose texts are ids in decimal."""

    eos_id = None

    def encode(self, texts):
        return [np.array([int(word) for word in text.split()]) for text in texts]

    def decode_bytes(self, ids):
        return "".join(f" {int(i)}" for i in ids).encode()


def imported(source, run, *overrides):
    with pytest.raises(Unproven):
        convert.from_hub(str(source), str(run), check=False, overrides=["mesh.data=1", "mesh.fsdp=-1", *overrides])
    return restore.restore(str(run), overrides=["mesh.fsdp=1", "mesh.data=-1"])


@pytest.mark.parametrize("name", hub_models.CASES)
def test_the_stored_reference_is_current(maker, name):
    entry = maker.described(name)
    config, _ = hub_models.stored(name)
    assert {key: list(array.shape) for key, array in hub_models.stored(name)[1].items()} == entry["tensors"]
    assert config == entry["config"]
    np.testing.assert_allclose(maker.logits(entry), np.load(hub_models.LOGITS)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", hub_models.CASES)
def test_logits_gradients_and_greedy_text(maker, name, tmp_path):
    source = hub_models.checkpoint(tmp_path / "source", name)
    theirs = maker.load(source)
    # Their loss has no balance term, and dropout draws other masks.
    off = [f"model.dropout.{place}=0" for place in ("embedding", "attention", "attention_output", "mlp_output")]
    off += ["model.moe.balance_loss=0"] if source_type(name) in WITH_EXPERTS else []
    run = imported(source, tmp_path / "run", *off)

    tokens, targets = hub_models.tokens(16, 40), hub_models.tokens(16, 40, seed=4)
    logits = theirs(torch.from_numpy(tokens).long()).logits
    expected = logits.detach().numpy()
    np.testing.assert_allclose(
        jax.jit(run.model.apply)(run.params, tokens), expected, rtol=0, atol=1e-4 * float(expected.std())
    )

    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten()).backward()
    expected = {key: value.grad.numpy() for key, value in theirs.named_parameters()}
    assert_same_gradients(hub_models.stored(name)[0], run, tokens, targets, expected)

    prompt = tokens[:2, :9]
    with torch.no_grad():
        greedy = theirs.generate(
            torch.from_numpy(prompt).long(), attention_mask=torch.ones(2, 9), max_new_tokens=NEW_TOKENS,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    cfg = GenerateConfig(max_tokens=NEW_TOKENS, temperature=0.0)
    texts = Generator(run.model, run.params, Ids())([" ".join(map(str, row)) for row in prompt.tolist()], cfg)
    for text, row in zip(texts, greedy[:, 9:].tolist(), strict=True):
        assert [int(word) for word in text.split()] == row


def source_type(name):
    return hub_models.stored(name)[0]["model_type"]


def assert_same_gradients(config, run, tokens, targets, expected):
    """By their names, through the table; within 1e-3 of the largest of each tensor."""
    shape = tokens.shape
    batch = {
        "tokens": tokens,
        "targets": targets,
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones_like(tokens),
        "loss_weights": np.ones(shape, np.float32),
    }
    objective = LanguageObjective.make(run.cfg)
    gradient = functools.partial(step.gradients, run.model, objective, layout=Layout(), seed=0, step=0)
    ours, _, _ = jax.jit(gradient)(run.params, batch)
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(ours)}
    table = list(families.of_config(config, "here").rules(run.cfg.model, set(expected)))
    moves = rules.plan(table, run.cfg.model, run.model.shapes(), run.model.axes(), run.cfg.model.vocab_size)
    seen = set()
    for move in moves:
        found = move.transform.to_theirs([leaves[slot.path][slot.index] for slot in move.ours])
        for key, array in zip(move.theirs, found, strict=True):
            if key.endswith("e_score_correction_bias"):  # no loss trains it
                continue
            wanted = expected[key]
            largest = max(float(np.abs(wanted).max()), 1e-3)
            np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-3 * largest, err_msg=key)
            seen.add(key)
    assert seen == set(expected)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", hub_models.CASES)
def test_what_we_write_is_what_transformers_wrote(name, scan, tmp_path):
    """transformers' own model, saved by it in several shards of bf16; ours from it saved again; both load alike."""
    kind, values = hub_models.CASES[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, hub_models.model_class(kind))(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    imported(tmp_path / "source", tmp_path / "run", "model.vocab_multiple=16", f"model.scan_layers={scan}")
    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), check=False, shard_bytes=15_000)
    found, expected = hub_models.read(tmp_path / "back"), hub_models.read(tmp_path / "source")
    assert found.keys() == expected.keys()
    assert all(found[key].tobytes() == array.tobytes() for key, array in expected.items())

    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, local_files_only=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    changed = ("_name_or_path", "transformers_version", "architectures", "dtype", "sliding_window", "max_window_layers")
    mine, its = again.config.to_dict(), model.config.to_dict()
    if its.get("head_dim", 0) is None:  # Mixtral leaves it to be reckoned
        its["head_dim"] = its["hidden_size"] // its["num_attention_heads"]
    for key in set(its) - set(changed):
        assert mine[key] == its[key], key
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_commands_own_check_runs_transformers_in_its_own_process(tmp_path, capsys):
    source = hub_models.checkpoint(tmp_path / "source", "LLaMA 3.1, tied")
    convert.from_hub(str(source), str(tmp_path / "run"), dtype="bfloat16")
    convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), dtype="float16")
    assert capsys.readouterr().out.count("against transformers") == 2


def test_mxfp4_is_read_as_transformers_reads_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from llm_jax.convert.packed import _mxfp4

    rng = np.random.RandomState(0)
    blocks = rng.randint(0, 256, (2, 6, 3, 16)).astype(np.uint8)
    scales = rng.randint(100, 150, (2, 6, 3)).astype(np.uint8)
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)).float().numpy()
    found = np.stack([_mxfp4(*expert) for expert in zip(blocks, scales, strict=True)])
    np.testing.assert_array_equal(found.astype(np.float32), expected)
