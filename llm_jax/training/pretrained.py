"""Starting from what others have trained: a checkpoint of the hub under a model of ours, with a head of its own.

`adopt` takes over the model's config and the tokenizer; `start_from` the parameters. What the checkpoint has no
parameters for must belong to the head, and starts fresh; what it has beside is left out. Both are told.
"""

import collections
import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config, distributed
from llm_jax.config import Config
from llm_jax.config.tasks import HEADS
from llm_jax.convert import hub, source
from llm_jax.convert.family import differences_in_function
from llm_jax.convert.rules import Move
from llm_jax.convert.safetensors import Tensor
from llm_jax.data import tokenizers
from llm_jax.errors import ConfigError, DataError
from llm_jax.models import registry
from llm_jax.precision import Precision
from llm_jax.sharding import Layout, path_name
from llm_jax.training import convert, hub_files, restore, starts
from llm_jax.training.heads import origins
from llm_jax.training.record import some

HUB = "hf:"
NAMED = 12  # parameters that a sentence names


def adopt(cfg: Config, given: Collection[str] | None = None) -> Config:
    """`cfg` with the model and the tokenizer of what `checkpoint.init_from` names: a checkpoint of the hub ("hf:PATH")
    or, of an encoder, another run.

    Each key of `model` that was given stays as it is, such as model.dropout.attention; the head is that of the task,
    and layers are stacked (model.scan_layers) as those of the other run.

    Args:
      cfg: as the config file and the overrides make it.
      given: the full names of the keys that those set (`config.given`); None: the ones that are not at their defaults.

    Raises:
      UserError: there is no such checkpoint, or it cannot be said here.
      ConfigError: the tokenizer that the config names is another model's.
    """
    name = cfg.checkpoint.init_from
    if name.startswith(HUB):
        folder = hub.folder_of(name.removeprefix(HUB), None)
        theirs = source.open_folder(folder).cfg
    elif name and cfg.data.task in HEADS:
        theirs, folder = restore.read_config(name).model, Path(name) / "tokenizer"
    else:
        return cfg
    if given is None:
        given = {key for key, _, _ in config.differences(cfg, dataclasses.replace(cfg, model=type(cfg.model)()))}
        given |= {"model.family"} if cfg.model.family != Config().model.family else set()
    given = {key for key in given if key.startswith("model.")}
    if given and cfg.model.family != theirs.family:
        raise ConfigError(
            f"model.family = {cfg.model.family!r}: {name} is of the family {theirs.family}; leave the model out of the "
            "config, and it is taken from there"
        )
    ours = cfg.model
    if cfg.data.task in HEADS:
        fitting = HEADS[cfg.data.task]
        plain = cfg.data.task == "masked" and not cfg.data.masking.next_sentence
        theirs = under_head(theirs, fitting[-1] if plain else fitting[0])
        given.discard("model.head")
        if not name.startswith(HUB):
            given.discard("model.scan_layers")
    data = dataclasses.replace(cfg.data, tokenizer=tokenizer_of(cfg, folder))
    return dataclasses.replace(cfg, model=laid_over(theirs, ours, given, "model."), data=data)


def laid_over(theirs: Any, ours: Any, given: Collection[str], prefix: str) -> Any:
    """`theirs` with the given keys of `ours`, one by one: the others of a group, such as model.dropout, stay theirs."""
    changes = {}
    for field in dataclasses.fields(theirs):
        key, value = f"{prefix}{field.name}", getattr(theirs, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = laid_over(value, getattr(ours, field.name), given, f"{key}.")
        elif key in given:
            changes[field.name] = getattr(ours, field.name)
    return dataclasses.replace(theirs, **changes)


def tokenizer_of(cfg: Config, folder: Path) -> str:
    """The path of the tokenizer: the checkpoint's, or the config's own, which must have the same vocabulary."""
    theirs = folder / "tokenizer.json"
    given = cfg.data.tokenizer
    if given == "byte":  # the default: an encoder or decoder of the hub has none of bytes
        if not theirs.is_file() and not (folder / "tokenizer.model").is_file():
            raise DataError(f"{folder} has neither tokenizer.json nor tokenizer.model; set data.tokenizer to the "
                            "tokenizer.json of this model")  # fmt: skip
        return str(theirs if theirs.is_file() else folder / "tokenizer.model")
    own = Path(given).expanduser()
    comparable = theirs.is_file() and own.is_file() and own.suffix == ".json"
    if comparable and vocabulary(own) != vocabulary(theirs):
        raise ConfigError(
            f"data.tokenizer = {given!r}: it is not the tokenizer of the checkpoint in {folder}, whose ids mean other "
            "text; leave it out, and the checkpoint's own is taken"
        )
    return given


def vocabulary(path: Path) -> Any:
    """The table of tokens of a tokenizer.json."""
    tokenizers.read(str(path))  # refuses what is none
    return json.loads(path.read_text(encoding="utf-8"))["model"].get("vocab")


def start_from(name: str, params: Any, cfg: Config, workdir: str = "") -> tuple[Any, str]:
    """Fresh parameters with those of a checkpoint of the hub in their places. One of ours at a time is on the host.

    Args:
      name: "hf:" and a path or name.
      params: fresh ones; they keep their dtypes and shardings.
      cfg: of the run.
      workdir: the run's folder, which gets the files beside the weights for a later way back; "": none.

    Returns:
      The parameters, and one sentence for the reader.

    Raises:
      DataError: the checkpoint lacks parameters that are not the head's, or has them in another shape.
    """
    begin = Beginning.of(name, convert.by_path(params), cfg)
    parts = collections.defaultdict(list)
    for move in begin.moves:
        for path in {slot.path for slot in move.ours}:
            parts[path].append(move)

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        origin = begin.origins.get(path_name(path))
        return leaf if origin is None else read(origin, parts[origin], begin.tensors, leaf)

    params = jax.tree_util.tree_map_with_path(one, params)
    if workdir:
        there = hub.split(name.removeprefix(HUB))[0]
        distributed.on_main(lambda: hub_files.keep_beside(Path(workdir), begin.found, begin.tensors, there))
    return params, begin.told


def preview(cfg: Config, shapes: Any) -> list[str]:
    """For `train --dry_run`: what `init_from` would take over and leave out. Of the hub's weights it reads the headers,
    and where a tied head is stored beside its embedding those two; of a run the newest checkpoint's record.

    Args:
      shapes: of the run's parameters, a tree of ShapeDtypeStruct.

    Raises: as `start_from`, or `starts.start`.
    """
    name, ours = cfg.checkpoint.init_from, convert.by_path(shapes)
    if name.startswith(HUB):
        return [Beginning.of(name, ours, cfg).told]
    return [starts.preview(name, ours)] if name else []


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What of a checkpoint of the hub goes where.

    Attributes:
      found: the checkpoint.
      tensors: of it, less what says nothing more.
      moves: between its tensors and the parameters of its own model, as we would have it.
      origins: {path here: path there} of the parameters that are taken over.
      told: one sentence for the reader.
    """

    found: source.Source
    tensors: dict[str, Tensor]
    moves: list[Move]
    origins: dict[str, str]
    told: str

    @staticmethod
    def of(name: str, ours: Mapping[str, Any], cfg: Config) -> "Beginning":
        """`ours`: the run's parameters by path, or their shapes."""
        found = source.open_folder(hub.folder_of(name.removeprefix(HUB), None))
        tensors = found.tensors()
        theirs = registry.build(under_their_head(cfg.model, found.cfg), Layout(), Precision.make(cfg.precision))
        try:
            moves = convert.moves_of(found.family, found.cfg.vocab_size, theirs, tensors)
        except ValueError as error:  # the table cannot cover what the config has beside
            raise ConfigError(f"model: {name} is another model than this config's ({error}); leave the keys of model "
                              "out of the config, and they are taken from there") from None  # fmt: skip
        source.check_names(found, tensors, moves)
        sources = origins(ours, convert.by_path(theirs.shapes()), str(found.folder))
        taken = set(sources.values())
        left = [move for move in moves if taken.isdisjoint(slot.path for slot in move.ours)]
        lines = [f"begins at step 0 with {len(sources)} parameters of {name}"]
        if fresh := sorted(path for path in ours if path not in sources):
            lines.append(f"fresh: {some(fresh, count=NAMED)}")
        for key, mine, other in differences_in_function(under_their_head(cfg.model, found.cfg), found.cfg):
            lines.append(f"with {key} = {mine!r}, where it was trained with {other!r}")
        if left:
            lines.append(f"not taken over: {some([theirs for move in left for theirs in move.theirs], count=NAMED)}")
        return Beginning(found, tensors, moves, sources, "; ".join([*lines, *found.left_out()]))


def read(path: str, moves: Sequence[Move], tensors: Mapping[str, Tensor], like: jax.Array) -> jax.Array:
    """The parameter of the checkpoint's model at `path`, with the shape, dtype and sharding of `like`."""
    array = np.zeros(like.shape, like.dtype)
    for move in moves:
        ours = move.transform.to_ours([tensors[name].read() for name in move.theirs])
        for slot, values in zip(move.ours, ours, strict=True):
            if slot.path == path:  # what fills a padded vocabulary up, on whichever axis, stays zero
                array[(*slot.index, *(slice(size) for size in values.shape))] = values
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])


def under_their_head(ours: Any, theirs: Any) -> Any:
    """Our model as it would be with the checkpoint's own head, and without adapters: stacked and padded as ours is."""
    heads = {name: getattr(theirs, name) for name in ("head", *READ_BY) if hasattr(theirs, "head")}
    return dataclasses.replace(ours, lora=type(ours.lora)(), **heads)


# Keys of an encoder that some heads alone read.
READ_BY = {
    "num_labels": ("text", "token"), "head_dropout": ("text", "token"), "head_form": ("text", "token", "pooled"),
    "head_pooling": ("text", "pooled"), "tie_embeddings": ("masked", "masked_pairs"),
    "generator_divisor": ("replaced",),
}  # fmt: skip


def under_head(theirs: Any, head: str) -> Any:
    """A checkpoint's model with another head, without what its own head alone had to say."""
    default = type(theirs)()
    unread = {name: getattr(default, name) for name, heads in READ_BY.items() if head not in heads}
    return dataclasses.replace(theirs, head=head, **unread)
