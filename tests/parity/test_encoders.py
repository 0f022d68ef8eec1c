"""Converted encoders against transformers in torch: outputs, gradients, losses; and what we write, read by it."""

import functools
import importlib.util

import hub_encoders
import hub_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler

from llm_jax.convert import families, rules, torch_reference
from llm_jax.errors import Unproven
from llm_jax.models.encoder import Texts
from llm_jax.sharding import path_name
from llm_jax.training import convert, convert_check, restore

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `parity`)")


@pytest.fixture(autouse=True)
def quick():
    with quick_compiler():
        yield


@pytest.fixture(scope="module")
def maker():
    path = hub_models.GOLDEN / "make_encoder_references.py"
    spec = importlib.util.spec_from_file_location("make_encoder_references", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imported(source, run, *overrides):
    with pytest.raises(Unproven):
        convert.from_hub(str(source), str(run), check=False, overrides=["mesh.data=1", *overrides])
    return restore.restore(str(run))


def loaded(source, name):
    """transformers' model of a folder."""
    form = getattr(transformers, families.FAMILIES[hub_encoders.architecture(name)].architecture)
    return form.from_pretrained(source, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()


@pytest.mark.parametrize("name", hub_encoders.CASES)
def test_the_stored_reference_is_current(maker, name):
    entry = maker.described(name)
    config, _ = hub_encoders.stored(name)
    assert {key: list(array.shape) for key, array in hub_encoders.stored(name)[1].items()} == entry["tensors"]
    assert config == entry["config"]
    np.testing.assert_allclose(maker.outputs(entry), np.load(hub_encoders.OUTPUTS)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", hub_encoders.CASES)
def test_outputs_and_gradients(name, tmp_path):
    source = hub_encoders.checkpoint(tmp_path / "source", name)
    theirs, run = loaded(source, name), imported(source, tmp_path / "run")
    tokens, places = hub_encoders.tokens(8, 20), np.arange(20)
    ids = torch.from_numpy(tokens).long()
    given = ids[:, None] if "MultipleChoice" in name else ids
    output = torch_reference.encoder_outputs(
        theirs(given, attention_mask=torch.ones_like(given)), run.cfg.model.head, places
    )
    expected = output.detach().numpy()
    compute = functools.partial(convert_check.encoder_outputs, run, length=20, positions=places)
    found = np.asarray(jax.jit(compute)(run.params, tokens))
    spread = max(expected.std(), 0.01 * np.abs(expected).max())  # a few scores may hardly differ
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * spread)

    cotangent = np.random.RandomState(5).standard_normal(expected.shape).astype(np.float32)
    (output * torch.from_numpy(cotangent)).mean().backward()
    gradients = {key: value.grad.numpy() for key, value in theirs.named_parameters() if value.grad is not None}
    loss = lambda params: (compute(params, tokens) * cotangent).mean()  # noqa: E731
    assert_same_gradients(name, run, jax.jit(jax.grad(loss))(run.params), gradients)


def assert_same_gradients(name, run, ours, expected):
    """By their names, through the table; within 1e-3 of the largest of each tensor."""
    leaves = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(ours)}
    config, arrays = hub_encoders.stored(name)
    family = families.of_config(config, "here", set(arrays))
    table = list(family.rules(run.cfg.model, set(arrays)))
    moves = rules.plan(table, run.cfg.model, run.model.shapes(), run.model.axes(), run.cfg.model.vocab_size)
    seen = set()
    for move in moves:
        found = move.transform.to_theirs([leaves[slot.path][slot.index] for slot in move.ours])
        for key, array in zip(move.theirs, found, strict=True):
            largest = max(float(np.abs(expected[key]).max()), 1e-4)
            np.testing.assert_allclose(array, expected[key], rtol=0, atol=1e-3 * largest, err_msg=key)
            seen.add(key)
    assert seen == set(expected)


BARE = ("BertModel", "XLMRobertaModel", "DistilBertModel", "DebertaV2Model", "ModernBertModel")


@pytest.mark.parametrize("name", BARE)
def test_padding_types_and_packed_texts(name, tmp_path):
    """Two texts of other lengths: as padded rows there, in one packed row here."""
    source = hub_encoders.checkpoint(tmp_path / "source", name)
    theirs, run = loaded(source, name), imported(source, tmp_path / "run")
    tokens, lengths = hub_encoders.tokens(2, 12), (7, 12)
    kinds = np.zeros_like(tokens)
    more = {}
    if name == "BertModel":
        kinds[:, 4:] = 1
        more = {"token_type_ids": torch.from_numpy(kinds).long()}
    there = np.arange(12)[None] < np.array(lengths)[:, None]
    with torch.no_grad():
        padded = torch.from_numpy(np.where(there, tokens, hub_encoders.PAD)).long()
        hidden = theirs(padded, attention_mask=torch.from_numpy(there).long(), **more).last_hidden_state
        expected = hidden.numpy()[there]
    packed = {
        "tokens": tokens[there],
        "segment_ids": np.repeat([1, 2], lengths),
        "positions": np.concatenate([np.arange(n) for n in lengths]),
        "token_types": kinds[there],
    }
    batch = {key: np.pad(value, (0, 3))[None].astype(np.int32) for key, value in packed.items()}
    hidden = jax.jit(lambda params: run.model.apply(params, Texts(**batch), method="hidden"))
    np.testing.assert_allclose(hidden(run.params)[0, : sum(lengths)], expected, rtol=0, atol=1e-4)


def test_the_losses_of_pre_training(tmp_path):
    source = hub_encoders.checkpoint(tmp_path / "source", "BertForPreTraining")
    theirs, run = loaded(source, "BertForPreTraining"), imported(source, tmp_path / "run")
    tokens, targets = hub_encoders.tokens(8, 16), hub_encoders.tokens(8, 16, seed=9)
    places, pairs = np.tile([2, 5, 11], (8, 1)), np.array([0, 1, 1, 0, 0, 0, 1, 1])
    labels = np.full_like(tokens, -100)
    np.put_along_axis(labels, places, np.take_along_axis(targets, places, 1), 1)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(tokens).long(), labels=torch.from_numpy(labels).long(),
            next_sentence_label=torch.from_numpy(pairs),
        ).loss.item()  # fmt: skip
    given = (Texts(tokens), places, np.take_along_axis(targets, places, 1))
    starts = np.zeros((8, 1), np.int32)
    losses = jax.jit(lambda params: run.model.apply(params, *given, starts=starts, method="masked_losses"))
    loss, _, logits = losses(run.params)
    pair_loss = -jax.nn.log_softmax(logits[:, 0])[jnp.arange(8), pairs]
    assert float(loss.mean() + pair_loss.mean()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", hub_encoders.CASES)
def test_what_we_write_is_what_transformers_wrote(maker, name, tmp_path):
    """transformers' own model in bf16; ours from it, saved again; both load alike."""
    torch.manual_seed(1)
    model = maker.model_of(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    imported(tmp_path / "source", tmp_path / "run", "model.vocab_multiple=16", "model.scan_layers=False")
    with pytest.raises(Unproven):
        convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"), check=False, shard_bytes=15_000)
    found, expected = hub_models.read(tmp_path / "back"), hub_models.read(tmp_path / "source")
    assert found.keys() == expected.keys()
    assert all(found[key].tobytes() == array.tobytes() for key, array in expected.items())
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True, local_files_only=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    changed = ("_name_or_path", "transformers_version", "architectures", "dtype", "pos_att_type", "classifier_dropout",
               "max_relative_positions", "seq_classif_dropout", "qa_dropout")  # fmt: skip
    mine, its = again.config.to_dict(), model.config.to_dict()
    if "sliding_attention" not in its.get("layer_types", ()):
        changed += ("local_attention", "local_rope_theta")
    for key in set(its) - set(changed):
        assert mine[key] == its[key], key
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
