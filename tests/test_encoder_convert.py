"""Conversion of every encoder, both ways, against what transformers computed for the same tiny models."""

import json
import re

import hub_encoders
import hub_models
import numpy as np
import pytest
from tiny import quick_compiler

from llm_jax.convert import reference, torch_reference
from llm_jax.errors import Unproven
from llm_jax.training import convert, restore, run_folder


@pytest.fixture(autouse=True)
def quick():
    with quick_compiler():
        yield


def put_reference(folder, name):
    outputs = np.load(hub_encoders.OUTPUTS)[name]
    positions = np.arange(hub_encoders.LENGTH, dtype=np.int32)
    torch_reference.write(folder / reference.STORED, hub_encoders.tokens(), positions, outputs)


def export(run, folder, **options):
    with pytest.raises(Unproven):
        convert.to_hub(str(run), str(folder), check=False, **options)
    return hub_models.read(folder)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


QUICKLY = ("BertForPreTraining", "DebertaV2ForMaskedLM")
SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in hub_encoders.CASES if name not in QUICKLY]


@pytest.mark.parametrize("name", [*QUICKLY, *SLOWLY])
def test_outputs_are_those_of_the_source_and_the_way_back_keeps_every_bit(name, tmp_path, capsys):
    source = hub_encoders.checkpoint(tmp_path / "source", name)
    put_reference(source, name)
    convert.from_hub(str(source), str(tmp_path / "run"))
    assert "checked: largest difference" in capsys.readouterr().out
    back = export(tmp_path / "run", tmp_path / "back")
    assert_same_bits(back, hub_encoders.stored(name)[1])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == hub_encoders.stored(name)[0]["architectures"]


def test_names_of_labels_come_along_and_go_back(tmp_path):
    config, arrays = hub_encoders.stored("BertForSequenceClassification")
    named = {"0": "good", "1": "bad", "2": "ugly"}
    config = config | {"id2label": named, "label2id": {name: int(i) for i, name in named.items()}}
    hub_models.write(tmp_path / "source", config, arrays)
    with pytest.raises(Unproven):
        convert.from_hub(str(tmp_path / "source"), str(tmp_path / "run"), check=False)
    assert run_folder.read_labels(tmp_path / "run") == ("good", "bad", "ugly")
    export(tmp_path / "run", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["id2label"] == named and back["label2id"] == {"good": 0, "bad": 1, "ugly": 2}


def test_norms_under_their_old_names_are_read(tmp_path):
    """As bert-base-uncased has them, from TensorFlow: gamma and beta."""
    config, arrays = hub_encoders.stored("BertForPreTraining")
    old = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)): array
           for name, array in arrays.items()}  # fmt: skip
    assert sum(name.endswith(".gamma") for name in old) == 6
    source = hub_models.write(tmp_path / "source", config, old)
    put_reference(source, "BertForPreTraining")
    convert.from_hub(str(source), str(tmp_path / "run"))  # which compares the logits
    assert_same_bits(export(tmp_path / "run", tmp_path / "back"), arrays)


@pytest.mark.parametrize("labels, problem, task", [(1, None, "regression"), (3, None, "classification"),
                                                  (3, "multi_label_classification", "multilabel")])  # fmt: skip
def test_what_labels_a_classifier_gives_is_kept(labels, problem, task, tmp_path):
    config, arrays = hub_encoders.stored("RobertaForSequenceClassification")
    names = {str(i): f"LABEL_{i}" for i in range(labels)}
    shape = arrays["classifier.out_proj.weight"].shape
    arrays["classifier.out_proj.weight"] = np.ones((labels, shape[1]), np.float32)
    arrays["classifier.out_proj.bias"] = np.ones(labels, np.float32)
    values = config | {"id2label": names, "num_labels": labels} | ({"problem_type": problem} if problem else {})
    with pytest.raises(Unproven):
        convert.from_hub(str(hub_models.write(tmp_path / "source", values, arrays)), str(tmp_path / "run"), check=False)
    assert restore.read_config(str(tmp_path / "run")).data.task == task
    export(tmp_path / "run", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back.get("problem_type") == problem and len(back["id2label"]) == labels
