"""A compiled step in a file: made by `llm-jax plan --save_executable`, loaded by `llm-jax train --executable`.

A program is taken only where everything that went into it is the same: another one could run, and train another model.
"""

import dataclasses
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import llm_jax
from llm_jax.config import Config, to_dict
from llm_jax.config.mesh import mesh_sizes
from llm_jax.errors import UserError

PARTS = ("seed", "model", "train", "optim", "mesh", "precision")  # of the config: what the step is made from


def fingerprint(cfg: Config, devices: list[jax.Device], batch: Mapping[str, Any]) -> dict[str, str]:
    """What has to agree, by name. `cfg` has its vocabulary."""
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **mesh_sizes(cfg.mesh, len(devices))))
    plain = to_dict(cfg)
    return {
        "features of a batch": ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in sorted(batch.items())),
        "config": repr({name: plain[name] for name in PARTS} | {"length": cfg.data.sequence_length}),
        "devices": f"{len(devices)} of kind {devices[0].device_kind}",
        "jax": jax.__version__,
        "code of this package": source_fingerprint(),
    }


def source_fingerprint() -> str:
    """Of the code that makes the step: a change to it may make another program."""
    root = Path(llm_jax.__file__).parent
    digest = hashlib.sha256()
    for part in ("config", "kernels", "models", "objectives", "training"):
        for file in sorted((root / part).rglob("*.py")):
            digest.update(file.read_bytes())
    for name in ("sharding.py", "precision.py", "rng.py", "backend.py"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def save(file: Path, compiled: jax.stages.Compiled, made_from: dict[str, str]) -> None:
    program, _, _ = serialize(compiled)
    file.write_bytes(pickle.dumps((made_from, program)))


def load(file: str, lowered: jax.stages.Lowered, needed: dict[str, str]) -> Any:
    """The step, ready to be called. `lowered`: the step that would be compiled, for its trees of arguments and results.

    Raises UserError where the file is no such program, or was made from something else.
    """
    try:
        made_from, program = pickle.loads(Path(file).read_bytes())
        differing = [name for name, value in needed.items() if made_from[name] != value]
    except (OSError, pickle.UnpicklingError, EOFError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"--executable={file}: this is not a step that llm-jax plan --save_executable wrote ({error})"
        ) from None
    if differing:
        said = "; ".join(f"{name}: {shown(made_from[name])} there, {shown(needed[name])} here" for name in differing)
        raise UserError(f"--executable={file}: the step was made from something else ({said}). Plan it again here, or "
                        "leave --executable out, and it is compiled")  # fmt: skip
    try:
        return deserialize_and_load(program, lowered.in_tree, lowered.out_tree)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"--executable={file}: the step cannot be loaded on these devices ({said})") from None


def shown(value: str) -> str:
    """Long values are told apart by their hash."""
    return value if len(value) <= 60 else hashlib.sha256(value.encode()).hexdigest()[:12]
