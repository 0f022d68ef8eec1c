"""Which attention back end a run trains and evaluates with: checked before anything is made, and told."""

import sys
from collections.abc import Callable
from typing import Any

from llm_jax.config import Config
from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import AttentionOptions, Kernel, why_not
from llm_jax.kernels.split import Split
from llm_jax.models.attention import attention_request, choose_kernel, platform
from llm_jax.sharding import Layout


def check_attention(cfg: Config, layout: Layout) -> Kernel:
    """The back end of training. Raises ConfigError where it, or evaluation's, lacks something that is asked of it."""
    _asked(choose_kernel, cfg, layout, dropout=False)
    Split.of(layout)  # one mesh axis alone may split the length
    return _asked(choose_kernel, cfg, layout, dropout=cfg.model.dropout.attention > 0)


def attention_line(cfg: Config, layout: Layout) -> str:
    """The back end of training in words; where rows are split and it gathers them, why it is not ring attention."""
    kernel = check_attention(cfg, layout)
    line = f"{kernel.name} attention ({platform(layout)})"
    request: AttentionOptions = _asked(attention_request, cfg, layout, dropout=cfg.model.dropout.attention > 0)
    if request.split_length and not kernel.by_device:
        missing = ", ".join(why_not("ring", request, platform(layout)))
        line += f", which gathers whole rows (ring attention lacks {missing})"
    return line


def fall_back(cfg: Config, layout: Layout) -> str:
    """`model.attention_kernel` for evaluation here: the run's own, or "auto" where that cannot do it, with a note."""
    try:
        _asked(choose_kernel, cfg, layout, dropout=False)
        return cfg.model.attention_kernel
    except ConfigError as error:
        print(f"note: {error} Evaluating with 'auto'.", file=sys.stderr)
        return "auto"


def _asked(function: Callable[..., Any], cfg: Config, layout: Layout, *, dropout: bool) -> Any:
    data, compute = cfg.data, cfg.precision.compute
    given = dict(segments=data.mask_documents, length=data.sequence_length, dtype=compute, dropout=dropout)
    return function(cfg.model, layout, **given)
