"""Which layers a model has: what each of them computes, and in which stack its parameters lie."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from llm_jax.config.schema import EncoderConfig, TransformerConfig

# ------------------------------------------------------------------------------------------------ kinds


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What a layer does otherwise than its neighbours.

    Attributes:
      window: it sees `sliding_window` tokens only.
      positions: it knows where tokens stand; without, the order shows by the causal mask alone (arXiv 2501.18795).
      dense: it has an MLP where others have experts.
      attention_norm: its attention has a norm before it, where others of norm_placement=pre have one.
    """

    window: bool = False
    positions: bool = True
    dense: bool = False
    attention_norm: bool = True


def layer_kinds(cfg: TransformerConfig) -> tuple[LayerKind, ...]:
    """The kind of each layer, from `layer_pattern`; a layer of an empty pattern has the window where there is one."""
    first, experts = first_layers(cfg), cfg.moe.num_experts > 0
    return tuple(
        LayerKind(
            window=word == "window",
            positions=word != "full_without_positions",
            dense=layer < first and experts,
            attention_norm=layer >= first or experts,
        )
        for layer, word in enumerate(layer_words(cfg))
    )


def layer_words(cfg: TransformerConfig) -> tuple[str, ...]:
    """`layer_pattern`, written out for every layer."""
    pattern = cfg.layer_pattern or ("window" if cfg.sliding_window else "full",)
    return tuple(pattern[layer % len(pattern)] for layer in range(cfg.num_layers))


def periods(kinds: Sequence[Any]) -> list[int]:
    """All P with kinds[i] == kinds[i mod P] for all i, the least first; the last period may be cut off."""
    repeats = lambda size: all(kind == kinds[i % size] for i, kind in enumerate(kinds))  # noqa: E731
    return [size for size in range(1, len(kinds) + 1) if repeats(size)]


# ------------------------------------------------------------------------------------------------ stacks

# The stacks of a model in their order, and the logical axis along which each one's parameters are stacked.
STACK_AXES = {"first_blocks": "first_layers", "blocks": "layers", "last_blocks": "last_layers"}
# All leading axes along which parameters of independent layers or experts are stacked.
STACKING_AXES = (*STACK_AXES.values(), "expert")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers that follow one another, whose parameters are stacked under one name and which one loop computes.

    Attributes:
      name: of the stack, one of STACK_AXES.
      first: the number of its first layer in the model.
      kinds: of its layers.
    """

    name: str
    first: int
    kinds: tuple[LayerKind, ...]

    @property
    def axis(self) -> str:
        return STACK_AXES[self.name]


def segments(cfg: TransformerConfig) -> tuple[Segment, ...]:
    """The stacks of a model that scans its layers, in order.

    "first_blocks" has the layers with parameters of other names or shapes, "blocks" whole periods of the kinds, and
    "last_blocks" what begins one more period: to cut it off a stack of all, every step would copy the parameters.
    """
    kinds, first = layer_kinds(cfg), first_layers(cfg)
    others = kinds[first:]
    rest = len(others) % periods(others)[0] if others else 0
    borders = itertools.pairwise((0, first, len(kinds) - rest, len(kinds)))
    found = [Segment(name, start, kinds[start:end]) for name, (start, end) in zip(STACK_AXES, borders, strict=True)]
    return tuple(segment for segment in found if segment.kinds)


def first_layers(cfg: TransformerConfig) -> int:
    """How many layers before the others have parameters of other names or shapes."""
    if isinstance(cfg, EncoderConfig):  # after a norm of the embeddings the first attention has none of its own
        return int(cfg.embedding_norm and cfg.norm_placement == "pre")
    return cfg.moe.dense_layers


def places(cfg: TransformerConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Where the parameters of each layer are: their name in the stack of layers, and the index of their first axis.

    The index is empty where each layer has parameters of its own (`scan_layers=False`).
    """
    if not cfg.scan_layers:
        return [(f"block_{layer}", ()) for layer in range(cfg.num_layers)]
    return [(segment.name, (index,)) for segment in segments(cfg) for index in range(len(segment.kinds))]
