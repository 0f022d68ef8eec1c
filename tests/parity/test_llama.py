"""Our decoder as LLaMA, Mistral and Qwen against transformers in torch: logits and gradients."""

import functools

import jax
import numpy as np
import pytest
from from_torch import llama
from tiny import assert_close, build

from llm_jax.config import DecoderConfig, RopeConfig
from llm_jax.objectives.language import LanguageObjective
from llm_jax.sharding import Layout
from llm_jax.training import step

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs torch (the extra `parity`)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `parity`)")

LENGTH = 48
OURS = dict(
    vocab_size=61, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, max_length=LENGTH,
    norm_eps=1e-6, tie_embeddings=False,
)  # fmt: skip
THEIRS = dict(
    vocab_size=61, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=LENGTH, rms_norm_eps=1e-6, tie_word_embeddings=False,
    attn_implementation="eager", pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip

CASES = {  # name: (transformers' class, what it adds to THEIRS, what ours adds to OURS)
    "LLaMA": ("Llama", {}, {}),
    "LLaMA 3": (
        "Llama",
        dict(
            rope_parameters=dict(
                rope_type="llama3", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=12,
                low_freq_factor=1.0, high_freq_factor=4.0,
            )
        ),
        dict(rope=RopeConfig(base=5000.0, scaling="llama3", factor=4.0, original_length=12)),
    ),
    "LLaMA with YaRN": (
        "Llama",
        dict(
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=12, beta_fast=2.0,
                beta_slow=0.5,
            )
        ),
        dict(rope=RopeConfig(scaling="yarn", factor=4.0, original_length=12, beta_fast=2.0, beta_slow=0.5)),
    ),
    "Mistral": ("Mistral", dict(sliding_window=5), dict(sliding_window=5)),
    "Qwen 2": ("Qwen2", {}, dict(bias="qkv")),
    "Qwen 3": ("Qwen3", dict(head_dim=16), dict(qk_norm="head", head_dim=16)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name):
    family, theirs, ours = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**THEIRS, **theirs)
    reference = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mix-up
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    params = llama({key: value.numpy() for key, value in reference.state_dict().items()}, 2)
    model = build(DecoderConfig(**OURS, **ours))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())

    draw = np.random.RandomState(0)
    tokens, targets = draw.randint(0, 61, (2, 2, LENGTH)).astype(np.int32)
    logits = reference(torch.from_numpy(tokens).long()).logits
    np.testing.assert_allclose(jax.jit(model.apply)(params, tokens), logits.detach().numpy(), rtol=0, atol=1e-4)

    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten()).backward()
    batch = {
        "tokens": tokens,
        "targets": targets,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "loss_weights": np.ones(tokens.shape, np.float32),
    }
    gradient = functools.partial(step.gradients, model, LanguageObjective(), layout=Layout(), seed=0, step=0)
    gradients, _, _ = jax.jit(gradient)(params, batch)
    expected = llama({key: value.grad.numpy() for key, value in reference.named_parameters()}, 2)
    assert_close(jax.tree.map(np.asarray, gradients), expected, atol=1e-3)
