"""Which attention back end a run trains and evaluates with: checked before anything is made, and told."""

import sys
from collections.abc import Callable
from typing import Any

from llm_jax.config import Config
from llm_jax.config.kinds import layer_kinds
from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import AttentionOptions, Kernel, why_not
from llm_jax.kernels.split import Split
from llm_jax.models.attention import attention_request, choose_kernel
from llm_jax.sharding import Layout


def check_attention(cfg: Config, layout: Layout) -> list[Kernel]:
    """The back ends of training, of each kind of layer.

    Raises ConfigError where one, or one of evaluation, lacks something that is asked of it.
    """
    Split.of(layout)  # one mesh axis alone may split the length
    _asked(choose_kernel, cfg, layout, dropout=False)
    kernels = _asked(choose_kernel, cfg, layout, dropout=cfg.model.dropout.attention > 0)
    if len({kernel.zigzag for kernel in kernels}) > 1:
        names = ", ".join(kernel.name for kernel in kernels)
        raise ConfigError(
            f"model.layer_pattern = {cfg.model.layer_pattern}: its kinds of layers would take different attention "
            f"({names}), which want tokens in different orders. Set model.attention_kernel to one of them."
        )
    return kernels


def attention_line(cfg: Config, layout: Layout) -> str:
    """The back end of training in words; where rows are split and it gathers them, why it is not ring attention."""
    kernels = check_attention(cfg, layout)
    names = list(dict.fromkeys(kernel.name for kernel in kernels))
    line = f"{' and '.join(names)} attention ({layout.runs_on})"
    requests: list[AttentionOptions] = _asked(attention_request, cfg, layout, dropout=cfg.model.dropout.attention > 0)
    for kernel, request in zip(kernels, requests, strict=True):
        if request.split_length and not kernel.by_device:
            missing = ", ".join(why_not("ring", request, layout.runs_on))
            return line + f", which gathers whole rows (ring attention lacks {missing})"
    return line


def fall_back(cfg: Config, layout: Layout) -> str:
    """`model.attention_kernel` for evaluation here: the run's own, or "auto" where that cannot do it, with a note."""
    try:
        _asked(choose_kernel, cfg, layout, dropout=False)
        return cfg.model.attention_kernel
    except ConfigError as error:
        print(f"note: {error} Evaluating with 'auto'.", file=sys.stderr)
        return "auto"


def _asked(function: Callable[..., Any], cfg: Config, layout: Layout, *, dropout: bool) -> list[Any]:
    """Of each kind of layer."""
    data, compute = cfg.data, cfg.precision.compute
    given = dict(segments=data.mask_documents, length=data.sequence_length, dtype=compute, dropout=dropout)
    return [function(cfg.model, layout, kind, **given) for kind in dict.fromkeys(layer_kinds(cfg.model))]
