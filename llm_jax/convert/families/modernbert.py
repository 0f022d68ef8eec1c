"""ModernBERT (arXiv 2412.13663): norms before, rotary positions of two bases, windows in two layers of three, GeGLU."""

from collections.abc import Iterator
from typing import Any

from llm_jax.config import EncoderConfig
from llm_jax.config.kinds import layer_words
from llm_jax.convert.families.encoders import Head, Trunk, check_encoder_keys, dense, norm
from llm_jax.convert.family import function_of
from llm_jax.convert.keys import Keys, rope_of
from llm_jax.convert.rules import Rule, fused_linear, linear
from llm_jax.convert.windows import TYPES, read_words, window_keys

USUAL_WINDOW = 128
BASES = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}


def read_modernbert(keys: Keys) -> dict[str, Any]:
    check_encoder_keys(keys)
    for name, needed in (
        ("hidden_activation", "gelu"),
        ("classifier_activation", "gelu"),
        ("norm_bias", False),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("classifier_bias", False),
        ("decoder_bias", True),
        ("mlp_dropout", 0.0),
    ):
        keys.only(name, needed, default=needed, reason=f"our encoder of this form has {needed}")
    keys.ignore("initializer_cutoff_factor", "deterministic_flash_attn", "sparse_prediction", "reference_compile",
                "sparse_pred_ignore_index", "cls_token_id", "repad_logits_with_grad")  # fmt: skip
    layers, every = keys.take("num_hidden_layers", 22), keys.take("global_attn_every_n_layers", 3)
    default = ["sliding_attention" if layer % every else "full_attention" for layer in range(layers)]
    window = keys.take("local_attention", USUAL_WINDOW)
    ropes = {kind: _read_rope(keys, kind) for kind in BASES}
    local = ropes["sliding_attention"]
    if local["fraction"] != 1 or "scaling" in local:
        raise keys.refuse("rope_parameters", local, "our windowed layers rotate unscaled")
    attention = keys.take("attention_dropout", 0.0)
    return {
        "family": "encoder",
        "vocab_size": keys.take("vocab_size", 50368),
        "num_layers": layers,
        "embed_dim": keys.take("hidden_size", 768),
        "num_heads": keys.take("num_attention_heads", 12),
        "mlp_dim": keys.take("intermediate_size", 1152),
        "max_length": keys.take("max_position_embeddings", 8192),
        "token_types": 0,
        "positions": "rotary",
        "rope": ropes["full_attention"],
        "window_rope_base": local["base"] if window and "sliding_attention" in default else 0.0,
        "norm_eps": keys.take("norm_eps", 1e-5),
        "norm_placement": "pre",
        "activation": "geglu_erf",
        "bias": "none",
        "residual_init_scale": True,
        "init_std": keys.take("initializer_range", 0.02),
        "dropout": {
            "embedding": keys.take("embedding_dropout", 0.0),
            "attention": attention,
            "attention_output": attention,
        },
    } | window_keys(read_words(keys, layers, window, default), window)


def _read_rope(keys: Keys, kind: str) -> dict[str, Any]:
    """`model.rope` of the layers of one kind: transformers 4 gives each a key, 5 a group."""
    name, usual = BASES[kind]
    groups = keys.take("rope_parameters", None) or {}
    keys.only("rope_scaling", None, default=None, reason="rope_parameters says it layer by layer")
    return rope_of(keys, "rope_parameters", groups.get(kind) or {}, keys.take(name, usual), 1.0)


def write_modernbert(cfg: EncoderConfig) -> dict[str, Any]:
    says, bases = function_of(cfg), {kind: usual for kind, (_, usual) in BASES.items()}
    bases["full_attention"] = cfg.rope.base
    if "window" in layer_words(cfg):  # without one, our config has no base for such layers
        bases["sliding_attention"] = cfg.window_rope_base or cfg.rope.base
    return {
        "vocab_size": says.vocab_size,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.embed_dim,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": says.mlp_dim,
        "max_position_embeddings": cfg.max_length,
        "norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "embedding_dropout": cfg.dropout.embedding,
        "attention_dropout": cfg.dropout.attention,
        "local_attention": cfg.sliding_window or USUAL_WINDOW,
        "layer_types": [TYPES[word] for word in layer_words(cfg)],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": bases[kind]} for kind in BASES},
        **{BASES[kind][0]: bases[kind] for kind in BASES},
    }


def modernbert_rules(cfg: EncoderConfig, prefix: str) -> Iterator[Rule]:
    theirs, ours, says = f"{prefix}layers.{{layer}}", "stack/{layer}", function_of(cfg)
    yield Rule.of(f"{prefix}embeddings.tok_embeddings.weight", "embedding/table")
    yield from norm(f"{prefix}embeddings.norm", "embedding_norm", bias=False)
    if cfg.num_layers > 1:  # the first has none
        yield from norm(f"{theirs}.attn_norm", f"{ours}/attention_norm", bias=False)
    projections = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
    yield from fused_linear(f"{theirs}.attn.Wqkv", projections, (cfg.embed_dim,) * 3, bias=False)
    yield from linear(f"{theirs}.attn.Wo", f"{ours}/attention/out", bias=False)
    yield from norm(f"{theirs}.mlp_norm", f"{ours}/mlp_norm", bias=False)
    halves = [f"{ours}/mlp/{name}" for name in ("gate", "up")]
    yield from fused_linear(f"{theirs}.mlp.Wi", halves, (says.mlp_dim,) * 2, bias=False)
    yield from linear(f"{theirs}.mlp.Wo", f"{ours}/mlp/down", bias=False)
    yield from norm(f"{prefix}final_norm", "final_norm", bias=False)


def masked_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("head.dense", "masked/dense", bias=False)
    yield from norm("head.norm", "masked/dense/norm", bias=False)
    yield Rule.of("decoder.bias", "masked/bias")


def label_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("head.dense", "labels/pooler", bias=False)
    yield from norm("head.norm", "labels/pooler/norm", bias=False)
    yield from dense("classifier", "labels/classifier")


TIED = (("decoder.weight", "model.embeddings.tok_embeddings.weight"),)
HEADS = (
    Head("ForMaskedLM", "masked", masked_rules, tied=TIED),
    Head("ForSequenceClassification", "text", label_rules, -1, form="modernbert", pooling=True),
    Head("ForMultipleChoice", "text", label_rules, 1, form="modernbert", pooling=True),
    Head("ForTokenClassification", "token", label_rules, -1, form="modernbert"),
    Head("ForQuestionAnswering", "token", label_rules, 2, form="modernbert"),
    Head("Model", "embedding"),
)
MODERNBERT = Trunk(
    "ModernBERT", "ModernBert", "modernbert", "model.", read_modernbert, write_modernbert, modernbert_rules,
    hidden_dropout="classifier_dropout", head_keys=("classifier_pooling", "classifier_dropout"),
    other_heads=(r"head\..*", r"decoder\..*", r"classifier\..*"),
)  # fmt: skip
MODERNBERTS = tuple(map(MODERNBERT.family, HEADS))
