"""The encoder block of textbooks, built from keras.layers: its weights in ours give its output and gradients."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from tiny import build  # noqa: E402

from llm_jax.config import DropoutConfig, EncoderConfig  # noqa: E402
from llm_jax.models.positions import sinusoid  # noqa: E402

pytestmark = pytest.mark.parity
keras = pytest.importorskip("keras", reason="needs keras (the extra `parity`)")

EMBED_DIM, NUM_HEADS, FF_DIM, RATE, VOCAB, LENGTH = 32, 4, 48, 0.1, 40, 12


@pytest.fixture(autouse=True)
def theirs_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


class Block(keras.layers.Layer):
    """Multi-head attention and a ReLU feed-forward, each with dropout, a residual and a norm behind."""

    def __init__(self, embed_dim, num_heads, ff_dim, rate=0.1):
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(num_heads=num_heads, key_dim=embed_dim // num_heads)
        self.feed_forward = keras.Sequential(
            [keras.layers.Dense(ff_dim, activation="relu"), keras.layers.Dense(embed_dim)]
        )
        self.norms = [keras.layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.dropouts = [keras.layers.Dropout(rate) for _ in range(2)]

    def call(self, x, training=False):
        x = self.norms[0](x + self.dropouts[0](self.attention(x, x), training=training))
        return self.norms[1](x + self.dropouts[1](self.feed_forward(x), training=training))


def as_ours(block):
    """The block's weights as our layer's; theirs are (in, heads, size) and (heads, size, out)."""
    attention, (up, down) = block.attention, block.feed_forward.layers

    def affine(kernel, bias):
        return {"kernel": kernel, "bias": bias}

    def norm(layer):
        return {"scale": np.asarray(layer.gamma), "bias": np.asarray(layer.beta)}

    def heads(dense):
        return affine(np.asarray(dense.kernel).reshape(EMBED_DIM, EMBED_DIM), np.asarray(dense.bias).reshape(-1))

    out = attention.output_dense
    return {
        "attention": {
            "query": heads(attention.query_dense),
            "key": heads(attention.key_dense),
            "value": heads(attention.value_dense),
            "out": affine(np.asarray(out.kernel).reshape(EMBED_DIM, EMBED_DIM), np.asarray(out.bias)),
        },
        "attention_norm": norm(block.norms[0]),
        "mlp": {name: affine(np.asarray(d.kernel), np.asarray(d.bias)) for name, d in (("up", up), ("down", down))},
        "mlp_norm": norm(block.norms[1]),
    }


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_output_and_gradients(positions):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(1)
    block = Block(EMBED_DIM, NUM_HEADS, FF_DIM, RATE)
    tokens = rng.integers(0, VOCAB, (3, LENGTH)).astype(np.int32)
    table, learned = (rng.normal(size=(size, EMBED_DIM)).astype(np.float32) for size in (VOCAB, LENGTH))
    block(table[tokens])  # makes the weights
    for variable in block.trainable_variables:  # norms and biases start as ones and zeros, which would hide a mix-up
        variable.assign(variable + 0.1 * rng.normal(size=variable.shape).astype(np.float32))
    layer = as_ours(block)

    cfg = EncoderConfig(
        vocab_size=VOCAB, num_layers=1, embed_dim=EMBED_DIM, num_heads=NUM_HEADS, mlp_dim=FF_DIM, max_length=LENGTH,
        activation="relu", norm_eps=1e-6, embedding_norm=False, token_types=0, positions=positions, head="embedding",
        dropout=DropoutConfig(attention_output=RATE, mlp_output=RATE),
    )  # fmt: skip
    model = build(cfg)
    params = {"embedding": {"table": table}, "stack": {"blocks": jax.tree.map(lambda x: x[None], layer)}}
    if positions == "learned":
        params["positions"] = {"table": learned}
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())

    cotangent = rng.normal(size=(3, LENGTH, EMBED_DIM)).astype(np.float32)

    def ours(params):
        out = model.apply(params, tokens)
        return (out * cotangent).sum(), out

    added = learned if positions == "learned" else np.asarray(sinusoid(np.arange(LENGTH), EMBED_DIM))

    def theirs(variables, table):
        out, _ = block.stateless_call(variables, block.non_trainable_variables, table[tokens] + added[None])
        return (out * cotangent).sum(), out

    with jax.default_matmul_precision("highest"):
        (_, found), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
        variables = [variable.value for variable in block.trainable_variables]
        (_, expected), wanted = jax.value_and_grad(theirs, (0, 1), has_aux=True)(variables, table)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradient["embedding"]["table"], wanted[1], rtol=0, atol=1e-5 * np.abs(wanted[1]).max())
    for variable, value in zip(block.trainable_variables, wanted[0], strict=True):
        variable.assign(value)
    for a, b in zip(jax.tree.leaves(gradient["stack"]["blocks"]), jax.tree.leaves(as_ours(block)), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1))
