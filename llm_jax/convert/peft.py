"""Adapters in the format of the library `peft`: a folder with adapter_config.json and adapter_model.safetensors.

A module X of the model, as "model.layers.0.self_attn.q_proj", has base_model.model.X.lora_A.weight (rank, in) and
base_model.model.X.lora_B.weight (out, rank), and its weight is W + s B A; an embedding has lora_embedding_A
(rank, vocabulary) and lora_embedding_B (features, rank), and its table is W + s (B A)^T. Of embedding and head it may
hold the weight too (base_layer.weight), in case that was changed.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.config import LoraConfig
from llm_jax.config.values import refuse
from llm_jax.convert import safetensors
from llm_jax.convert.safetensors import Planned, Tensor
from llm_jax.errors import ConfigError, DataError, UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "table_a", ".lora_embedding_B": "table_b",
    ".base_layer.weight": "weight",
}  # fmt: skip
FILES = (CONFIG, TENSORS)
ROWS = 1024
USED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights")
# Keys that change nothing in what the model computes; which modules have an adapter is what the tensors say.
SAYS_NOTHING = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
)  # fmt: skip
STARTS = (True, False, "gaussian", "orthogonal")  # of A and B alone: others change the model under the adapter


@dataclasses.dataclass(frozen=True)
class Part:
    """The adapter of one module: W + scale B A, or of an embedding's table (`is_table`) W + scale (B A)^T."""

    module: str
    a: Tensor
    b: Tensor
    scale: float
    is_table: bool = False
    weight: Tensor | None = None

    def check_weight(self, weight: np.ndarray) -> None:
        """Raises UserError where the model's weight is not the one that is kept with the adapter."""
        kept = self.weight and self.weight.read()
        rows = [slice(start, start + ROWS) for start in range(0, len(weight), ROWS)]
        same = lambda part: np.array_equal(kept[part].astype(np.float32), weight[part].astype(np.float32))  # noqa: E731
        if kept is not None and not (kept.shape == weight.shape and all(map(same, rows))):
            raise UserError(f"{self.weight.file}: {self.weight.name} is not the model's own: beside the adapter, this "
                            "weight was changed too, which is no adapter's")  # fmt: skip

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def added_to(self, weight: np.ndarray, dtype: np.dtype, *, conv: bool) -> np.ndarray:
        """The module's weight with the adapter in it, summed in float32 (float64, where it is in that).

        `conv`: the weight is (in, out). A few rows at a time: beside the result there is little in memory.
        """
        wide = np.promote_types(weight.dtype, np.float32)
        left, right = self.b.read().astype(wide) * wide.type(self.scale), self.a.read().astype(wide)
        if conv or self.is_table:
            left, right = right.T, left.T
        found = np.empty(weight.shape, dtype)
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            found[rows] = weight[rows].astype(wide) + left[rows] @ right
        return found


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder as `peft` saves it. `parts`: by module."""

    folder: Path
    values: Mapping[str, Any]
    parts: Mapping[str, Part]


# --------------------------------------------------------------------------------------------------- reading


def read(folder: Path) -> Adapter:
    """Open an adapter's folder.

    Raises:
      UserError: it is none, is damaged, or asks for something that cannot be said here, which is named.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--adapter={folder}: {CONFIG} is missing, so it is no folder that peft has saved") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or cannot be read: {error}") from None
    check_config(values, str(path))
    if not (folder / TENSORS).is_file():
        pickle = "adapter_model.bin"
        reason = f"it holds {pickle} alone, a pickle: load it with peft where you trust it, and save it again"
        raise DataError(f"{folder}: {TENSORS} is missing" + (f"; {reason}" if (folder / pickle).is_file() else ""))
    return Adapter(folder, values, read_parts(values, folder / TENSORS))


def check_config(values: Mapping[str, Any], where: str) -> None:
    """Every key is used, known to say nothing, at a value that stands for "off", or refused."""

    def no(key: str, reason: str, fix: str = "this adapter cannot be converted") -> ConfigError:
        return refuse(f"{where}: {key}", values.get(key), reason, fix)

    if values.get("peft_type") != "LORA":
        raise no("peft_type", "only LORA can be converted")
    if values.get("bias", "none") != "none":
        raise no("bias", "our adapters change no bias")
    if values.get("init_lora_weights", True) not in STARTS:
        raise no("init_lora_weights", "such a start changes the model under the adapter too",
                 "convert the adapter with peft's path_initial_model_for_weight_conversion first")  # fmt: skip
    for key, value in values.items():
        if value and key not in USED and key not in SAYS_NOTHING:
            raise no(key, "our adapters are plain low-rank ones, W + s B A, and know no such thing")


def read_parts(values: Mapping[str, Any], path: Path) -> dict[str, Part]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in safetensors.read_header(path).items():
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        if not suffix or not name.startswith(PREFIX):
            raise DataError(f"{path}: the tensor {name} is left over: it is no lora_A or lora_B of a module")
        found.setdefault(name.removeprefix(PREFIX).removesuffix(suffix), {})[SUFFIXES[suffix]] = tensor
    if not found:
        raise DataError(f"{path} holds no tensors")
    return {module: _part(module, tensors, values, path) for module, tensors in found.items()}


def _part(module: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any], path: Path) -> Part:
    is_table = "table_a" in tensors
    pair = ("table_a", "table_b") if is_table else ("a", "b")
    if tensors.keys() - {"weight"} != set(pair):
        raise DataError(f"{path}: the module {module} has {', '.join(sorted(tensors))} and should have an A and a B")
    a, b = (tensors[name] for name in pair)
    rank = _of_module("rank_pattern", module, values, values.get("r", 8))
    alpha = _of_module("alpha_pattern", module, values, values.get("lora_alpha", 8))
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        told = f"{list(a.shape)} and {list(b.shape)}, and the rank is {rank}"
        raise DataError(f"{path}: A and B of the module {module} have the shapes {told}")
    scale = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    return Part(module, a, b, scale, is_table, tensors.get("weight"))


def _of_module(key: str, module: str, values: Mapping[str, Any], usual: Any) -> Any:
    """A module's own rank or alpha: of the first pattern that its name ends with."""
    patterns = values.get(key) or {}
    return next((value for name, value in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", module)), usual)


def uniform(adapter: Adapter) -> LoraConfig:
    """Rank and alpha as `model.lora` says them, for all modules alike. Raises UserError where they are not alike."""
    ranks = {(part.rank, part.scale) for part in adapter.parts.values()}
    if len(ranks) > 1:
        key = "rank_pattern" if len({rank for rank, _ in ranks}) > 1 else "alpha_pattern"
        raise refuse(f"{adapter.folder / CONFIG}: {key}", adapter.values.get(key), "our adapters have one rank and one "
                     "alpha for all layers", "give --merge, which takes each as it is")  # fmt: skip
    values, rank = adapter.values, next(iter(ranks))[0]
    return LoraConfig(rank, float(values.get("lora_alpha", 8)), bool(values.get("use_rslora", False)))


# --------------------------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class Written:
    """The adapter of one module that will be written."""

    module: str
    rank: int
    inputs: int
    outputs: int


def write(
    folder: Path,
    modules: Sequence[Written],
    produce: Callable[[Written], tuple[np.ndarray, np.ndarray]],
    config: Mapping[str, Any],
    dtype: np.dtype,
) -> None:
    """Write an adapter's folder.

    Args:
      modules: in order.
      produce: A (rank, in) and B (out, rank) of one module.
      config: adapter_config.json.
      dtype: of the tensors.
    """
    planned, whose = [], {}
    for module in modules:
        for suffix, shape in ((".lora_A.weight", (module.rank, module.inputs)),
                              (".lora_B.weight", (module.outputs, module.rank))):  # fmt: skip
            planned.append(Planned(f"{PREFIX}{module.module}{suffix}", dtype, shape))
            whose[planned[-1].name] = (module, "AB".index(suffix[6]))

    def one(tensor: Planned) -> np.ndarray:
        module, which = whose[tensor.name]
        return np.ascontiguousarray(produce(module)[which]).astype(dtype)

    safetensors.write_file(folder / TENSORS, planned, one)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def config_of(
    lora: LoraConfig, modules: Sequence[Written], all_modules: Sequence[str], base: str | None, *, conv: bool
) -> dict[str, Any]:
    """adapter_config.json.

    Args:
      lora: of the model; a module of another rank gets its own, with the same scale.
      modules: those with an adapter.
      all_modules: every module that has a weight.
      base: the model's name or path, where it is known.
      conv: their weights are (in, out), as in GPT-2.
    """
    names = {module.module for module in modules}
    others = [module for module in all_modules if module not in names]
    number = lambda value: int(value) if value == int(value) else value  # noqa: E731 as peft's own types
    targets = {module: _target(module, others) for module in sorted(names)}
    wide = {targets[m.module]: m.rank for m in modules if m.rank != lora.rank}
    alpha = lambda rank: lora.scale * (math.sqrt(rank) if lora.rank_stabilized else rank)  # noqa: E731
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": number(lora.alpha),
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted(set(targets.values())),
        "rank_pattern": wide,
        "alpha_pattern": {target: number(alpha(rank)) for target, rank in wide.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": conv,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _target(module: str, others: Sequence[str]) -> str:
    """The shortest end of a module's name that no module without adapter has."""
    words = module.split(".")
    ends = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), module)
