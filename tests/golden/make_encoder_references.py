"""Writes encoder_models.json and encoder_outputs.npz: what transformers makes of the models of tests/hub_encoders.py.

PYTHONPATH=.:tests python tests/golden/make_encoder_references.py
"""

import json
import pathlib
import tempfile

import hub_models
import numpy as np
import torch
import transformers
from hub_encoders import CASES, LENGTH, MODELS, OUTPUTS, tokens

from llm_jax.convert import safetensors, source, torch_reference

FORGET = ("transformers_version",)


def model_of(name: str):
    """transformers' model of a case, of fresh parameters."""
    kind, form, values = CASES[name]
    return getattr(transformers, f"{kind}{form}")(getattr(transformers, f"{kind}Config")(**values))


def described(name: str) -> dict:
    """config.json and the shapes of the tensors that transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        model_of(name).save_pretrained(folder)
        saved = json.loads((pathlib.Path(folder) / "config.json").read_text())
        shapes = {key: list(t.shape) for key, t in safetensors.read_folder(pathlib.Path(folder)).items()}
    return {"config": {k: v for k, v in saved.items() if k not in FORGET}, "tensors": shapes}


def outputs(entry: dict) -> np.ndarray:
    """As the converter's own reference: (B, P, V)."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = hub_models.weights(entry["tensors"])
        found = source.open_folder(hub_models.write(pathlib.Path(folder) / "model", entry["config"], arrays))
        return torch_reference.logits_of(found, tokens(), np.arange(LENGTH), None)


if __name__ == "__main__":
    torch.manual_seed(0)
    models = {name: described(name) for name in CASES}
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in models.items())
    MODELS.write_text("{\n" + text + "\n}\n")
    np.savez_compressed(OUTPUTS, **{name: outputs(entry) for name, entry in models.items()})
    print(f"wrote {MODELS} and {OUTPUTS}")
