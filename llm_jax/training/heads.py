"""Which parameters of a run come from another model when the two have different heads.

The trunk must be there, as it is. A head that the other model lacks, or has for other labels, starts fresh.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.errors import DataError
from llm_jax.models.lora import is_adapter

HEADS = ("masked", "pairs", "labels", "replaced", "generator")  # first names of the paths of what fits one task alone
GENERATOR = "generator/"  # taken over whole or not at all
# The pooler that BERT's pre-training makes on pairs is the one that its fine-tuning goes on with.
POOLERS = ("labels/pooler/", "pairs/pooler/")


def is_head(path: str) -> bool:
    return path.partition("/")[0] in HEADS


def origins(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> dict[str, str]:
    """{path here: path there} of the parameters that are taken over.

    Args:
      ours, theirs: parameters by path, with their shapes.
      where: of the other model, for the message.

    Raises:
      DataError: one that belongs to no head is missing there, or has another shape.
    """
    fits = lambda path, other: other in theirs and tuple(theirs[other].shape) == tuple(ours[path].shape)  # noqa: E731
    whole_generator = all(fits(path, path) for path in ours if path.startswith(GENERATOR))
    found = {}
    for path, leaf in ours.items():
        other = path
        if path.startswith(GENERATOR) and not whole_generator:
            continue
        if path not in theirs and path.startswith(POOLERS):
            other = next(path.replace(a, b, 1) for a, b in (POOLERS, POOLERS[::-1]) if path.startswith(a))
        if fits(path, other):
            found[path] = other
        elif not is_head(path) and not is_adapter(path):
            what = f"has it as {list(theirs[path].shape)}" if path in theirs else "has none"
            raise DataError(
                f"{where} does not fit this model: the parameter {path} is {list(leaf.shape)} here, and the one there "
                f"{what}; make model.* as it is there (with checkpoint.init_from=hf:PATH, leave it out)"
            )
    return found
