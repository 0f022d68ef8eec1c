"""Writes convert_models.json and convert_logits.npz: what transformers makes of the tiny models of tests/hub_models.py.

    PYTHONPATH=.:tests python tests/golden/make_convert_references.py [NAME...]

With names, those alone are made anew.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from hub_models import CASES, LOGITS, MODELS, model_class, tokens, weights, write

from llm_jax.convert import safetensors

FORGET = ("transformers_version",)


def described(name: str) -> dict:
    """config.json and the shapes of the tensors that transformers saves."""
    kind, values = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, model_class(kind))(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((pathlib.Path(folder) / "config.json").read_text())
        shapes = {key: list(t.shape) for key, t in safetensors.read_folder(pathlib.Path(folder)).items()}
    return {"config": {k: v for k, v in saved.items() if k not in FORGET}, "tensors": shapes}


def load(folder: pathlib.Path):
    """transformers' model of a folder, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def logits(entry: dict) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = load(write(pathlib.Path(folder) / "model", entry["config"], weights(entry["tensors"])))
        return model(torch.from_numpy(tokens()).long()).logits.numpy()


if __name__ == "__main__":
    names = sys.argv[1:] or list(CASES)
    made = {name: described(name) for name in names}
    kept = {name: entry for name, entry in json.loads(MODELS.read_text()).items() if name in CASES}
    found = {name: array for name, array in np.load(LOGITS).items() if name in CASES}
    models = {name: (kept | made)[name] for name in CASES if name in kept | made}
    found |= {name: logits(entry) for name, entry in made.items()}
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in models.items())
    MODELS.write_text("{\n" + text + "\n}\n")
    np.savez_compressed(LOGITS, **{name: found[name] for name in models})
    print(f"wrote {MODELS} and {LOGITS}")
