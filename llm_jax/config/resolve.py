"""From a config file and command-line overrides to one frozen `Config`, and from a `Config` to plain data and back.

A config file is `get_config(arg="") -> ml_collections.ConfigDict` and holds only what differs from the defaults in
`schema.py`. Every key that the schema has can be set in the file or overridden; any other key is an error.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.config.schema import MODEL_FAMILIES, Config
from llm_jax.config.values import Text, did_you_mean, nearest, refuse, to_field_type
from llm_jax.errors import ConfigError

# ------------------------------------------------------------------------------------------- dictionaries


def from_dict(nested: Mapping[str, Any]) -> Config:
    """The `Config` of a nested dictionary that holds any part of the keys; the others take their defaults.

    Raises ConfigError at the first key that is unknown or has a wrong type or value.
    """
    return _build(Config(), nested, "")


def to_dict(cfg: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts, lists, strings and numbers: JSON holds it and `from_dict` reads it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(cfg))


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of every key on which two configs differ; None where one lacks the key."""
    flat_a, flat_b = flatten(to_dict(a)), flatten(to_dict(b))
    keys = list(flat_a) + [key for key in flat_b if key not in flat_a]
    return [(key, flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.num_layers": 4, ...} of nested dicts."""
    flat = {}
    for name, value in nested.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def _build(base: Any, raw: Any, prefix: str) -> Any:
    """`base` (a config dataclass) with the keys of `raw` laid over it; `prefix` is "" or ends with a dot."""
    fields = {field.name: field for field in dataclasses.fields(base)}
    if not isinstance(raw, Mapping):
        raise refuse(
            prefix[:-1] or "the config",
            raw,
            "this is a group of keys, not one value",
            f"set {prefix}{next(iter(fields))} and so on",
        )
    kinds = typing.get_type_hints(type(base))
    changes = {}
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if name not in fields:
            raise _unknown_key(key, value)
        changes[name] = _convert(value, kinds[name], fields[name], getattr(base, name), key)
    return dataclasses.replace(base, **changes)


def _convert(value: Any, kind: Any, field: dataclasses.Field, base: Any, key: str) -> Any:
    if type(base) in MODEL_FAMILIES.values():
        return _build(_family(base, value, key), value, f"{key}.")
    if dataclasses.is_dataclass(base):
        return _build(base, value, f"{key}.")
    if typing.get_origin(kind) is dict:
        return _build_entries(typing.get_args(kind)[1], value, key)
    if isinstance(value, Mapping):
        extra = next(iter(value), "")
        raise refuse(f"{key}.{extra}", value.get(extra), f"{key} is one value and has no keys of its own", f"set {key}")
    return to_field_type(value, kind, field, key)


def _family(base: Any, value: Any, key: str) -> Any:
    """The defaults of the model family that `value` asks for."""
    family = value.get("family", base.family) if isinstance(value, Mapping) else base.family
    if family not in MODEL_FAMILIES:
        listed = f"it can be {', '.join(MODEL_FAMILIES)}"
        raise refuse(
            f"{key}.family", family, "there is no such model family", did_you_mean(str(family), MODEL_FAMILIES, listed)
        )
    return base if family == base.family else MODEL_FAMILIES[family]()


def _build_entries(cls: type, raw: Any, key: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        first = dataclasses.fields(cls)[0].name
        raise refuse(key, raw, "this is a group of named entries", f"set {key}.NAME.{first} and so on")
    for name in raw:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise refuse(key, name, "an entry's name is made of letters, digits, - and _", "rename it")
    return {name: _build(cls(), entry, f"{key}.{name}.") for name, entry in raw.items()}


# ------------------------------------------------------------------------------------------- unknown keys

# What other systems call our keys, for the error message alone.
ALIASES = {
    "lr": "optim.learning_rate", "wd": "optim.weight_decay", "grad_clip": "optim.clip_norm", "momentum": "optim.beta1",
    "optimizer": "optim.name", "max_iters": "train.steps", "max_steps": "train.steps", "num_steps": "train.steps",
    "batch_size": "train.global_batch_size", "gradient_accumulation_steps": "train.accumulation",
    "n_layer": "model.num_layers", "n_layers": "model.num_layers", "n_head": "model.num_heads",
    "n_embd": "model.embed_dim", "d_model": "model.embed_dim", "hidden_size": "model.embed_dim",
    "d_ff": "model.mlp_dim", "intermediate_size": "model.mlp_dim", "rope_theta": "model.rope.base",
    "block_size": "data.sequence_length", "seq_len": "data.sequence_length", "dataset": "data.path",
    "dtype": "precision.compute", "save_every": "checkpoint.every",
}  # fmt: skip


def all_keys(base: Any = None, prefix: str = "") -> list[str]:
    """Every full key name, in the schema's order; the keys of a mixture's source are spelt data.mixture.NAME.key."""
    base = Config() if base is None else base
    kinds, keys = typing.get_type_hints(type(base)), []
    for field in dataclasses.fields(base):
        key, value = f"{prefix}{field.name}", getattr(base, field.name)
        if dataclasses.is_dataclass(value):
            keys += all_keys(value, f"{key}.")
        elif typing.get_origin(kinds[field.name]) is dict:
            keys += all_keys(typing.get_args(kinds[field.name])[1](), f"{key}.NAME.")
        else:
            keys.append(key)
    return keys


def _unknown_key(key: str, value: Any) -> ConfigError:
    while isinstance(value, Mapping) and len(value) == 1:  # down to the key that was typed
        ((name, value),) = value.items()
        key = f"{key}.{name}"
    keys = all_keys()
    for defaults in MODEL_FAMILIES.values():
        keys += [name for name in all_keys(defaults(), "model.") if name not in keys]
    leaf = str(key).rpartition(".")[2]
    leaves = {name.rpartition(".")[2]: name for name in reversed(keys)}
    found = [ALIASES[leaf]] if leaf in ALIASES else []
    found += nearest(key, [name for name in keys if name.rpartition(".")[2] == leaf], cutoff=0.0)
    found = found or nearest(key, keys, cutoff=0.75) or [leaves[close] for close in nearest(leaf, leaves, cutoff=0.7)]
    group = str(key).rpartition(".")[0]
    there = [name.removeprefix(f"{group}.") for name in keys if name.startswith(f"{group}.")]
    names = there if group and there else [field.name for field in dataclasses.fields(Config)]
    listed = f"the keys of {group} are" if group and there else "the keys and groups are"
    fix = f"did you mean {' or '.join(found)}?" if found else f"{listed} {', '.join(names)}"
    return refuse(key, value, "there is no such key", fix)


# ------------------------------------------------------------------------------------------- config files


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """The run that a config file and overrides such as "optim.learning_rate=3e-4" describe, later ones winning.

    Args:
      spec: as for `find_config`; "" stands for the defaults alone.
    Raises:
      ConfigError: in one sentence, with the file or the key it is about.
    """
    raw = _read(spec)
    try:
        from_dict(raw)  # here, so that the message can name the file
    except ConfigError as error:
        raise ConfigError(f"{find_config(spec)}: {error}") from None
    return from_dict(_with(raw, overrides))


def given(spec: str, overrides: Sequence[str] = ()) -> frozenset[str]:
    """The full names of the keys that a config file and overrides set, those at their defaults among them.

    Args and Raises: as `load`.
    """
    return frozenset(flatten(_with(_read(spec), overrides)))


def override(cfg: Config, overrides: Sequence[str]) -> Config:
    """`cfg` with overrides such as "mesh.data=4" laid over it, later ones winning."""
    return from_dict(_with(to_dict(cfg), overrides))


def _read(spec: str) -> dict[str, Any]:
    if not spec:
        return {}
    path = find_config(spec)
    return _read_json(path) if path.endswith(".json") else _run_file(path, _split(spec)[1])


def _with(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with the overrides set in it."""
    for item in overrides:
        key, equals, value = item.partition("=")
        key = key.strip().removeprefix("config.")
        key = SHORT_NAMES.get(key, key)
        if not equals or not key:
            raise ConfigError(f"{key or item}: this override lacks its key or value; write {key or 'KEY'}=VALUE")
        _set(raw, key.split("."), Text(value))
    return raw


SHORT_NAMES = {"init_from": "checkpoint.init_from"}  # --config.init_from=hf:PATH, as people say it


def _set(group: dict[str, Any], names: list[str], value: Text) -> None:
    for name in names[:-1]:
        if not isinstance(group.get(name), dict):
            group[name] = {}  # a value that is given keys is refused when the whole is built
        group = group[name]
    group[names[-1]] = value


def shipped_folder() -> Path:
    """The folder of the configs that come with the package: inside it in a wheel, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """The names of the shipped configs, such as "quickstart" or "gpt2/124m"."""
    folder = shipped_folder()
    files = [path for path in sorted(folder.rglob("*.py")) if "def get_config" in path.read_text(encoding="utf-8")]
    return [path.relative_to(folder).with_suffix("").as_posix() for path in files]


def find_config(spec: str) -> str:
    """The absolute path of the config file that `spec` names.

    `spec` is a path ("configs/x.py", "/abs/x.py", or the "config.json" that a run left) or the name of a shipped config
    ("quickstart", "gpt2/124m"), and may end in ":arg", which goes to its get_config. Raises ConfigError, with the
    nearest names, where there is none.
    """
    name = _split(spec)[0]
    given = Path(name).expanduser().absolute()
    if given.suffix in (".py", ".json") and given.is_file():
        return str(given)
    names, shipped = config_names(), name.removeprefix("configs/").removesuffix(".py")
    if shipped in names:
        return str(shipped_folder() / f"{shipped}.py")
    if given.is_file():
        raise ConfigError(f"--config={spec}: {given} is no config file; their names end in .py or .json")
    close = did_you_mean(shipped, names, f"the shipped configs are {', '.join(names)}")
    raise ConfigError(f"--config={spec}: there is no file {given} and no shipped config of this name; {close}")


def _split(spec: str) -> tuple[str, str]:
    """The name and the argument of "x.py:arg"; a colon in a folder's name stays."""
    match = re.fullmatch(r"(.*?\.py)(?::(.*))?", spec) or re.fullmatch(r"([^:]*)(?::(.*))?", spec)
    return (match[1], match[2] or "") if match else (spec, "")


def _read_json(path: str) -> dict[str, Any]:
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: this is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a saved config is a JSON object, and this is a {type(raw).__name__}")
    return raw


def _run_file(path: str, arg: str) -> dict[str, Any]:
    """What get_config of the file at `path` returns, as nested dicts."""
    import ml_collections  # not at the top: `llm-jax --help` needs none of it

    with _configs_package(Path(path)):
        try:
            module = types.ModuleType(f"config_file_{Path(path).stem}")
            module.__file__ = path
            exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
            get_config = getattr(module, "get_config", None)
            if not callable(get_config):
                raise ConfigError(f"{path}: the file has no function get_config(); every config file needs one")
            if arg and not inspect.signature(get_config).parameters:
                raise ConfigError(f"{path}: get_config() takes no argument, but {arg!r} was given after the colon")
            config = get_config(arg) if arg else get_config()
            if isinstance(config, ml_collections.ConfigDict):
                config = config.copy_and_resolve_references().to_dict()
        except ConfigError:
            raise
        except ValueError as error:
            if not arg:
                raise ConfigError(_describe(error, path)) from error
            raise ConfigError(f"--config={Path(path).stem}:{arg}: {error}") from error  # said of its argument
        except (Exception, SystemExit) as error:
            raise ConfigError(_describe(error, path)) from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise ConfigError(f"{path}: get_config() returned {kind}; it must return an ml_collections.ConfigDict")
    return config


def _describe(error: BaseException, path: str) -> str:
    """Where in a config file (or in a config it imports) an exception came from, and what it says."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}: this is not valid Python ({error.msg})"
    folders = (str(Path(path).parent), str(shipped_folder()))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folders)]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else path
    return f"{where}: the config file failed with {type(error).__name__}: {error}"


@contextlib.contextmanager
def _configs_package(path: Path) -> Iterator[None]:
    """While a config file runs, `from configs.gpt2 import ...` finds its neighbours, then the shipped configs."""
    own = [folder for folder in path.parents if folder.name == "configs"][:1]
    package = types.ModuleType("configs")
    package.__path__ = [str(folder) for folder in dict.fromkeys([*own, shipped_folder()])]
    before = _take_configs_modules()
    sys.modules["configs"] = package
    importlib.invalidate_caches()
    try:
        yield
    finally:
        _take_configs_modules()
        sys.modules.update(before)


def _take_configs_modules() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name == "configs" or name.startswith("configs.")]
    return {name: sys.modules.pop(name) for name in names}
