"""The arrays of a checkpoint as Orbax keeps them: trees by path, read whole and held against their fingerprints."""

import contextlib
import dataclasses
import errno
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from llm_jax import distributed
from llm_jax.sharding import path_name
from llm_jax.training.fingerprint import Arrays, fingerprint
from llm_jax.training.record import DamagedCheckpoint, check_fit, read_record, root_cause, some

Tree = Any
CHUNK_BYTES = 16 << 20


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves by their names, as "params/stack/blocks/mlp/up/kernel"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts: what is on disk depends on names alone, not on the classes of state and optimizer."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def in_small_chunks() -> ocp.Context:
    """Saving in this context cuts large arrays into chunks within one layer and one expert, which can be read alone."""

    def storage(_: Any, leaf: jax.Array) -> Any:
        if leaf.nbytes <= CHUNK_BYTES:
            return None
        stacks = tuple(range(leaf.ndim - 2))
        return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=stacks)

    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = storage
    return context


def load(path: Path, abstract: Mapping[str, Any], *, partial: bool) -> tuple[Arrays, dict[str, Any]]:
    """The arrays at the paths of `abstract`, as it says, and the record.

    Raises:
      DamagedCheckpoint: unreadable, or a fingerprint differs. On every process where it is so on one.
      UserError: another key, shape or dtype than was saved.
    """
    record, reason = {}, ""
    try:
        record = read_record(path)
    except DamagedCheckpoint as error:
        reason = str(error)
    agree(reason)
    check_fit(path, record["arrays"], abstract, partial=partial)
    placed = {
        key: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
        )
        for key, x in abstract.items()
    }
    context = ocp.Context()
    context.pytree_options.loading.partial_load = partial
    with quiet_libraries(), context:
        try:
            loaded = ocp.load_checkpointables(path, {"state": nested(placed)})["state"]
        except Exception as error:  # whatever Orbax makes of files that are not what it wrote
            reraise_if_environment(error)
            reason = f"its arrays cannot be read ({root_cause(error)})"
    agree(reason)
    arrays = by_path(loaded)
    found = fingerprint(arrays)
    different = [key for key in placed if found[key] != record["arrays"][key]["fingerprint"]]
    if different:
        raise DamagedCheckpoint(f"{some(different)} {'is' if len(different) == 1 else 'are'} not what was saved")
    return arrays, record


def agree(reason: str) -> None:
    """Where one process has a reason to reject a checkpoint all do, before any goes on to a step that takes all."""
    if not distributed.all_true(not reason):
        raise DamagedCheckpoint(reason or "another process could not read it")


@dataclasses.dataclass(frozen=True)
class WithoutLateTasks:
    """Python's hook for errors that nothing catches, without those of reads that end after the load that gave up."""

    hook: Callable[[Any], object]

    def __call__(self, unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            self.hook(unraisable)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep Orbax's tasks from telling the same damage a dozen times over; what they leave behind is collected here."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    sys.unraisablehook = lambda _: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that were never awaited
            yield
            gc.collect()
    finally:
        sys.unraisablehook = hook if isinstance(hook, WithoutLateTasks) else WithoutLateTasks(hook)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


ENVIRONMENT_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
ENVIRONMENT_WORDS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Permission denied", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def reraise_if_environment(error: BaseException) -> None:
    """Too little memory or a file system that is away says nothing about a checkpoint: it must not be put aside."""
    cause: BaseException | None = error
    while cause is not None:
        number = getattr(cause, "errno", None)
        if (
            isinstance(cause, MemoryError)
            or number in ENVIRONMENT_ERRORS
            or any(w in str(cause) for w in ENVIRONMENT_WORDS)
        ):
            raise error
        cause = cause.__cause__


def rebuild(abstract: Tree, arrays: Arrays) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[path_name(path)], abstract)
