"""A model computed layer by layer, its parameters read and dropped: the same logits as the whole one's."""

import hub_models
import jax
import numpy as np
import pytest
from test_convert import put_reference
from tiny import build, decoder, numbers, quick_compiler

from llm_jax.config import Config, EncoderConfig
from llm_jax.convert import reference
from llm_jax.errors import ConversionMismatch, UserError
from llm_jax.models import lora
from llm_jax.training import arrays, convert, convert_check, streamed_check


@pytest.fixture(autouse=True)
def quick():
    with quick_compiler():
        yield


@pytest.mark.parametrize(
    "name",
    ["LLaMA 3.1, tied"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("GPT-2", "Mistral with a window", "Mixtral")],
)
def test_the_streamed_check_ends_as_the_whole_one(name, tmp_path, capsys):
    source = hub_models.checkpoint(tmp_path / "source", name)
    put_reference(source, name)
    for way in (True, False):
        given = dict(overrides=[f"model.scan_layers={way}"], streamed=True)
        convert.from_hub(str(source), str(tmp_path / f"run{way}"), **given)
    assert capsys.readouterr().out.count("checked: ") == 2
    put_reference(source, "LLaMA 2")
    with pytest.raises(ConversionMismatch):
        convert.from_hub(str(source), str(tmp_path / "other"), streamed=True)


KINDS = {
    "adapters": dict(lora=dict(rank=2)),
    "a pattern of windows": dict(num_layers=3, layer_pattern=("window", "full"), sliding_window=3),
    "dense layers first": dict(num_layers=3, moe=dict(num_experts=4, dense_layers=1)),
    "relative positions, untied": dict(positions="relative", tie_embeddings=False),
}


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_layer_by_layer(kind, scan):
    model = build(decoder(**KINDS[kind], scan_layers=scan))
    params, tokens = numbers(model), np.random.default_rng(0).integers(0, 30, (2, 9))
    leaves, alive = arrays.by_path(params), []

    def read(path, index):
        alive.append((path, index))
        return leaves[path][index]

    places = np.array([0, 8])
    theirs = reference.Reference(tokens.astype(np.int32), places, np.zeros((2, 2, 30), np.float32), "here")
    found = streamed_check.logits(Config(model=model.cfg), read, theirs)
    expected = np.asarray(jax.jit(model.apply)(params, tokens))[:, places]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    once = [item for item in alive if item[0] != "embedding/table"]
    assert len(set(once)) == len(once)
    assert lora.layers(leaves) == ({path.rpartition("/")[0] for path in leaves if "lora" in path})


def test_it_is_taken_where_parameters_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(streamed_check, "available_memory", lambda: 1000)
    assert streamed_check.is_needed(Config(), 126) and not streamed_check.is_needed(Config(), 125)
    monkeypatch.setattr(streamed_check, "available_memory", lambda: None)
    assert not streamed_check.is_needed(Config(), 10**12)


def test_an_encoder_is_compared_whole():
    cfg = Config(model=EncoderConfig())
    assert not convert_check.streams(cfg, 10**15, None)
    with pytest.raises(UserError, match="--check=streamed: only decoders"):
        convert_check.streams(cfg, 10, True)
