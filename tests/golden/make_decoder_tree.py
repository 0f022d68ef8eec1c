"""Writes decoder_tree.json: path, shape, dtype and logical axes of every parameter of some decoders.

The tree is a public contract: checkpoints, converters, freezing and learning-rate patterns rest on it.

    PYTHONPATH=. python tests/golden/make_decoder_tree.py
"""

import json
import pathlib

import jax

from llm_jax.config import DecoderConfig, LatentConfig, MoEConfig
from llm_jax.models import registry
from llm_jax.precision import Precision
from llm_jax.sharding import Layout, path_name

PATH = pathlib.Path(__file__).with_name("decoder_tree.json")

CONFIGS = {
    "gpt2": DecoderConfig(
        vocab_size=50_257, num_layers=12, embed_dim=768, num_heads=12, positions="learned", norm="layernorm",
        activation="gelu_tanh", bias="all",
    ),
    "llama, layers unrolled": DecoderConfig(
        vocab_size=1000, vocab_multiple=128, num_layers=2, embed_dim=64, num_heads=8, num_kv_heads=2, mlp_dim=192,
        tie_embeddings=False, qk_norm="head", scan_layers=False,
    ),
    "relative positions, post-norm": DecoderConfig(
        vocab_size=1000, num_layers=2, embed_dim=64, num_heads=8, positions="relative", norm_placement="post",
        activation="relu", bias="qkv",
    ),
    "sandwich norms, layers of two kinds": DecoderConfig(
        vocab_size=1000, num_layers=5, embed_dim=64, num_heads=8, num_kv_heads=2, mlp_dim=192, norm_scale="zero",
        norm_placement="sandwich", qk_norm="all", bias="attention", sliding_window=8, layer_pattern=("window", "full"),
    ),
    "experts, sinks": DecoderConfig(
        vocab_size=1000, num_layers=2, embed_dim=64, num_heads=8, num_kv_heads=2, mlp_dim=96, bias="all",
        attention_sinks=True, moe=MoEConfig(num_experts=4),
    ),
    "latent attention, all of routing": DecoderConfig(
        vocab_size=1000, num_layers=3, embed_dim=64, num_heads=8, head_dim=8, mlp_dim=96,
        latent=LatentConfig(kv_rank=16, query_rank=24, rope_dim=4, value_dim=6),
        moe=MoEConfig(num_experts=4, expert_dim=32, shared_dim=48, dense_layers=1, router_bias=True, balance_bias=True),
    ),
}  # fmt: skip


def tree(cfg: DecoderConfig) -> dict[str, list]:
    model = registry.build(cfg, Layout(), Precision())
    leaves = jax.tree_util.tree_leaves_with_path(model.shapes())
    axes = jax.tree.leaves(model.axes(), is_leaf=lambda node: isinstance(node, tuple))
    return {
        path_name(path): [list(leaf.shape), leaf.dtype.name, list(names)]
        for (path, leaf), names in zip(leaves, axes, strict=True)
    }


if __name__ == "__main__":
    lines = []
    for name, cfg in CONFIGS.items():
        rows = ",\n".join(f"  {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in tree(cfg).items())
        lines.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {PATH}")
