"""Tiny checkpoints of every encoder as the hub has them, made without torch, as tests/hub_models.py makes decoders."""

import json
import pathlib

import hub_models
import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("golden")
MODELS, OUTPUTS = GOLDEN / "encoder_models.json", GOLDEN / "encoder_outputs.npz"
ROWS, LENGTH, VOCAB = 2, 16, 61
PAD = 1

BERT = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=24, pad_token_id=PAD,
)  # fmt: skip
ROBERTA = BERT | dict(type_vocab_size=1)
DISTILBERT = dict(
    vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=24, pad_token_id=PAD,
)  # fmt: skip
ELECTRA = BERT | dict(embedding_size=20)
DEBERTA = BERT | dict(
    relative_attention=True, position_buckets=4, share_att_key=True, pos_att_type="p2c|c2p", norm_rel_ebd="layer_norm",
    position_biased_input=False, type_vocab_size=0, max_relative_positions=-1, layer_norm_eps=1e-7,
)  # fmt: skip
MODERNBERT = BERT | dict(
    num_hidden_layers=7, local_attention=6, global_attn_every_n_layers=3, cls_token_id=2, sep_token_id=3,
    bos_token_id=2, eos_token_id=3,
)  # fmt: skip

CASES = {  # name: (transformers' model, the values of its config)
    "BertForPreTraining": ("Bert", "ForPreTraining", BERT),
    "BertForMaskedLM": ("Bert", "ForMaskedLM", BERT | dict(hidden_act="gelu_new")),
    "BertForSequenceClassification": ("Bert", "ForSequenceClassification", BERT | dict(num_labels=3)),
    "BertForMultipleChoice": ("Bert", "ForMultipleChoice", BERT),
    "BertForTokenClassification": (
        "Bert", "ForTokenClassification", BERT | dict(num_labels=5, classifier_dropout=0.2, type_vocab_size=1),
    ),
    "BertForQuestionAnswering": ("Bert", "ForQuestionAnswering", BERT | dict(hidden_act="relu")),
    "BertModel": ("Bert", "Model", BERT),
    "RobertaForMaskedLM": ("Roberta", "ForMaskedLM", ROBERTA),
    "RobertaForSequenceClassification": ("Roberta", "ForSequenceClassification", ROBERTA | dict(num_labels=1)),
    "RobertaForMultipleChoice": ("Roberta", "ForMultipleChoice", ROBERTA),
    "RobertaForTokenClassification": ("Roberta", "ForTokenClassification", ROBERTA),
    "RobertaForQuestionAnswering": ("Roberta", "ForQuestionAnswering", ROBERTA),
    "XLMRobertaModel": ("XLMRoberta", "Model", ROBERTA),
    "DistilBertForMaskedLM": ("DistilBert", "ForMaskedLM", DISTILBERT),
    "DistilBertForSequenceClassification": ("DistilBert", "ForSequenceClassification", DISTILBERT),
    "DistilBertForTokenClassification": ("DistilBert", "ForTokenClassification", DISTILBERT | dict(num_labels=4)),
    "DistilBertForQuestionAnswering": ("DistilBert", "ForQuestionAnswering", DISTILBERT),
    "DistilBertModel": ("DistilBert", "Model", DISTILBERT),
    "ElectraForPreTraining": ("Electra", "ForPreTraining", ELECTRA),
    "ElectraForMaskedLM": ("Electra", "ForMaskedLM", ELECTRA),
    "ElectraForSequenceClassification": ("Electra", "ForSequenceClassification", ELECTRA),
    "ElectraForTokenClassification": ("Electra", "ForTokenClassification", ELECTRA | dict(embedding_size=32)),
    "ElectraForQuestionAnswering": ("Electra", "ForQuestionAnswering", ELECTRA),
    "ElectraModel": ("Electra", "Model", ELECTRA),
    "DebertaV2ForMaskedLM": ("DebertaV2", "ForMaskedLM", DEBERTA),
    "DebertaV2ForMaskedLM, its own head": ("DebertaV2", "ForMaskedLM", DEBERTA | dict(legacy=False)),
    "DebertaV2ForSequenceClassification": ("DebertaV2", "ForSequenceClassification", DEBERTA | dict(num_labels=3)),
    "DebertaV2ForTokenClassification": ("DebertaV2", "ForTokenClassification", DEBERTA | dict(type_vocab_size=2)),
    "DebertaV2ForQuestionAnswering": ("DebertaV2", "ForQuestionAnswering", DEBERTA | dict(max_relative_positions=14)),
    "DebertaV2Model": ("DebertaV2", "Model", DEBERTA),
    "ModernBertForMaskedLM": ("ModernBert", "ForMaskedLM", MODERNBERT),
    "ModernBertForSequenceClassification": ("ModernBert", "ForSequenceClassification", MODERNBERT),
    "ModernBertForSequenceClassification by the mean": (
        "ModernBert", "ForSequenceClassification", MODERNBERT | dict(classifier_pooling="mean", num_labels=3),
    ),
    "ModernBertForTokenClassification": (
        "ModernBert", "ForTokenClassification", MODERNBERT | dict(num_hidden_layers=4, num_labels=4),
    ),
    "ModernBertForQuestionAnswering": (
        "ModernBert", "ForQuestionAnswering", MODERNBERT | dict(num_hidden_layers=1),
    ),
    "ModernBertModel": ("ModernBert", "Model", MODERNBERT),
}  # fmt: skip


def tokens(rows: int = ROWS, length: int = LENGTH, seed: int = 3) -> np.ndarray:
    """Without padding, which RoBERTa counts no positions for."""
    found = np.random.RandomState(seed).randint(0, VOCAB, (rows, length)).astype(np.int32)
    return np.where(found == PAD, PAD + 1, found)


def stored(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and tensors of a case."""
    entry = json.loads(MODELS.read_text())[name]
    return entry["config"], hub_models.weights(entry["tensors"])


def checkpoint(folder: pathlib.Path, name: str, **options) -> pathlib.Path:
    config, arrays = stored(name)
    return hub_models.write(folder, config, arrays, **options)


def architecture(name: str) -> str:
    kind, form, _ = CASES[name]
    return kind + form
