"""`llm-jax convert`: a checkpoint of the hub becomes a run's folder, and a run a checkpoint of the hub.

Both ways follow one plan of moves (`convert/rules.py`) and hold one tensor at a time. What is written goes to a folder
of another name, is compared with its source, and only then gets the name that was asked for.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config, sharding
from llm_jax.config import Config, DataConfig, DecoderConfig, PrecisionConfig, TrainConfig
from llm_jax.config.checks import MESH_AXES
from llm_jax.convert import families, hub, reference, rules, safetensors, source
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.progress import told
from llm_jax.convert.rules import Move
from llm_jax.convert.safetensors import Planned, Tensor
from llm_jax.convert.source import Source
from llm_jax.data import tokenizers
from llm_jax.errors import ConfigError, DataError, UserError
from llm_jax.models import registry
from llm_jax.precision import Precision
from llm_jax.sharding import Layout, path_name
from llm_jax.training import convert_check, restore, run_folder
from llm_jax.training.streamed import StreamedCheckpoint, flush

BESIDE = "hf"  # folder of a run: the files that lay beside the weights it was converted from
NOTES = "llm_jax.json"  # there: architecture and dtypes of the source
SHARD_BYTES = 5 * 10**9
NOT_ASKED = reference.Missing("--no_check was given")
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# ------------------------------------------------------------------------------------------- from the hub


def from_hub(
    name: str,
    to: str,
    *,
    overrides: Sequence[str] = (),
    dtype: str | None = None,
    revision: str | None = None,
    check: bool = True,
) -> None:
    """Write the run folder `to` from a checkpoint of the hub.

    Args:
      name: a path, or a name on the hub.
      to: absolute path of the run's folder, which must not exist yet.
      overrides: "key=value" changes to the run's config, such as a mesh or `model.scan_layers`.
      dtype: of the parameters; None: the one that holds all of the source's tensors exactly.
      revision: on the hub.
      check: compare the logits in the end.

    Raises:
      UserError: the source is damaged, incomplete or cannot be said here.
      ConversionMismatch: the logits differ.
      Unproven: it was written, and nothing was there to compare it with.
    """
    refuse_existing(to)
    found = source.open_folder(hub.folder_of(name, revision))
    tensors = found.tensors()
    cfg = run_config(found, to, overrides, dtype or source.widest(tensors).name)
    model = built(cfg, Layout())
    moves = moves_of(found.family, found.cfg.vocab_size, model, tensors)
    source.check_names(found, tensors, moves)
    with new_folder(to) as folder:
        write_parameters(folder, model, tensors, moves)
        describe(folder, cfg, model, found, tensors)
        unproven = convert_check.of_import(folder, found, model, tensors) if check else NOT_ASKED
    print(f"{to}: {found.family.title}, {registry.count_parameters(model.shapes()):,} parameters "
          f"({cfg.precision.params})", flush=True)  # fmt: skip
    convert_check.say_unproven(unproven)


def run_config(found: Source, to: str, overrides: Sequence[str], dtype: str) -> Config:
    """The run's config: the source's model, its tokenizer, and defaults that training and evaluation accept."""
    if dtype == "float16":
        raise UserError("--dtype=float16: parameters are kept in float32, bfloat16 or float64; float32 holds float16's")
    files = ("tokenizer.json", "tokenizer.model")
    has_tokenizer = any((found.folder / name).is_file() for name in files)
    base = Config(
        name=os.path.basename(to),
        model=found.cfg,
        data=DataConfig(
            tokenizer=f"{to}/tokenizer" if has_tokenizer else "none",
            eos=eos_habit(found.folder) if has_tokenizer else "none",
            sequence_length=min(found.cfg.max_length, 1024),
        ),
        train=TrainConfig(steps=1000),
        precision=PrecisionConfig(params=dtype),
    )
    cfg = config.override(base, overrides)
    config.check(cfg)
    ours, theirs = function_of(cfg.model), function_of(found.cfg)
    for field in dataclasses.fields(ours):
        if getattr(ours, field.name) != getattr(theirs, field.name):
            raise ConfigError(
                f"model.{field.name} = {getattr(cfg.model, field.name)!r}: the checkpoint was made with "
                f"{getattr(theirs, field.name)!r}, and another value would make it another model; leave it out"
            )
    return cfg


def eos_habit(folder: Path) -> str:
    return "append" if tokenizers.load(folder).eos_id is not None else "none"


def built(cfg: Config, layout: Layout) -> registry.Model:
    return registry.build(cfg.model, layout, Precision.make(cfg.precision))


def moves_of(family: Family, vocab_size: int, model: registry.Model, names: Any) -> list[Move]:
    table = list(family.rules(model.cfg, names))
    return rules.plan(table, model.cfg, model.shapes(), model.axes(), vocab_size)


def by_path(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def write_parameters(folder: Path, model: registry.Model, tensors: dict[str, Tensor], moves: Sequence[Move]) -> None:
    """Stream the source's tensors into checkpoint 0 of the run in `folder`."""
    shapes = {f"params/{path}": leaf for path, leaf in by_path(model.shapes()).items()}
    depths = {f"params/{slot.path}": len(slot.index) for move in moves for slot in move.ours}
    streamed = StreamedCheckpoint(folder / "arrays", shapes, depths)
    with told("reading", sum(tensor.nbytes for tensor in tensors.values())) as advance:
        for move in sorted(moves, key=lambda move: (tensors[move.theirs[0]].file, tensors[move.theirs[0]].start)):
            theirs = [tensors[name] for name in move.theirs]
            origin = " and ".join(f"the tensor {tensor.name} in {tensor.file}" for tensor in theirs)
            ours = move.transform.to_ours([tensor.read() for tensor in theirs])
            for slot, values in zip(move.ours, ours, strict=True):
                streamed.write(f"params/{slot.path}", slot.index, values, origin)
            del ours, values
            advance(sum(tensor.nbytes for tensor in theirs), len(theirs))
    streamed.finish(folder, step=0)


def describe(folder: Path, cfg: Config, model: registry.Model, found: Source, tensors: dict[str, Tensor]) -> None:
    """All of a run's folder but its checkpoint, and the files that lay beside the weights."""
    tokenizer: Any = tokenizers.NoTokenizer(cfg.model.vocab_size)
    if cfg.data.tokenizer != "none":
        tokenizer = tokenizers.load(found.folder)
    run_folder.write(folder, config.to_dict(cfg), tokenizer, model.shapes(), model.axes())
    beside = folder / BESIDE
    beside.mkdir()
    for name in source.BESIDE:
        if (found.folder / name).is_file():
            shutil.copyfile(found.folder / name, beside / name)
    usual = most_frequent([tensor.dtype.name for tensor in tensors.values()])
    others = {name: tensor.dtype.name for name, tensor in tensors.items() if tensor.dtype.name != usual}
    run_folder.write_json(beside / NOTES, {"architecture": found.family.architecture, "dtype": usual,
                                           "other_dtypes": others})  # fmt: skip


def most_frequent(words: Sequence[str]) -> str:
    return max(sorted(set(words)), key=list(words).count)


# ---------------------------------------------------------------------------------------------- to the hub


def to_hub(
    workdir: str,
    to: str,
    *,
    step: int | None = None,
    architecture: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    check: bool = True,
) -> None:
    """Write the folder `to`, as transformers and its like read it, from a run's checkpoint.

    Args:
      workdir: the run's folder.
      to: absolute path of the new folder.
      step: which checkpoint; None: the latest.
      architecture: of the hub; None: the one that the run was converted from, else the first that can say the model.
      dtype: of the tensors; None: those of the source, else that of the parameters.
      shard_bytes: the largest file, unless one tensor is larger.
      check: compare the logits in the end.

    Raises: as `from_hub`; UserError where the family cannot say the model.
    """
    refuse_existing(to)
    if jax.process_count() > 1:
        raise UserError("convert runs as one process: start it on one machine, without the others")
    cfg = restore.read_config(workdir)
    beside = files_beside(workdir, cfg)
    notes = json.loads((beside / NOTES).read_text(encoding="utf-8")) if beside else {}
    family = family_of_run(cfg.model, architecture, notes.get("architecture"))
    written = family.hf_config(cfg.model)  # refused here, before anything is read
    run = restore.restore(workdir, step)
    moves = moves_of(family, written["vocab_size"], run.model, ())
    same = notes.get("architecture") == family.architecture
    dtypes = tensor_dtypes(moves, dtype, notes if same else {}, cfg.precision.params)
    with new_folder(to) as folder:
        write_tensors(folder, by_path(run.params), moves, dtypes, shard_bytes)
        write_config(folder, family, run.cfg.model, beside if same else None, most_frequent(list(dtypes.values())))
        write_tokenizer(folder, run.tokenizer, beside)
        leaf_dtypes = {slot.path: dtypes[move.theirs[0]] for move in moves for slot in move.ours}
        unproven = convert_check.of_export(folder, run, leaf_dtypes) if check else NOT_ASKED
    print(f"{to}: {family.architecture} of step {run.step} of {workdir}", flush=True)
    convert_check.say_unproven(unproven)


def files_beside(workdir: str, cfg: Config) -> Path | None:
    """The hub's files that the run, or the run whose parameters it started from, was converted from."""
    starts = (workdir, cfg.checkpoint.init_from, cfg.checkpoint.resume_from)
    return next((Path(start) / BESIDE for start in starts if start and (Path(start) / BESIDE / NOTES).is_file()), None)


def family_of_run(cfg: DecoderConfig, asked: str | None, came_from: str | None) -> Family:
    if asked:
        return families.find(asked, "--architecture")
    if came_from in families.FAMILIES:
        with contextlib.suppress(UserError):
            families.FAMILIES[came_from].hf_config(cfg)
            return families.FAMILIES[came_from]
    return families.that_can_say(cfg)


def tensor_dtypes(moves: Sequence[Move], asked: str | None, notes: dict[str, Any], params: str) -> dict[str, str]:
    usual, others = asked or notes.get("dtype", params), {} if asked else notes.get("other_dtypes", {})
    return {name: others.get(name, usual) for move in moves for name in move.theirs}


def write_tensors(
    folder: Path, leaves: dict[str, jax.Array], moves: Sequence[Move], dtypes: dict[str, str], shard_bytes: int
) -> None:
    """Every tensor of theirs, one layer and one expert of ours at a time."""
    planned, whence = [], {}
    for move in moves:
        for name, shape in zip(move.theirs, move.their_shapes, strict=True):
            planned.append(Planned(name, safetensors.DTYPES[DTYPES[dtypes[name]]], shape))
            whence[name] = move
    with told("writing", sum(tensor.nbytes for tensor in planned)) as advance:

        def produce(tensor: Planned) -> np.ndarray:
            move = whence[tensor.name]
            ours = [slice_of(leaves[slot.path], slot) for slot in move.ours]
            theirs = move.transform.to_theirs(ours)[move.theirs.index(tensor.name)]
            advance(tensor.nbytes, 1)
            return cast(theirs, tensor)

        safetensors.write_folder(folder, planned, produce, largest=shard_bytes)


def slice_of(leaf: jax.Array, slot: rules.Slot) -> np.ndarray:
    """What lies in the slot, without what fills the vocabulary up, in the host's memory."""
    return np.asarray(leaf[slot.index] if slot.index else leaf)[tuple(slice(size) for size in slot.shape)]


def cast(values: np.ndarray, tensor: Planned) -> np.ndarray:
    """Raises DataError where a number is too large for the dtype."""
    with np.errstate(over="ignore"):
        found = values.astype(tensor.dtype)
    if tensor.dtype == np.float16 and not np.isfinite(found).all():
        raise DataError(f"{tensor.name} has numbers too large for float16: give --dtype=bfloat16 or float32")
    return found


def write_config(folder: Path, family: Family, cfg: DecoderConfig, beside: Path | None, dtype: str) -> None:
    """config.json: what the model says, and what the source's said that says nothing about the model."""
    values: dict[str, Any] = {}
    if beside:
        values = json.loads((beside / "config.json").read_text(encoding="utf-8"))
        for name in ("rope_parameters", "partial_rotary_factor", "layer_types", "dtype", "_name_or_path"):
            values.pop(name, None)
    values |= family.hf_config(cfg) | {"torch_dtype": dtype}
    path = folder / "config.json"
    run_folder.write_json(path, values)
    if function_of(family.config(values, str(path))) != function_of(cfg):
        raise UserError(f"{path} would describe another model, by what the source's config.json says beside")


def write_tokenizer(folder: Path, tokenizer: Any, beside: Path | None) -> None:
    """The tokenizer's files, the source's own where the run was converted from one, and generation_config.json."""
    for name in source.BESIDE if beside else ():
        if name != "config.json" and (beside / name).is_file():
            shutil.copyfile(beside / name, folder / name)
    for name, content in tokenizer._files().items():
        (folder / name).write_bytes(content)
    eos = tokenizer.eos_id
    if not (folder / "generation_config.json").exists():
        special = {} if eos is None else {"eos_token_id": eos}
        run_folder.write_json(folder / "generation_config.json", {"_from_model_config": True} | special)
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        special = {} if eos is None else {"eos_token": tokenizer._added[eos].content}
        run_folder.write_json(
            folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special
        )


# --------------------------------------------------------------------------------------------------- dry run


def mapping(name: str, *, overrides: Sequence[str] = (), dtype: str | None = None, revision: str | None = None) -> str:
    """`--dry_run`: each of their tensors, what it becomes, shape, dtype, how the mesh splits it. Reads no weights."""
    found = source.open_folder(hub.folder_of(name, revision, weights=False))
    try:
        tensors = found.tensors()
    except DataError:  # a name on the hub, of which the small files alone were fetched
        tensors = {}
    kept = dtype or (source.widest(tensors).name if tensors else found.values.get("torch_dtype") or "float32")
    cfg = run_config(found, name, overrides, "float32" if kept == "float16" else kept)
    sizes = [getattr(cfg.mesh, axis) for axis in MESH_AXES]
    layout = sharding.abstract_layout(cfg.mesh, jax.device_count() if -1 in sizes else int(np.prod(sizes)))
    model = built(cfg, layout)
    moves = moves_of(found.family, found.cfg.vocab_size, model, tensors)
    if tensors:
        source.check_names(found, tensors, moves)
    return table(moves, tensors, model, layout, cfg.precision.params)


def table(
    moves: Sequence[Move], tensors: dict[str, Tensor], model: registry.Model, layout: Layout, params: str
) -> str:
    splits = by_path(layout.parameter_shardings(model.shapes(), model.axes()))
    lines = [("theirs", "ours", "shape", "dtype", "split over")]
    for move in moves:
        for i, slot in enumerate(move.ours):
            name = move.theirs[i] if i < len(move.theirs) else ""
            tensor = tensors.get(name)
            dtype = f"{tensor.dtype.name} to {params}" if tensor and tensor.dtype.name != params else params
            place = slot.path + (str(list(slot.index)) if slot.index else "")
            lines.append((name, place, "x".join(map(str, slot.shape)), dtype, split_over(splits[slot.path])))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    row = lambda line: [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)] + [line[4]]  # noqa: E731
    return "\n".join("  ".join(row(line)).rstrip() for line in lines)


def split_over(placed: jax.sharding.NamedSharding) -> str:
    """The mesh axes that split a parameter, those of size 1 left out."""
    axes = [axis for part in placed.spec if part for axis in ([part] if isinstance(part, str) else part)]
    return " ".join(axis for axis in axes if placed.mesh.shape[axis] > 1)


def support_table() -> str:
    """`--list`: the families that can be converted."""
    lines = [("architecture", "models"), *((f.architecture, f.title) for f in families.FAMILIES.values())]
    width = max(len(line[0]) for line in lines)
    return "\n".join(f"{first:<{width}}  {second}" for first, second in lines)


# ---------------------------------------------------------------------------------------------------- parts


def refuse_existing(to: str) -> None:
    if os.path.exists(to):
        raise UserError(f"--to={to}: it exists already; give a new folder, nothing is overwritten")


@contextlib.contextmanager
def new_folder(to: str) -> Iterator[Path]:
    """A folder beside `to` that gets its name when all has gone well, and goes when anything has not."""
    folder = Path(f"{to}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--to={to}: nothing can be written there ({error.strerror})") from None
    try:
        yield folder
        flush(folder)
        os.rename(folder, to)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"--to={to}: it could not be written ({error}); nothing was kept") from error
        raise
