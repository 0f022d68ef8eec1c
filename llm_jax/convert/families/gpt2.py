"""GPT-2: learned positions, LayerNorm, biases everywhere; its Conv1D holds kernels (in, out), as we do."""

from collections.abc import Collection, Iterator
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.keys import Keys
from llm_jax.convert.rules import Cut, Rule, linear

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ACTIVATION_NAMES = {"gelu_tanh": "gelu_new"}


def read_gpt2(keys: Keys) -> dict[str, Any]:
    keys.only("scale_attn_weights", True, default=True, reason="our scores are divided by sqrt(head_dim)")
    keys.only("scale_attn_by_inverse_layer_idx", False, default=False, reason="our layers all scale scores alike")
    keys.ignore("n_ctx", "reorder_and_upcast_attn")  # n_positions says it; the order of a product's factors
    keys.ignore(*(f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    residual = keys.take("resid_pdrop", 0.1)
    return {
        "vocab_size": keys.take("vocab_size", 50257),
        "num_layers": keys.take("n_layer", 12),
        "embed_dim": keys.take("n_embd", 768),
        "num_heads": keys.take("n_head", 12),
        "mlp_dim": keys.take("n_inner", None) or 0,
        "max_length": keys.take("n_positions", 1024),
        "positions": "learned",
        "norm": "layernorm",
        "norm_eps": keys.take("layer_norm_epsilon", 1e-5),
        "activation": keys.choice("activation_function", ACTIVATIONS, "gelu_new"),
        "bias": "all",
        "tie_embeddings": keys.take("tie_word_embeddings", True),
        "init_std": keys.take("initializer_range", 0.02),
        "dropout": {
            "embedding": keys.take("embd_pdrop", 0.1),
            "attention": keys.take("attn_pdrop", 0.1),
            "attention_output": residual,
            "mlp_output": residual,
        },
    }


def write_gpt2(cfg: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": function_of(cfg).vocab_size,
        "n_layer": cfg.num_layers,
        "n_embd": cfg.embed_dim,
        "n_head": cfg.num_heads,
        "n_inner": cfg.mlp_dim or None,
        "n_positions": cfg.max_length,
        "n_ctx": cfg.max_length,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": ACTIVATION_NAMES.get(cfg.activation, cfg.activation),
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "embd_pdrop": cfg.dropout.embedding,
        "attn_pdrop": cfg.dropout.attention,
        "resid_pdrop": cfg.dropout.mlp_output,
    }


def gpt2_rules(cfg: DecoderConfig, names: Collection[str]) -> Iterator[Rule]:
    def affine(theirs: str, ours: str, weight: str = "kernel") -> Iterator[Rule]:
        yield Rule.of(f"{theirs}.weight", f"{ours}/{weight}")
        yield Rule.of(f"{theirs}.bias", f"{ours}/bias")

    theirs, ours = "transformer.h.{layer}", "stack/{layer}"
    yield Rule.of("transformer.wte.weight", "embedding/table")
    yield Rule.of("transformer.wpe.weight", "positions/table")
    yield from affine(f"{theirs}.ln_1", f"{ours}/attention_norm", "scale")
    projections = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
    thirds = Cut(-1, (cfg.num_heads * function_of(cfg).head_dim,) * 3)
    yield Rule.of(f"{theirs}.attn.c_attn.weight", [f"{name}/kernel" for name in projections], thirds)
    yield Rule.of(f"{theirs}.attn.c_attn.bias", [f"{name}/bias" for name in projections], thirds)
    yield from affine(f"{theirs}.attn.c_proj", f"{ours}/attention/out")
    yield from affine(f"{theirs}.ln_2", f"{ours}/mlp_norm", "scale")
    yield from affine(f"{theirs}.mlp.c_fc", f"{ours}/mlp/up")
    yield from affine(f"{theirs}.mlp.c_proj", f"{ours}/mlp/down")
    yield from affine("transformer.ln_f", "final_norm", "scale")
    if not cfg.tie_embeddings:
        yield from linear("lm_head", "head", bias=False)


GPT2 = Family(
    "GPT-2",
    "GPT2LMHeadModel",
    "gpt2",
    read_gpt2,
    write_gpt2,
    gpt2_rules,
    prefix="transformer.",
    no_parameters=(r".*\.attn\.(masked_)?bias",),  # the causal mask
    embedding="transformer.wte.weight",
)
