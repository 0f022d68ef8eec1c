"""DeBERTa-v2 and v3 (arXiv 2006.03654, 2111.09543): disentangled attention with shared projections and log buckets."""

from collections.abc import Iterator
from typing import Any

from llm_jax.config import EncoderConfig
from llm_jax.convert.families.bert import masked_rules, tied
from llm_jax.convert.families.encoders import (
    Head,
    Trunk,
    dense,
    embedding_rules,
    layer_rules,
    norm,
    read_common,
    write_common,
)
from llm_jax.convert.keys import Keys
from llm_jax.convert.rules import Rule


def read_deberta(keys: Keys) -> dict[str, Any]:
    found = read_common(keys, vocab_size=128100, hidden_size=1536, num_hidden_layers=24, num_attention_heads=24,
                        intermediate_size=6144, type_vocab_size=0, layer_norm_eps=1e-7)  # fmt: skip
    for name, needed, default in (
        ("relative_attention", True, False),
        ("position_biased_input", False, True),
        ("share_att_key", True, False),
        ("norm_rel_ebd", "layer_norm", "none"),
        ("conv_kernel_size", 0, 0),
        ("pooler_hidden_act", "gelu", "gelu"),
        ("pooler_dropout", 0, 0),
        ("pooler_hidden_size", found["embed_dim"], found["embed_dim"]),
        ("embedding_size", found["embed_dim"], found["embed_dim"]),
        ("attention_head_size", found["embed_dim"] // found["num_heads"], found["embed_dim"] // found["num_heads"]),
    ):
        keys.only(name, needed, default=default, reason=f"our disentangled attention, as DeBERTa-v3's, has {needed}")
    kinds = keys.take("pos_att_type", None) or []
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    if sorted(kinds) != ["c2p", "p2c"]:
        raise keys.refuse("pos_att_type", kinds, "our disentangled attention has both c2p and p2c")
    buckets, farthest = keys.take("position_buckets", -1), keys.take("max_relative_positions", -1)
    if buckets < 2:
        raise keys.refuse("position_buckets", buckets, "our disentangled attention has logarithmic buckets")
    return found | {
        "positions": "disentangled",
        "relative_buckets": 2 * buckets,
        "relative_max_distance": farthest if farthest > 0 else found["max_length"],
    }


def write_deberta(cfg: EncoderConfig) -> dict[str, Any]:
    return write_common(cfg) | {
        "relative_attention": True,
        "position_biased_input": False,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": "p2c|c2p",
        "position_buckets": cfg.relative_buckets // 2,
        "max_relative_positions": cfg.relative_max_distance,
        "pooler_hidden_act": "gelu",
        "pooler_dropout": 0,
        "pooler_hidden_size": cfg.embed_dim,
    }


def deberta_rules(cfg: EncoderConfig, prefix: str) -> Iterator[Rule]:
    yield from embedding_rules(cfg, prefix)
    yield Rule.of(f"{prefix}encoder.rel_embeddings.weight", "relative/table")
    yield from norm(f"{prefix}encoder.LayerNorm", "relative_norm")
    yield from layer_rules(prefix, ("query_proj", "key_proj", "value_proj"))


def own_masked_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    """DeBERTa's own head, under the names of its authors."""
    yield from dense("lm_predictions.lm_head.dense", "masked/dense")
    yield from norm("lm_predictions.lm_head.LayerNorm", "masked/dense/norm")
    yield Rule.of("lm_predictions.lm_head.bias", "masked/bias")


def text_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("pooler.dense", "labels/pooler")
    yield from dense("classifier", "labels/classifier")


TEXT = dict(form="deberta", dropout="cls_dropout")
HEADS = (
    Head("ForMaskedLM", "masked", masked_rules, tied=tied("deberta.", "cls.predictions"), says={"legacy": True}),
    Head("ForMaskedLM", "masked", own_masked_rules, needs=("lm_predictions.lm_head.bias",), says={"legacy": False}),
    Head("ForSequenceClassification", "text", text_rules, -1, **TEXT),
    Head("ForMultipleChoice", "text", text_rules, 1, **TEXT),
    Head("ForTokenClassification", "token", lambda cfg: dense("classifier", "labels/classifier"), -1,
         dropout="hidden_dropout_prob"),
    Head("ForQuestionAnswering", "token", lambda cfg: dense("qa_outputs", "labels/classifier"), 2, dropout=""),
    Head("Model", "embedding"),
)  # fmt: skip
DEBERTA = Trunk(
    "DeBERTa-v2, v3", "DebertaV2", "deberta-v2", "deberta.", read_deberta, write_deberta, deberta_rules,
    head_keys=("cls_dropout", "legacy"),
    other_heads=(r"cls\..*", r"lm_predictions\..*", r"mask_predictions\..*", r"pooler\..*", r"classifier\..*",
                 r"qa_outputs\..*"),
)  # fmt: skip
DEBERTAS = tuple(map(DEBERTA.family, HEADS))
