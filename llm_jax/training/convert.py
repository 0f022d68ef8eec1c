"""`llm-jax convert`: a checkpoint of the hub becomes a run's folder, and a run a checkpoint of the hub.

Both ways follow one plan of moves (`convert/rules.py`) and hold one tensor at a time. What is written goes to a folder
of another name, is compared with its source, and only then gets the name that was asked for.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config
from llm_jax.backend import start_backend
from llm_jax.config import (
    ColumnsConfig,
    Config,
    DataConfig,
    EncoderConfig,
    MaskingConfig,
    PrecisionConfig,
    TrainConfig,
    TransformerConfig,
)
from llm_jax.config.schema import MASKED_TASKS
from llm_jax.config.tasks import HEADS
from llm_jax.convert import families, hub, peft, pieces, reference, rules, safetensors, source
from llm_jax.convert.family import Family, differences_in_function
from llm_jax.convert.peft import Adapter
from llm_jax.convert.progress import told
from llm_jax.convert.rules import Move
from llm_jax.convert.safetensors import Planned, Tensor
from llm_jax.convert.source import Source
from llm_jax.data import tokenizers
from llm_jax.errors import ConfigError, DataError, UserError
from llm_jax.models import lora, registry
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training import adapters, checkpoint, convert_check, hub_files, restore, run_folder
from llm_jax.training.arrays import by_path
from llm_jax.training.new_folder import new_folder, refuse_existing
from llm_jax.training.parameters import SavedParameters
from llm_jax.training.streamed import StreamedCheckpoint

SHARD_BYTES = 5 * 10**9
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# ------------------------------------------------------------------------------------------- from the hub


def from_hub(
    name: str,
    to: str,
    *,
    overrides: Sequence[str] = (),
    dtype: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    merge: bool = False,
    check: bool = True,
    streamed: bool | None = None,
) -> None:
    """Write the run folder `to` from a checkpoint of the hub.

    Args:
      name: a path, or a name on the hub, as "owner/name" or "owner/name@revision".
      to: absolute path of the run's folder, which must not exist yet.
      overrides: "key=value" changes to the run's config, such as a mesh or `model.scan_layers`.
      dtype: of the parameters; None: the one that holds all of the source's tensors exactly.
      revision: of `name` on the hub; an adapter has its own ("owner/name@revision").
      adapter: path or name of an adapter as `peft` saves it, which the run has then too (`model.lora`).
      merge: add the adapter to the weights it changes instead; a tied head that it changes is untied.
      check: compare the logits in the end.
      streamed: with one layer's parameters in memory at a time; None: where all would take too much.

    Raises:
      UserError: the source is damaged, incomplete or cannot be said here.
      ConversionMismatch: the logits differ.
      Unproven: it was written, and nothing was there to compare it with.
    """
    refuse_existing(to)
    refuse_several("convert")
    found = source.open_folder(hub.folder_of(name, revision))
    given = None if adapter is None else peft.read(adapter_folder(adapter))
    if given is not None:
        found = adapters.fitted(found, given, merge=merge)
    tensors = found.tensors()
    cfg = run_config(found, to, overrides, dtype or source.widest(tensors, found.family.wide).name)
    start_backend(cfg)  # 64 bits, where asked for
    moves = moves_of(found.family, found.cfg.vocab_size, built(cfg, Layout()), tensors)
    source.check_names(found, tensors, moves)
    if given is not None:
        cfg = adapters.joined(cfg, found, given, moves, merge=merge)
    model = built(cfg, Layout())
    with new_folder(to) as folder:
        write_parameters(folder, model, tensors, moves, given)
        hub_files.describe(folder, cfg, model, found, tensors, hub.split(name)[0])
        unproven = convert_check.NOT_ASKED
        if check:
            unproven = convert_check.of_import(folder, found, model, tensors, given, merge=merge, streamed=streamed)
    for line in found.left_out():
        print(line, flush=True)
    print(f"{to}: {found.family.title}, {registry.count_parameters(model.shapes()):,} parameters "
          f"({cfg.precision.params})", flush=True)  # fmt: skip
    convert_check.say_unproven(unproven)


def adapter_folder(name: str) -> Path:
    return hub.folder_of(name, None, weights=False, also=(*peft.FILES, reference.STORED))


def run_config(found: Source, to: str, overrides: Sequence[str], dtype: str) -> Config:
    """The run's config: the source's model, its tokenizer, and defaults that training and evaluation accept."""
    if dtype == "float16":
        raise UserError("--dtype=float16: parameters are kept in float32, bfloat16 or float64; float32 holds float16's")
    base = Config(
        name=os.path.basename(to),
        model=found.cfg,
        data=data_config(found, to),
        train=TrainConfig(steps=1000),
        precision=PrecisionConfig(params=dtype),
    )
    cfg = config.override(base, overrides)
    config.check(cfg)
    for key, ours, theirs in differences_in_function(cfg.model, found.cfg):
        raise ConfigError(
            f"{key} = {ours!r}: the checkpoint was made with {theirs!r}, and another value would make it another "
            "model; leave it out"
        )
    return cfg


def data_config(found: Source, to: str) -> DataConfig:
    """Of a decoder the language, of an encoder what its head was made for; without data of its own."""
    length, there = min(found.cfg.max_length, 1024), hub_files.has_tokenizer(found.folder)
    if not isinstance(found.cfg, EncoderConfig):
        tokenizer, eos = (f"{to}/tokenizer", eos_habit(found.folder)) if there else ("none", "none")
        return DataConfig(tokenizer=tokenizer, eos=eos, sequence_length=length)
    task = task_of(found)
    masked = task in MASKED_TASKS
    return DataConfig(
        task=task,
        path="stdlib" if masked else "records.jsonl",
        tokenizer=f"{to}/tokenizer",
        eos="lines" if masked else "append",
        sequence_length=length,
        columns=ColumnsConfig(pair="pair" if task == "similarity" else "", choices=ENDINGS if task == "choice" else ()),
        masking=MaskingConfig(next_sentence=found.cfg.head == "masked_pairs") if masked else MaskingConfig(),
    )


ENDINGS = ("ending0", "ending1", "ending2", "ending3")  # the columns of SWAG, which such models are trained on


def task_of(found: Source) -> str:
    """`data.task` of an encoder's head; of a text's labels by `problem_type`, and without it as transformers does."""
    task = next(task for task, heads in HEADS.items() if found.cfg.head in heads)
    if found.family.architecture.endswith("ForMultipleChoice"):
        return "choice"
    if task != "classification":
        return task
    labels = found.cfg.num_labels
    problem = found.values.get("problem_type") or hub_files.PROBLEMS[hub_files.usual_task(labels)]
    tasks = {name: task for task, name in hub_files.PROBLEMS.items()}
    if problem not in tasks or (problem == "regression" and labels > 1):
        raise DataError(f"{found.folder}/config.json: problem_type = {problem!r} with {labels} labels: our models give "
                        f"{', '.join(tasks)} of one value")  # fmt: skip
    return tasks[problem]


def eos_habit(folder: Path) -> str:
    return "append" if tokenizers.load(folder).eos_id is not None else "none"


def built(cfg: Config, layout: Layout) -> registry.Model:
    return registry.build(cfg.model, layout, Precision.make(cfg.precision))


def moves_of(family: Family, vocab_size: int, model: registry.Model, names: Any) -> list[Move]:
    table = list(family.rules(model.cfg, names))
    return rules.plan(table, model.cfg, model.shapes(), model.axes(), vocab_size)


def write_parameters(
    folder: Path,
    model: registry.Model,
    tensors: dict[str, Tensor],
    moves: Sequence[Move],
    adapter: Adapter | None = None,
) -> None:
    """Stream the source's tensors into checkpoint 0 of the run in `folder`.

    An adapter joins its layers as it is where the model has adapters (`model.lora`), else it is added to their kernels.
    """
    shapes = {f"params/{path}": leaf for path, leaf in by_path(model.shapes()).items()}
    depths = {f"params/{slot.path}": len(slot.index) for move in moves for slot in move.ours}
    modules = adapters.modules_of(moves) if adapter else {}
    beside = [path for path in shapes if lora.is_adapter(path)]
    depths |= {path: depths[f"{path.rpartition('/')[0]}/kernel"] for path in beside}
    streamed = StreamedCheckpoint(folder / "arrays", shapes, depths)
    with told("reading", sum(tensor.nbytes for tensor in tensors.values())) as advance:
        order = sorted(moves, key=lambda move: (tensors[move.theirs[0]].file, tensors[move.theirs[0]].start))
        size = lambda move: sum(tensors[name].nbytes for name in move.theirs)  # noqa: E731
        read = lambda move: [tensors[name].read() for name in move.theirs]  # noqa: E731
        for move, arrays in pieces.ahead(order, read, size):
            theirs = [tensors[name] for name in move.theirs]
            origin = " and ".join(f"the tensor {tensor.name} in {tensor.file}" for tensor in theirs)
            part = adapter.parts.get(move.theirs[0].removesuffix(".weight")) if adapter else None
            if part is not None and beside:
                for path, index, values in adapters.arrays_of(modules[part.module], part):
                    streamed.write(f"params/{path}", index, values, f"the adapter of {part.module} in {part.a.file}")
            elif part is not None:
                part.check_weight(arrays[0])
                dtype = model.module.precision.params
                arrays = [part.added_to(arrays[0], dtype, conv=part.module in modules and modules[part.module].conv)]
            ours = move.transform.to_ours(arrays)
            for slot, values in zip(move.ours, ours, strict=True):
                streamed.write(f"params/{slot.path}", slot.index, values, origin)
            del ours, values, arrays
            advance(size(move), len(theirs))
    streamed.finish(folder, step=0)


# ---------------------------------------------------------------------------------------------- to the hub


def to_hub(
    workdir: str,
    to: str,
    *,
    step: int | None = None,
    architecture: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    adapter: bool = False,
    check: bool = True,
    streamed: bool | None = None,
) -> None:
    """Write the folder `to`, as transformers and its like read it, from a run's checkpoint.

    Args:
      workdir: the run's folder.
      to: absolute path of the new folder.
      step: which checkpoint; None: the latest.
      architecture: of the hub; None: the one that the run was converted from, else the first that can say the model.
      dtype: of the tensors; None: those of the source, else that of the parameters.
      shard_bytes: the largest file, unless one tensor is larger.
      adapter: write the run's adapters alone, as `peft` reads them; else they are merged.
      check, streamed: as `from_hub`.

    Raises: as `from_hub`; UserError where the family cannot say the model.
    """
    refuse_existing(to)
    refuse_several("convert")
    cfg = restore.read_config(workdir)
    start_backend(cfg)  # 64 bits, where the run has them
    if adapter and not cfg.model.lora.rank:
        raise UserError(f"--adapter: the run {workdir} has none (model.lora.rank is 0); leave it out")
    if adapter and isinstance(cfg.model, EncoderConfig) and cfg.model.head != "embedding":
        reason = f"the head ({cfg.model.head}) was trained beside the adapters, and would not be in their file"
        raise UserError(f"--adapter: {reason}; leave it out for the model with its adapters merged")
    plain = convert_check.as_written(cfg)
    beside, notes = hub_files.beside(workdir, cfg)
    family = family_of_run(plain.model, architecture, notes.get("architecture"), notes.get("needs", ()))
    written = family.hf_config(plain.model)  # refused here, before anything is read
    moves = moves_of(family, written["vocab_size"], built(plain, Layout()), ())
    same = notes.get("architecture") == family.architecture
    dtypes = tensor_dtypes(moves, dtype, notes if same else {}, cfg.precision.params)
    if step is None and cfg.checkpoint.use == "best":
        step = checkpoint.best_step(workdir)

    def write(path: Path, step: int) -> tuple[int, reference.Missing | None]:
        with new_folder(to) as folder:
            with SavedParameters(path, cfg) as saved:
                if adapter:
                    base = notes.get("name") if same else None
                    kind = safetensors.DTYPES[DTYPES[dtype or "float32"]]
                    adapters.write(folder, moves, saved.adapted, saved.read, cfg.model.lora, kind, base)
                else:
                    write_tensors(folder, saved.slot, moves, dtypes, shard_bytes)
            if not adapter:
                usual = hub_files.most_frequent(list(dtypes.values()))
                hub_files.write_config(folder, family, plain.model, beside if same else None, usual,
                                       run_folder.read_labels(workdir), cfg.data.task)  # fmt: skip
                hub_files.write_tokenizer(folder, tokenizers.load(f"{workdir}/tokenizer"), beside)
            if not check:
                return step, convert_check.NOT_ASKED
            if adapter:
                return step, convert_check.of_adapter(folder, workdir, step, base, streamed=streamed)
            leaf_dtypes = {slot.path: dtypes[move.theirs[0]] for move in moves for slot in move.ours}
            return step, convert_check.of_export(folder, workdir, step, leaf_dtypes, streamed=streamed)

    step, unproven = checkpoint.first_intact(workdir, step, write)
    what = "adapters for " if adapter else ""
    print(f"{to}: {what}{family.architecture} of step {step} of {workdir}", flush=True)
    convert_check.say_unproven(unproven)


def family_of_run(cfg: TransformerConfig, asked: str | None, came_from: str | None, needs: Sequence[str]) -> Family:
    """`came_from`, `needs`: of the architecture that the run was converted from, and of its form."""
    if asked:
        families.find(asked, "--architecture")
        forms = families.forms_of(asked)
        return families.that_can_say(cfg, forms) if len(forms) > 1 else forms[0]
    if came_from in families.FAMILIES:
        with contextlib.suppress(UserError):
            forms = sorted(families.forms_of(came_from), key=lambda form: list(form.needs) != list(needs))
            return families.that_can_say(cfg, forms)
    return families.that_can_say(cfg)


def tensor_dtypes(moves: Sequence[Move], asked: str | None, notes: dict[str, Any], params: str) -> dict[str, str]:
    usual, others = asked or notes.get("dtype", params), {} if asked else notes.get("other_dtypes", {})
    return {name: others.get(name, usual) for move in moves for name in move.theirs}


def write_tensors(
    folder: Path,
    read: Callable[[rules.Slot], np.ndarray],
    moves: Sequence[Move],
    dtypes: dict[str, str],
    shard_bytes: int,
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
            ours = [read(slot) for slot in move.ours]
            theirs = move.transform.to_theirs(ours)[move.theirs.index(tensor.name)]
            advance(tensor.nbytes, 1)
            return cast(theirs, tensor)

        safetensors.write_folder(folder, planned, produce, largest=shard_bytes)


def cast(values: np.ndarray, tensor: Planned) -> np.ndarray:
    """Raises DataError where a number is too large for the dtype."""
    with np.errstate(over="ignore"):
        found = values.astype(tensor.dtype, copy=False)
    if tensor.dtype == np.float16 and not np.isfinite(found).all():
        raise DataError(f"{tensor.name} has numbers too large for float16: give --dtype=bfloat16 or float32")
    return found


# ---------------------------------------------------------------------------------------------------- parts


def refuse_several(command: str) -> None:
    if jax.process_count() > 1:
        raise UserError(f"{command} runs as one process: start it on one machine, without the others")
