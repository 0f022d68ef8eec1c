"""What lies beside the weights of a checkpoint of the hub: config.json, tokenizer, notes; the run keeps it all."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jax import config
from llm_jax.config import Config, EncoderConfig, TransformerConfig
from llm_jax.convert import source
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.safetensors import Tensor
from llm_jax.convert.source import Source
from llm_jax.data import tokenizers
from llm_jax.errors import UserError
from llm_jax.models import registry
from llm_jax.training import run_folder

BESIDE = "hf"  # folder of a run: the files that lay beside the weights it was converted from
# Keys of the source's config.json that we say otherwise, or that are true of its files alone.
REWRITTEN = (
    "rope_parameters", "partial_rotary_factor", "layer_types", "quantization_config", "dtype", "_name_or_path",
)  # fmt: skip
# Our tasks of a text's labels, as transformers names them (`problem_type`).
PROBLEMS = {
    "classification": "single_label_classification", "multilabel": "multi_label_classification",
    "regression": "regression",
}  # fmt: skip
NOTES = "llm_jax.json"  # there: name, architecture and dtypes of the source


def describe(
    folder: Path, cfg: Config, model: registry.Model, found: Source, tensors: dict[str, Tensor], name: str
) -> None:
    """All of a run's folder but its checkpoint, and the files that lay beside the weights."""
    tokenizer: Any = tokenizers.NoTokenizer(cfg.model.vocab_size)
    if has_tokenizer(found.folder):
        tokenizer = tokenizers.load(found.folder)
    labels = label_names(found) if isinstance(cfg.model, EncoderConfig) else ()
    run_folder.write(folder, config.to_dict(cfg), tokenizer, model.shapes(), model.axes(), labels)
    keep_beside(folder, found, tensors, name)


def keep_beside(folder: Path, found: Source, tensors: dict[str, Tensor], name: str) -> None:
    """The files that lay beside the weights, in a run's folder; the notes are last, for they say that all are there."""
    usual = most_frequent([tensor.dtype.name for tensor in tensors.values()])
    others = {key: tensor.dtype.name for key, tensor in tensors.items() if tensor.dtype.name != usual}
    beside = folder / BESIDE
    try:
        beside.mkdir(exist_ok=True)
        for file in source.BESIDE:
            if (found.folder / file).is_file():
                copy(found.folder / file, beside / file)
        run_folder.write_json(beside / NOTES, {"name": name, "architecture": found.family.architecture,
                                               "needs": list(found.family.needs),
                                               "dtype": usual, "other_dtypes": others})  # fmt: skip
    except OSError as error:
        raise UserError(f"{beside} cannot be written: {error}") from None


def label_names(found: Source) -> tuple[str, ...]:
    """Of a classifier, by id; none where config.json has but numbers."""
    names = {int(i): str(name) for i, name in (found.values.get("id2label") or {}).items()}
    plain = all(name == f"LABEL_{i}" for i, name in names.items())
    return () if plain or found.cfg.head not in ("text", "token") else tuple(names[i] for i in sorted(names))


def copy(file: Path, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, to)


def usual_task(labels: int) -> str:
    """`data.task` of a text's labels that config.json gives no problem_type for, as transformers reads it."""
    return "regression" if labels == 1 else "classification"


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def most_frequent(words: Sequence[str]) -> str:
    return max(sorted(set(words)), key=list(words).count)


def beside(workdir: str, cfg: Config) -> tuple[Path | None, dict[str, Any]]:
    """The files and notes of the checkpoint that the run, or the run that it started from, was converted from."""
    for start in (workdir, cfg.checkpoint.init_from, cfg.checkpoint.resume_from):
        path = Path(start) / BESIDE
        if start and (path / NOTES).is_file():
            return path, json.loads((path / NOTES).read_text(encoding="utf-8"))
    return None, {}


def write_config(
    folder: Path,
    family: Family,
    cfg: TransformerConfig,
    beside: Path | None,
    dtype: str,
    labels: Sequence[str] = (),
    task: str = "",
) -> None:
    """config.json: what the model says, and what the source's said that says nothing about the model.

    Args:
      labels: the names of a classifier's.
      task: data.task of the run.
    """
    values: dict[str, Any] = {}
    if beside:
        values = json.loads((beside / "config.json").read_text(encoding="utf-8"))
        for name in REWRITTEN:
            values.pop(name, None)
    if isinstance(cfg, EncoderConfig) and len(values.get("id2label") or ()) != cfg.num_labels:
        values = {name: value for name, value in values.items() if name not in ("id2label", "label2id")}
    values |= family.hf_config(cfg) | {"torch_dtype": dtype}
    if labels:
        values["id2label"] = {str(i): name for i, name in enumerate(labels)}
        values["label2id"] = {name: i for i, name in enumerate(labels)}
    if task in PROBLEMS and (values.get("problem_type") or not beside or task != usual_task(cfg.num_labels)):
        values["problem_type"] = PROBLEMS[task]
    path = folder / "config.json"
    run_folder.write_json(path, values)
    if function_of(family.config(values, str(path))) != function_of(cfg):
        raise UserError(f"{path} would describe another model, by what the source's config.json says beside")


def write_tokenizer(folder: Path, tokenizer: Any, beside: Path | None) -> None:
    """The tokenizer's files, the source's own where the run was converted from one, and generation_config.json."""
    for name in source.BESIDE if beside else ():
        if name != "config.json" and (beside / name).is_file():
            copy(beside / name, folder / name)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    eos = tokenizer.eos_id
    if not (folder / "generation_config.json").exists():
        special = {} if eos is None else {"eos_token_id": eos}
        run_folder.write_json(folder / "generation_config.json", {"_from_model_config": True} | special)
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        names = [name for name, id in tokenizer.special_ids.items() if id == eos]
        special = {"eos_token": names[0]} if names else {}
        run_folder.write_json(
            folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special
        )
