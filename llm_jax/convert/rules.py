"""The table of a conversion: which of their tensors is which of our parameters, and how each becomes the other.

A family's table is a few `Rule`s with the placeholders {layer} and {expert}. `plan` fills them in for one model, and
checks that every parameter is covered exactly once; the same plan is read forward (import) and backward (export).
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from llm_jax.config import TransformerConfig
from llm_jax.config.kinds import places
from llm_jax.sharding import path_name

Arrays = Sequence[np.ndarray]
Shape = tuple[int, ...]

# ------------------------------------------------------------------------------------------- transforms


class Transform(Protocol):
    """An invertible change of the arrays of one rule. Values are moved, never computed: both ways keep every bit."""

    def to_ours(self, theirs: Arrays) -> Arrays: ...

    def to_theirs(self, ours: Arrays) -> Arrays: ...

    def their_shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]: ...


@dataclasses.dataclass(frozen=True)
class Same:
    """Theirs are ours."""

    def to_ours(self, theirs: Arrays) -> Arrays:
        return theirs

    def to_theirs(self, ours: Arrays) -> Arrays:
        return ours

    def their_shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        return ours


@dataclasses.dataclass(frozen=True)
class Swapped:
    """The last two axes change places: torch.nn.Linear holds (out, in), and we hold (in, out)."""

    def to_ours(self, theirs: Arrays) -> Arrays:
        return [array.swapaxes(-1, -2) for array in theirs]

    def to_theirs(self, ours: Arrays) -> Arrays:
        return self.to_ours(ours)

    def their_shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        return [(*shape[:-2], shape[-1], shape[-2]) for shape in ours]


@dataclasses.dataclass(frozen=True)
class Cut:
    """One of theirs holds several of ours side by side along `axis` (negative), of these sizes."""

    axis: int
    sizes: tuple[int, ...]

    def to_ours(self, theirs: Arrays) -> Arrays:
        return np.split(theirs[0], list(itertools.accumulate(self.sizes))[:-1], axis=self.axis)

    def to_theirs(self, ours: Arrays) -> Arrays:
        return [np.concatenate(ours, axis=self.axis)]

    def their_shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        found = list(ours[0])
        found[self.axis] = sum(shape[self.axis] for shape in ours)
        return [tuple(found)]


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """One of theirs holds the `parts` of ours by turns along `axis` (negative): a group of each, `groups` times.

    GPT-NeoX deals query, key and value out so, head by head.
    """

    axis: int
    groups: int
    parts: int

    def to_ours(self, theirs: Arrays) -> Arrays:
        before, after = self._around(theirs[0].shape)
        dealt = theirs[0].reshape(*before, self.groups, self.parts, -1, *after)
        return [np.take(dealt, part, axis=len(before) + 1).reshape(*before, -1, *after) for part in range(self.parts)]

    def to_theirs(self, ours: Arrays) -> Arrays:
        before, after = self._around(ours[0].shape)
        grouped = [array.reshape(*before, self.groups, -1, *after) for array in ours]
        return [np.stack(grouped, axis=len(before) + 1).reshape(*before, -1, *after)]

    def their_shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        return Cut(self.axis, ()).their_shapes(ours)

    def _around(self, shape: Shape) -> tuple[Shape, Shape]:
        axis = len(shape) + self.axis
        return shape[:axis], shape[axis + 1 :]


@dataclasses.dataclass(frozen=True)
class Chain:
    """From theirs to ours, one transform after another."""

    steps: tuple[Transform, ...]

    def to_ours(self, theirs: Arrays) -> Arrays:
        for step in self.steps:
            theirs = step.to_ours(theirs)
        return theirs

    def to_theirs(self, ours: Arrays) -> Arrays:
        for step in reversed(self.steps):
            ours = step.to_theirs(ours)
        return ours

    def their_shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        for step in reversed(self.steps):
            ours = step.their_shapes(ours)
        return ours


# ------------------------------------------------------------------------------------------------ rules


@dataclasses.dataclass(frozen=True)
class Rule:
    """Their tensors and our parameters that hold the same numbers.

    Attributes:
      theirs: names, with {layer} and {expert} where there is one a layer and one an expert.
      ours: paths, with {layer} for the block ("stack/{layer}/mlp/up/kernel"). Layers without them are passed over.
      transform: between the two, for one layer and one expert.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform = Same()

    @staticmethod
    def of(theirs: str, ours: str | Sequence[str], transform: Transform | None = None) -> "Rule":
        return Rule((theirs,), (ours,) if isinstance(ours, str) else tuple(ours), transform or Same())


def linear(theirs: str, ours: str, *, bias: bool) -> Iterator[Rule]:
    """A torch.nn.Linear."""
    yield Rule.of(f"{theirs}.weight", f"{ours}/kernel", Swapped())
    if bias:
        yield Rule.of(f"{theirs}.bias", f"{ours}/bias")


def fused_linear(theirs: str, ours: Sequence[str], sizes: tuple[int, ...], *, bias: bool) -> Iterator[Rule]:
    """A torch.nn.Linear whose outputs are those of several layers of ours, one after the other."""
    yield Rule.of(f"{theirs}.weight", [f"{name}/kernel" for name in ours], Chain((Cut(-2, sizes), Swapped())))
    if bias:
        yield Rule.of(f"{theirs}.bias", [f"{name}/bias" for name in ours], Cut(-1, sizes))


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place in a parameter: all of it, or what lies at `index` (layer, expert) of its first axes.

    Attributes:
      shape: of the numbers that belong here, without rows that only fill the vocabulary up.
    """

    path: str
    index: tuple[int, ...]
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Move:
    """One rule with its placeholders filled in."""

    theirs: tuple[str, ...]
    their_shapes: tuple[Shape, ...]
    ours: tuple[Slot, ...]
    transform: Transform

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.their_shapes)


def plan(rules: Sequence[Rule], cfg: TransformerConfig, shapes: Any, axes: Any, vocab_size: int) -> list[Move]:
    """All moves between a checkpoint and a model, in the model's order.

    Args:
      rules: of the family, for this model.
      shapes: of the parameters, a tree of ShapeDtypeStruct.
      axes: the same tree of logical axes.
      vocab_size: rows of their embedding; ours may have more, which hold nothing.

    Raises:
      ValueError: a parameter is covered by no rule, or by more than one: the table is wrong.
    """
    leaves = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    names = {path_name(p): n for p, n in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)}
    moves = [move for rule in rules for move in _fill_in(rule, cfg, leaves, names, vocab_size)]
    covered = Counter(slot.path for move in moves for slot in move.ours)
    depths = {slot.path: len(slot.index) for move in moves for slot in move.ours}
    expected = {path: math.prod(shape[: depths.get(path, 0)]) for path, shape in leaves.items()}  # slots of each
    wrong = [path for path in leaves if covered[path] != expected[path]]
    if wrong or set(covered) - set(leaves):
        wrong = wrong or sorted(set(covered) - set(leaves))
        raise ValueError(f"the family's table does not cover {wrong} exactly once")
    return moves


def _fill_in(
    rule: Rule,
    cfg: TransformerConfig,
    leaves: Mapping[str, Shape],
    names: Mapping[str, tuple[str, ...]],
    vocab_size: int,
) -> Iterator[Move]:
    text = " ".join(rule.theirs + rule.ours)
    layers = range(cfg.num_layers) if "{layer}" in text else (None,)
    experts = range(cfg.moe.num_experts) if "{expert}" in text else (None,)
    of_layers, found = places(cfg), False
    for layer, expert in itertools.product(layers, experts):
        block, index = ("", ()) if layer is None else of_layers[layer]
        index += () if expert is None else (expert,)
        paths = [path.format(layer=block) for path in rule.ours]
        if not all(path in leaves for path in paths):
            continue
        found = True
        slots = tuple(_slot(path, index, leaves, names, vocab_size) for path in paths)
        their_shapes = tuple(map(tuple, rule.transform.their_shapes([slot.shape for slot in slots])))
        theirs = tuple(name.format(layer=layer, expert=expert) for name in rule.theirs)
        yield Move(theirs, their_shapes, slots, rule.transform)
    if not found:
        raise ValueError(f"the family's table names {rule.ours}, and the model has no such parameters")


def _slot(
    path: str,
    index: tuple[int, ...],
    leaves: Mapping[str, Shape],
    names: Mapping[str, tuple[str, ...]],
    vocab_size: int,
) -> Slot:
    shape = leaves[path][len(index) :]
    shape = tuple(
        vocab_size if name == "vocab" else size for size, name in zip(shape, names[path][len(index) :], strict=True)
    )
    return Slot(path, index, shape)


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
