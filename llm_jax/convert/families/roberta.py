"""RoBERTa (arXiv 1907.11692) and XLM-RoBERTa: BERT whose positions begin behind the padding's id."""

from collections.abc import Iterator
from typing import Any

from llm_jax.config import EncoderConfig
from llm_jax.convert.families.bert import bert_rules, tied
from llm_jax.convert.families.encoders import Head, Trunk, dense, norm, read_common, write_common
from llm_jax.convert.keys import Keys
from llm_jax.convert.rules import Rule


def read_roberta(keys: Keys) -> dict[str, Any]:
    found = read_common(keys, vocab_size=50265)
    pad = keys.take("pad_token_id", 1)
    if pad is None or not 0 <= pad < found["max_length"] - 1:
        raise keys.refuse("pad_token_id", pad, "positions begin behind it, and it leaves none")
    return found | {"first_position": pad + 1, "max_length": found["max_length"] - pad - 1}


def write_roberta(cfg: EncoderConfig) -> dict[str, Any]:
    first = cfg.first_position
    return write_common(cfg) | {"max_position_embeddings": first + cfg.max_length, "pad_token_id": first - 1}


def masked_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("lm_head.dense", "masked/dense")
    yield from norm("lm_head.layer_norm", "masked/dense/norm")
    yield Rule.of("lm_head.bias", "masked/bias")


def text_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("classifier.dense", "labels/pooler")
    yield from dense("classifier.out_proj", "labels/classifier")


def choice_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("roberta.pooler.dense", "labels/pooler")
    yield from dense("classifier", "labels/classifier")


HEADS = (
    Head("ForMaskedLM", "masked", masked_rules, tied=tied("roberta.", "lm_head"), gelu=True),
    Head("ForSequenceClassification", "text", text_rules, -1, form="roberta"),
    Head("ForMultipleChoice", "text", choice_rules, 1),
    Head("ForTokenClassification", "token", lambda cfg: dense("classifier", "labels/classifier"), -1),
    Head("ForQuestionAnswering", "token", lambda cfg: dense("qa_outputs", "labels/classifier"), 2, dropout=""),
    Head("Model", "embedding"),
    Head("Model", "pooled", lambda cfg: dense("pooler.dense", "labels/pooler"), needs=("pooler.dense.weight",)),
)
OTHERS = (r"lm_head\..*", r"(roberta\.)?pooler\..*", r"classifier\..*", r"qa_outputs\..*")
ROBERTAS = tuple(
    Trunk(title, name, model_type, "roberta.", read_roberta, write_roberta, bert_rules, other_heads=OTHERS).family(head)
    for title, name, model_type in (("RoBERTa", "Roberta", "roberta"), ("XLM-RoBERTa", "XLMRoberta", "xlm-roberta"))
    for head in HEADS
)
