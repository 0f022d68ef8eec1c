"""What a checkpoint holds beside its arrays: their shapes, dtypes and fingerprints, the data state and the evaluation.

It is JSON in the metadata that Orbax writes for us, with a checksum of its own.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError
from llm_jax.training.fingerprint import Arrays, fingerprint

FORMAT = 1
RANK = "rank"  # among an evaluation's figures: what ranks it, lower being better, where that is not the loss


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read, or whose content is not what was saved."""


def make_record(step: int, arrays: Arrays, data_state: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved beside the arrays. Raises TypeError where the data state is not plain JSON."""
    prints = fingerprint(arrays)
    described = {
        path: {"shape": list(a.shape), "dtype": str(a.dtype), "fingerprint": prints[path]} for path, a in arrays.items()
    }
    return sealed(step, described, data_state, metrics)


def sealed(
    step: int, described: Mapping[str, Any], data_state: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """A record with its checksum, of arrays that are described already: {path: {"shape", "dtype", "fingerprint"}}."""
    record = {
        "format": FORMAT,
        "step": step,
        "arrays": dict(described),
        "data": dict(data_state),
        "metrics": {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
    }
    if json.loads(json.dumps(record["data"])) != record["data"]:
        raise TypeError(f"the data state is not plain JSON, so it would not come back as it is: {data_state!r}")
    return {"record": record, "sha256": _checksum(record)}


def _checksum(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """The record of the checkpoint in the folder `path`: "step", "arrays" by path, "data", "metrics".

    Raises:
      DamagedCheckpoint: it is missing or not what was saved.
      UserError: it is of another version's format.
    """
    if not path.is_dir():
        raise DamagedCheckpoint("there is no such folder")
    try:  # Orbax's own reader opens every array for this
        found = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())["custom_metadata"]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"its metadata cannot be read ({root_cause(error)})") from None
    if not found or _checksum(found.get("record")) != found.get("sha256"):
        raise DamagedCheckpoint("its record is missing or damaged")
    if found["record"]["format"] != FORMAT:
        raise UserError(f"{path} was saved in format {found['record']['format']}; this version reads {FORMAT}")
    return found["record"]


def check_fit(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], *, partial: bool) -> None:
    """Raises UserError where the arrays that are saved do not have the paths, shapes and dtypes that are wanted.

    Orbax would cast another dtype, and with partial loading leave out a missing key, in silence.
    """
    faults = [f"it has no {key}" for key in wanted if key not in saved]
    if not partial:
        faults += [f"it has {key}, which is not wanted" for key in saved if key not in wanted]
    for key, x in wanted.items():
        if key in saved:
            there, here = (saved[key]["dtype"], tuple(saved[key]["shape"])), (str(x.dtype), tuple(x.shape))
            if there != here:
                faults.append(f"{key} is {there[0]}{list(there[1])} there and {here[0]}{list(here[1])} here")
    if faults:
        raise UserError(
            f"the checkpoint {path} does not fit this config: {some(faults, '; ')}. Use the config it was saved "
            f"with ({path.parent.parent / 'config.json'})"
        )


def some(items: Sequence[str], separator: str = ", ", count: int = 4) -> str:
    """The first `count` in words, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return separator.join(items[:count]) + more


def root_cause(error: BaseException) -> str:
    """What an exception was first raised from, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words if len(words) < 320 else f'{words[:100]} ... {words[-200:]}'}"
