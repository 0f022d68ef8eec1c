"""DistilBERT (arXiv 1910.01108): BERT without token types and pooler."""

from collections.abc import Iterator
from typing import Any

from llm_jax.config import EncoderConfig
from llm_jax.convert.families.encoders import (
    Head,
    Trunk,
    activation_name,
    check_encoder_keys,
    dense,
    embedding_rules,
    norm,
)
from llm_jax.convert.families.gpt2 import ACTIVATIONS
from llm_jax.convert.family import function_of
from llm_jax.convert.keys import Keys
from llm_jax.convert.rules import Rule, linear


def read_distilbert(keys: Keys) -> dict[str, Any]:
    check_encoder_keys(keys)
    keys.ignore("sinusoidal_pos_embds")  # what the table of positions starts from
    hidden = keys.take("dropout", 0.1)
    return {
        "family": "encoder",
        "vocab_size": keys.take("vocab_size", 30522),
        "num_layers": keys.take("n_layers", 6),
        "embed_dim": keys.take("dim", 768),
        "num_heads": keys.take("n_heads", 12),
        "mlp_dim": keys.take("hidden_dim", 3072),
        "max_length": keys.take("max_position_embeddings", 512),
        "token_types": 0,
        "activation": keys.choice("activation", ACTIVATIONS, "gelu"),
        "init_std": keys.take("initializer_range", 0.02),
        "dropout": {
            "embedding": hidden,
            "attention": keys.take("attention_dropout", 0.1),
            "attention_output": 0.0,
            "mlp_output": hidden,
        },
    }


def write_distilbert(cfg: EncoderConfig) -> dict[str, Any]:
    says = function_of(cfg)
    return {
        "vocab_size": says.vocab_size,
        "n_layers": cfg.num_layers,
        "dim": cfg.embed_dim,
        "n_heads": cfg.num_heads,
        "hidden_dim": says.mlp_dim,
        "max_position_embeddings": cfg.max_length,
        "activation": activation_name(cfg),
        "initializer_range": cfg.init_std,
        "dropout": cfg.dropout.mlp_output,
        "attention_dropout": cfg.dropout.attention,
    }


def distilbert_rules(cfg: EncoderConfig, prefix: str) -> Iterator[Rule]:
    theirs, ours = f"{prefix}transformer.layer.{{layer}}", "stack/{layer}"
    yield from embedding_rules(cfg, prefix)
    for name, mine in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        yield from linear(f"{theirs}.attention.{name}_lin", f"{ours}/attention/{mine}", bias=True)
    yield from norm(f"{theirs}.sa_layer_norm", f"{ours}/attention_norm")
    yield from linear(f"{theirs}.ffn.lin1", f"{ours}/mlp/up", bias=True)
    yield from linear(f"{theirs}.ffn.lin2", f"{ours}/mlp/down", bias=True)
    yield from norm(f"{theirs}.output_layer_norm", f"{ours}/mlp_norm")


def masked_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("vocab_transform", "masked/dense")
    yield from norm("vocab_layer_norm", "masked/dense/norm")
    yield Rule.of("vocab_projector.bias", "masked/bias")


def text_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("pre_classifier", "labels/pooler")
    yield from dense("classifier", "labels/classifier")


TIED = (("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),)
TEXT = dict(form="distilbert", dropout="seq_classif_dropout", usual_dropout=0.2)
HEADS = (
    Head("ForMaskedLM", "masked", masked_rules, tied=TIED),
    Head("ForSequenceClassification", "text", text_rules, -1, **TEXT),
    Head("ForMultipleChoice", "text", text_rules, 1, **TEXT),
    Head("ForTokenClassification", "token", lambda cfg: dense("classifier", "labels/classifier"), -1,
         dropout="dropout"),
    Head("ForQuestionAnswering", "token", lambda cfg: dense("qa_outputs", "labels/classifier"), 2,
         dropout="qa_dropout"),
    Head("Model", "embedding"),
)  # fmt: skip
DISTILBERT = Trunk(
    "DistilBERT", "DistilBert", "distilbert", "distilbert.", read_distilbert, write_distilbert, distilbert_rules,
    head_keys=("seq_classif_dropout", "qa_dropout"),
    other_heads=(r"vocab_.*", r"pre_classifier\..*", r"classifier\..*", r"qa_outputs\..*"),
)  # fmt: skip
DISTILBERTS = tuple(map(DISTILBERT.family, HEADS))
