"""A checkpoint of the hub as files: where they are, what config.json says, and the tensors under the table's names."""

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.config import EncoderConfig, TransformerConfig
from llm_jax.convert import families, packed, pieces, safetensors
from llm_jax.convert.family import Family
from llm_jax.convert.rules import Move, matches
from llm_jax.convert.safetensors import Tensor
from llm_jax.errors import DataError, UserError

FLOATS = ("float64", "float32", "float16", "bfloat16")
# The files beside the weights: a folder that we write gives them back.
BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "vocab.txt", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder with config.json and safetensors."""

    folder: Path
    values: dict[str, Any]  # config.json
    family: Family
    cfg: TransformerConfig
    untied: bool = False  # the head is the embedding there, and gets a copy of its own here

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors under the names that the family's table uses.

        Raises DataError: a file is missing, cut off or damaged.
        """
        found = self._all()
        others = {*self._of_other_heads(found), *self._of_further_layers(found)}
        if self.untied:
            found.setdefault(self.family.head, found[self.family.embedding])
        return {name: tensor for name, tensor in found.items() if name not in others}

    def left_out(self) -> list[str]:
        """A line for each kind of parameters that `tensors` leaves out, as the architecture has no use for them."""
        found = self._all()
        heads, further = self._of_other_heads(found), self._of_further_layers(found)
        lines = [f"left out, of other heads: {', '.join(heads)}"] if heads else []
        if further:
            layers = Counter(".".join(name.split(".")[:3]) for name in further)
            told = ", ".join(f"{layer} ({count} tensors)" for layer, count in layers.items())
            lines.append(f"left out, of layers that predict further tokens: {told}; on the way back they are missing")
        return lines

    def _of_other_heads(self, found: dict[str, Tensor]) -> list[str]:
        """Of heads that the checkpoint was trained with before."""
        used = {name for rule in self.family.rules(self.cfg, found) for name in rule.theirs}
        used |= {copy for copy, _ in self.family.tied}
        return [name for name in found if name not in used and matches(name, self.family.other_heads)]

    def _of_further_layers(self, found: dict[str, Tensor]) -> list[str]:
        patterns = self.family.further_layers(self.values)
        return [name for name in found if matches(name, patterns)]

    def _all(self) -> dict[str, Tensor]:
        found = named(packed.unpacked(safetensors.read_folder(self.folder), self.values), self.family)
        return {name: tensor for name, tensor in found.items() if not self.family.is_no_parameter(name)}


def named(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors under the names that the family's table uses: checkpoints may leave a prefix out, or have it more."""
    if family.model is EncoderConfig:  # a norm's, in checkpoints that came from TensorFlow
        tensors = {re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)): t for name, t in tensors.items()}
    if family.bare_prefix:
        return {name.removeprefix(family.bare_prefix): tensor for name, tensor in tensors.items()}
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    return {name if name == family.head else family.prefix + name: tensor for name, tensor in tensors.items()}


def open_folder(folder: Path) -> Source:
    """Read a folder's config.json. Raises UserError where it is missing, damaged or cannot be said here."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"hf:{folder}: there is no such folder")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint of the hub: config.json is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    names: list[str] = []
    with contextlib.suppress(DataError):  # of which more is said when tensors are read
        names = list(safetensors.read_folder(folder))
    family = families.of_config(values, str(path), names)
    return Source(folder, values, family, family.config(values, str(path)))


def check_names(source: Source, tensors: dict[str, Tensor], moves: Sequence[Move]) -> None:
    """Refuse missing and left-over tensors, another shape, and numbers that are no floats. Drops a tied head that is
    stored beside its embedding, once it is seen to be the same.

    Raises DataError, with tensor and file.
    """
    _drop_tied_head(source, tensors)
    shapes = {name: shape for move in moves for name, shape in zip(move.theirs, move.their_shapes, strict=True)}
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise DataError(f"{source.folder}: {listed(missing)} missing, and {source.family.architecture} needs it")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise DataError(
                f"{tensor.file}: the tensor {tensor.name} is left over: no rule of {source.family.architecture} "
                "takes it"
            )
        if tensor.shape != shapes[name]:
            told = f"{list(tensor.shape)} and config.json makes it {list(shapes[name])}"
            raise DataError(f"{tensor.file}: the tensor {tensor.name} has the shape {told}")
        if tensor.dtype.name not in FLOATS:
            raise DataError(
                f"{tensor.file}: the tensor {tensor.name} is {tensor.dtype.name}; weights are read as "
                f"{', '.join(FLOATS)}: a quantised checkpoint must be dequantised first"
            )


def _drop_tied_head(source: Source, tensors: dict[str, Tensor]) -> None:
    for copy, original in ((source.family.head, source.family.embedding), *source.family.tied):
        _drop_copy(source, tensors, copy, original)


def _drop_copy(source: Source, tensors: dict[str, Tensor], copy: str, original: str) -> None:
    head, embedding = tensors.get(copy), tensors.get(original)
    if not source.cfg.tie_embeddings or head is None or embedding is None:
        return
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype) or not same_bits(head.read(), embedding.read()):
        raise DataError(
            f"{head.file}: {head.name} differs from {embedding.name}, and config.json says that they are one "
            "(tie_word_embeddings); set it to false there if the checkpoint has a head of its own"
        )
    del tensors[copy]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Of arrays of one shape and dtype; in pieces, for numpy's comparison of all takes as much memory again."""
    step = pieces.rows_in(a)
    parts = (slice(start, start + step) for start in range(0, len(a), step))
    return all(np.array_equal(a[part].view(np.uint8), b[part].view(np.uint8)) for part in parts)


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more are" if len(names) > 4 else " is" if len(names) == 1 else " are"
    return ", ".join(names[:4]) + more


def widest(tensors: dict[str, Tensor], wide: Sequence[str] = ()) -> np.dtype:
    """The narrowest dtype of ours that holds every tensor exactly (there is no float16 here), those left out that
    `wide` names: `Family.wide`."""
    found = {tensor.dtype.name for name, tensor in tensors.items() if not matches(name, wide)}
    if "float64" in found:
        return np.dtype(np.float64)
    return np.dtype(safetensors.DTYPES["BF16"]) if found == {"bfloat16"} else np.dtype(np.float32)
