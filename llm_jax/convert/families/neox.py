"""GPT-NeoX and Pythia: LayerNorm and biases everywhere, part of each head rotates, attention and MLP side by side."""

from collections.abc import Collection, Iterator
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.convert.families.gpt2 import ACTIVATION_NAMES, ACTIVATIONS
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.keys import Keys, rope_of, write_rope
from llm_jax.convert.rules import Chain, Interleaved, Rule, Swapped, linear

OLD_HEAD, HEAD = "embed_out", "lm_head"  # in files; what transformers 5 calls it in memory


def read_neox(keys: Keys) -> dict[str, Any]:
    keys.only("attention_bias", True, default=True, reason="our model has no biases of MLPs and norms alone")
    keys.ignore("classifier_dropout")
    older, newer = keys.take("rope_scaling", None), keys.take("rope_parameters", None)
    name = "rope_parameters" if older is None else "rope_scaling"
    base, share = keys.take("rotary_emb_base", 10_000.0), keys.take("rotary_pct", 0.25)
    dropout = keys.take("hidden_dropout", 0.0)
    return {
        "vocab_size": keys.take("vocab_size"),
        "num_layers": keys.take("num_hidden_layers"),
        "embed_dim": keys.take("hidden_size"),
        "num_heads": keys.take("num_attention_heads"),
        "mlp_dim": keys.take("intermediate_size"),
        "max_length": keys.take("max_position_embeddings", 2048),
        "positions": "rotary",
        "rope": rope_of(keys, name, older or newer or {}, base, share),
        "norm": "layernorm",
        "norm_eps": keys.take("layer_norm_eps", 1e-5),
        "norm_placement": "parallel" if keys.take("use_parallel_residual", True) else "pre",
        "activation": keys.choice("hidden_act", ACTIVATIONS, "gelu"),
        "bias": "all",
        "tie_embeddings": keys.take("tie_word_embeddings", False),
        "init_std": keys.take("initializer_range", 0.02),
        "dropout": {
            "embedding": dropout,
            "attention": keys.take("attention_dropout", 0.0),
            "attention_output": dropout,
            "mlp_output": dropout,
        },
    }


def write_neox(cfg: DecoderConfig) -> dict[str, Any]:
    says, rope = function_of(cfg), write_rope(cfg.rope)
    return {
        "vocab_size": says.vocab_size,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.embed_dim,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": says.mlp_dim,
        "max_position_embeddings": cfg.max_length,
        "rotary_emb_base": cfg.rope.base,
        "rotary_pct": cfg.rope.fraction,
        "rope_scaling": rope["rope_scaling"],
        "layer_norm_eps": cfg.norm_eps,
        "use_parallel_residual": cfg.norm_placement == "parallel",
        "hidden_act": ACTIVATION_NAMES.get(cfg.activation, cfg.activation),
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_std,
        "hidden_dropout": cfg.dropout.mlp_output,
        "attention_dropout": cfg.dropout.attention,
    }


def neox_rules(cfg: DecoderConfig, names: Collection[str]) -> Iterator[Rule]:
    def norm(theirs: str, ours: str) -> Iterator[Rule]:
        yield Rule.of(f"{theirs}.weight", f"{ours}/scale")
        yield Rule.of(f"{theirs}.bias", f"{ours}/bias")

    theirs, ours = "gpt_neox.layers.{layer}", "stack/{layer}"
    yield Rule.of("gpt_neox.embed_in.weight", "embedding/table")
    yield from norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
    projections = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
    fused = f"{theirs}.attention.query_key_value"
    dealt = Chain((Interleaved(-2, cfg.num_heads, 3), Swapped()))
    yield Rule.of(f"{fused}.weight", [f"{name}/kernel" for name in projections], dealt)
    yield Rule.of(f"{fused}.bias", [f"{name}/bias" for name in projections], Interleaved(-1, cfg.num_heads, 3))
    yield from linear(f"{theirs}.attention.dense", f"{ours}/attention/out", bias=True)
    yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm")
    yield from linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}/mlp/up", bias=True)
    yield from linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}/mlp/down", bias=True)
    yield from norm("gpt_neox.final_layer_norm", "final_norm")
    if not cfg.tie_embeddings:
        yield from linear(HEAD if f"{HEAD}.weight" in names else OLD_HEAD, "head", bias=False)


NEOX = Family(
    "GPT-NeoX, Pythia",
    "GPTNeoXForCausalLM",
    "gpt_neox",
    read_neox,
    write_neox,
    neox_rules,
    prefix="gpt_neox.",
    no_parameters=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq"),
    embedding="gpt_neox.embed_in.weight",
    head=f"{OLD_HEAD}.weight",
)
