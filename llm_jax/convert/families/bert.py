"""BERT (arXiv 1810.04805), with the heads of transformers."""

from collections.abc import Iterator
from typing import Any

from llm_jax.config import EncoderConfig
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

UNUSED = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")


def read_bert(keys: Keys) -> dict[str, Any]:
    keys.ignore("directionality", *(f"pooler_{name}" for name in UNUSED))  # of TensorFlow's first checkpoints
    return read_common(keys)


def bert_rules(cfg: EncoderConfig, prefix: str) -> Iterator[Rule]:
    yield from embedding_rules(cfg, prefix)
    yield from layer_rules(prefix)


def masked_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    theirs = "cls.predictions"
    yield from dense(f"{theirs}.transform.dense", "masked/dense")
    yield from norm(f"{theirs}.transform.LayerNorm", "masked/dense/norm")
    yield Rule.of(f"{theirs}.bias", "masked/bias")


def pairs_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from masked_rules(cfg)
    yield from dense("bert.pooler.dense", "pairs/pooler")
    yield from dense("cls.seq_relationship", "pairs/classifier")


def text_rules(cfg: EncoderConfig) -> Iterator[Rule]:
    yield from dense("bert.pooler.dense", "labels/pooler")
    yield from dense("classifier", "labels/classifier")


def tied(prefix: str, head: str) -> tuple[tuple[str, str], ...]:
    """What transformers 4 stores twice."""
    return (
        (f"{head}.decoder.weight", f"{prefix}embeddings.word_embeddings.weight"),
        (f"{head}.decoder.bias", f"{head}.bias"),
    )


TIED = tied("bert.", "cls.predictions")
HEADS = (
    Head("ForMaskedLM", "masked", masked_rules, tied=TIED),
    Head("ForPreTraining", "masked_pairs", pairs_rules, tied=TIED),
    # BERT's own checkpoints, which call themselves so and have the other head too.
    Head("ForMaskedLM", "masked_pairs", pairs_rules, tied=TIED, needs=("cls.seq_relationship.weight",)),
    Head("ForSequenceClassification", "text", text_rules, -1),
    Head("ForMultipleChoice", "text", text_rules, 1),
    Head("ForTokenClassification", "token", lambda cfg: dense("classifier", "labels/classifier"), -1),
    Head("ForQuestionAnswering", "token", lambda cfg: dense("qa_outputs", "labels/classifier"), 2, dropout=""),
    Head("Model", "embedding"),
    Head("Model", "pooled", lambda cfg: dense("pooler.dense", "labels/pooler"), needs=("pooler.dense.weight",)),
)
BERT = Trunk(
    "BERT, MiniLM", "Bert", "bert", "bert.", read_bert, write_common, bert_rules,
    other_heads=(r"cls\..*", r"(bert\.)?pooler\..*", r"classifier\..*", r"qa_outputs\..*"),
)  # fmt: skip
BERTS = tuple(map(BERT.family, HEADS))
