"""Where a run starts: its own checkpoints, another run's whole state or parameters, the hub's, or random numbers."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.config import CheckpointConfig
from llm_jax.errors import CorruptCheckpointError, UserError
from llm_jax.models.lora import is_adapter
from llm_jax.sharding import path_name
from llm_jax.training.arrays import by_path, nested, rebuild
from llm_jax.training.checkpoint import Checkpointer, Tree, check_there, folder_of, load_newest, restore_params, steps
from llm_jax.training.heads import is_head, origins
from llm_jax.training.record import DamagedCheckpoint, check_fit, read_record, some


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
      state: the whole training state.
      data_state: of the data, or None to start at its first sample.
      step: steps already done.
      how: one sentence for the reader.
    """

    state: Tree
    data_state: dict[str, Any] | None
    step: int
    how: str


def start(
    cfg: CheckpointConfig,
    checkpointer: Checkpointer,
    abstract_state: Tree,
    init: Callable[[], Tree],
    from_hub: Callable[[str, Tree], tuple[Tree, str]] | None = None,
) -> Start:
    """Own checkpoints, else `resume_from`, else `init_from`, else scratch.

    Args:
      abstract_state: the state as ShapeDtypeStructs with shardings; a dataclass with `params` and `ema`.
      init: makes a fresh state.
      from_hub: (name, fresh parameters) to the parameters of a checkpoint of the hub, and a sentence.

    Raises:
      UserError: `resume` forbids what is there or demands what is not, or a checkpoint does not fit.
      CorruptCheckpointError: there are checkpoints and none is intact. A run never starts over by itself.
    """
    workdir, own = checkpointer.workdir, checkpointer.steps()
    aside = sorted(path.name for path in (workdir / "checkpoints").glob("*.corrupt*"))
    if cfg.resume == "never" and (own or aside):
        raise UserError(
            f"checkpoint.resume='never', but {workdir} holds checkpoints ({some([*map(str, own), *aside])}); choose "
            "another work directory, remove that one, or set checkpoint.resume='auto' to go on"
        )
    if not own and aside:
        raise CorruptCheckpointError(
            f"the checkpoints in {workdir} are all damaged ({some(aside)}). Restore them from a copy, or remove the "
            "folder to start over"
        )
    if own:
        return _whole_state(workdir, own, abstract_state, "goes on from", on_damage=checkpointer.put_aside)
    if cfg.resume == "must":
        raise UserError(
            f"checkpoint.resume='must', but there are no checkpoints in {workdir}; check the path, or set "
            "checkpoint.resume='auto' to start"
        )
    if cfg.resume_from:
        check_there(cfg.resume_from, None)
        return _whole_state(cfg.resume_from, steps(cfg.resume_from), abstract_state, "begins with the whole state of")
    if cfg.init_from.startswith("hf:") and from_hub:
        state = init()
        params, how = from_hub(cfg.init_from, state.params)
        return Start(_with_params(state, params), None, 0, f"{workdir} {how}")
    if cfg.init_from:
        return _parameters_only(cfg.init_from, abstract_state, init)
    if any(map(is_adapter, by_path(abstract_state.params))):
        raise UserError(
            "model.lora trains adapters alone, and this run would start from random numbers: give the run that they "
            "adapt with checkpoint.init_from (llm-jax convert makes one of a Hugging Face checkpoint)"
        )
    return Start(init(), None, 0, f"{workdir} begins from scratch")


def _whole_state(
    workdir: str | os.PathLike[str],
    there: Sequence[int],
    abstract_state: Tree,
    words: str,
    on_damage: Callable[[int, str], None] | None = None,
) -> Start:
    arrays, record, step = load_newest(workdir, there[::-1], by_path(abstract_state), on_damage=on_damage)
    return Start(rebuild(abstract_state, arrays), record["data"], step, f"{words} step {step} of {workdir}")


def _as_saved(saved: Mapping[str, Any], abstract_params: Tree) -> Tree:
    """`abstract_params` with the saved dtype where the wanted one holds all its numbers: a start may be widened."""

    def narrower(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = saved.get(f"params/{path_name(path)}", {}).get("dtype", leaf.dtype)
        fits = jnp.promote_types(dtype, leaf.dtype) == leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype if fits else leaf.dtype, sharding=getattr(leaf, "sharding", None))

    return jax.tree_util.tree_map_with_path(narrower, abstract_params)


def _parameters_only(workdir: str, abstract_state: Tree, init: Callable[[], Tree]) -> Start:
    """The parameters of another run; adapters (`model.lora`) and an encoder's head that it has not start afresh."""
    check_there(workdir, None)
    saved, state = _newest_arrays(workdir), init()
    params = by_path(state.params)
    taken, anew = _sources(workdir, saved, params)
    fresh = {path: params[path] for path in anew}
    del params
    state = dataclasses.replace(state, params=None)  # the other fresh parameters go before their successors come
    wanted = {path: leaf for path, leaf in by_path(abstract_state.params).items() if path not in fresh}
    there = nested({taken.get(path, path): leaf for path, leaf in wanted.items()})
    loaded, step = restore_params(workdir, None, _as_saved(saved, there))
    arrays = by_path(loaded)
    found = {path: arrays[taken.get(path, path)].astype(leaf.dtype) for path, leaf in wanted.items()}
    state = _with_params(state, rebuild(abstract_state.params, found | fresh))
    adapters = sum(map(is_adapter, fresh))
    more = f" and {adapters} fresh arrays of adapters (model.lora)" if adapters else ""
    heads = sorted(filter(is_head, fresh))
    more += f"; fresh: {', '.join(heads)}" if heads else ""
    return Start(state, None, 0, f"begins at step 0 with the parameters of step {step} of {workdir}{more}")


def preview(workdir: str, shapes: Mapping[str, Any]) -> str:
    """For `train --dry_run`: what a run begins with by `init_from`, told by the newest checkpoint's record alone.

    Args:
      shapes: of the run's parameters, by path, with their dtypes.

    Raises:
      UserError: as `start`, where that run is none or does not fit.
    """
    check_there(workdir, None)
    newest = folder_of(workdir, steps(workdir)[-1])
    saved = _newest_arrays(workdir)
    if not saved:
        return f"begins at step 0 with the parameters of {workdir}, whose newest checkpoint is damaged"
    taken, fresh = _sources(workdir, saved, shapes)
    there = nested({taken.get(path, path): leaf for path, leaf in shapes.items() if path not in fresh})
    wanted = {f"params/{path}": leaf for path, leaf in by_path(_as_saved(saved, there)).items()}
    check_fit(newest, saved, wanted, partial=True)
    begins = f"begins at step 0 with the parameters of step {newest.name} of {workdir}"
    return begins + (f"; fresh: {some(sorted(fresh))}" if fresh else "")


def _sources(workdir: str, saved: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """({a head's path here: path there}, the paths that start afresh) of a run's fresh parameters, or their shapes.

    Args:
      saved: of the other run's newest checkpoint (`_newest_arrays`).
    """
    head = {path: leaf for path, leaf in params.items() if is_head(path)}
    taken = origins(head, _shapes(saved), workdir)
    return taken, (head.keys() - taken.keys()) | _fresh_adapters(workdir, saved, params)


def _with_params(state: Tree, params: Tree) -> Tree:
    """A fresh state round other parameters."""
    state = dataclasses.replace(state, params=params)
    if state.ema is not None:  # a copy, for both are donated; it may be wider than the parameters
        copy = lambda p, old: jax.device_put(jnp.array(p, old.dtype), old.sharding)  # noqa: E731
        state = dataclasses.replace(state, ema=jax.tree.map(copy, params, state.ema))
    return state


def _newest_arrays(workdir: str) -> dict[str, Any]:
    """{path: what the record of a run's newest checkpoint says of the array}; of a damaged one nothing: whoever loads
    it says so."""
    try:
        return read_record(folder_of(workdir, steps(workdir)[-1]))["arrays"]
    except DamagedCheckpoint:
        return {}


def _shapes(saved: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the parameters that are saved, by path."""
    shape = lambda entry: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])  # noqa: E731
    return {path.removeprefix("params/"): shape(entry) for path, entry in saved.items() if path.startswith("params/")}


def _fresh_adapters(workdir: str, saved: Mapping[str, Any], params: Mapping[str, Any]) -> set[str]:
    """The paths of the adapters among fresh `params`, where the run in `workdir` has none.

    Raises UserError where it has some and this one has not: they would be left out in silence.
    """
    there = any(map(is_adapter, saved))
    fresh = set(filter(is_adapter, params))
    if there and not fresh:
        raise UserError(
            f"checkpoint.init_from={workdir}: that run has adapters, and this one has none (model.lora.rank is 0). Set "
            "model.lora as there, or merge them first: llm-jax convert --from=RUN --to=hf:PATH, and back"
        )
    return set() if there or not saved else fresh
