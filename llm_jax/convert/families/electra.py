"""ELECTRA (arXiv 2003.10555): BERT with narrower embeddings; its discriminator, and its generator."""

from collections.abc import Iterator
from typing import Any

from llm_jax.config import EncoderConfig
from llm_jax.convert.families.bert import bert_rules
from llm_jax.convert.families.encoders import Head, Trunk, dense, norm, read_common, write_common
from llm_jax.convert.families.roberta import text_rules
from llm_jax.convert.keys import Keys
from llm_jax.convert.rules import Rule


def read_electra(keys: Keys) -> dict[str, Any]:
    keys.ignore(*(f"summary_{name}" for name in ("type", "use_proj", "activation", "last_dropout")))
    found = read_common(keys, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    return found | {"embedding_dim": keys.take("embedding_size", 128)}


def write_electra(cfg: EncoderConfig) -> dict[str, Any]:
    return write_common(cfg) | {"embedding_size": cfg.embedding_dim or cfg.embed_dim}


def electra_rules(cfg: EncoderConfig, prefix: str) -> Iterator[Rule]:
    yield from bert_rules(cfg, prefix)
    if cfg.embedding_dim not in (0, cfg.embed_dim):
        yield from dense(f"{prefix}embeddings_project", "embedding_projection")


def masked_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("generator_predictions.dense", "masked/dense")
    yield from norm("generator_predictions.LayerNorm", "masked/dense/norm")
    yield Rule.of("generator_lm_head.bias", "masked/bias")


def replaced_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("discriminator_predictions.dense", "replaced/dense")
    yield from dense("discriminator_predictions.dense_prediction", "replaced/classifier")


TIED = (("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),)
HEADS = (
    Head("ForMaskedLM", "masked", masked_rules, tied=TIED, gelu=True),
    Head("ForPreTraining", "replaced", replaced_rules),
    Head("ForSequenceClassification", "text", text_rules, -1, form="electra"),
    Head("ForTokenClassification", "token", lambda cfg: dense("classifier", "labels/classifier"), -1),
    Head("ForQuestionAnswering", "token", lambda cfg: dense("qa_outputs", "labels/classifier"), 2, dropout=""),
    Head("Model", "embedding"),
)
ELECTRA = Trunk(
    "ELECTRA", "Electra", "electra", "electra.", read_electra, write_electra, electra_rules,
    other_heads=(r"(generator|discriminator)_.*", r"classifier\..*", r"qa_outputs\..*"),
)  # fmt: skip
ELECTRAS = tuple(map(ELECTRA.family, HEADS))
