"""Which layers of a config.json see a window only: `layer_types` and `sliding_window`, both ways."""

from collections.abc import Sequence
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.config.kinds import layer_words, periods
from llm_jax.convert.keys import Keys

WORDS = {"full_attention": "full", "sliding_attention": "window"}
TYPES = {word: name for name, word in WORDS.items()} | {"full_without_positions": "full_attention"}


def read_words(keys: Keys, layers: int, window: int | None, default: Sequence[str]) -> list[str]:
    """The kind of each layer, from `layer_types`.

    Args:
      window: what the family's own keys say; None: none.
      default: one of WORDS a layer, where `layer_types` is left out.
    """
    types = keys.take("layer_types", None) or list(default)
    if not isinstance(types, list) or len(types) != layers:
        raise keys.refuse("layer_types", types, f"it names the kind of each of the {layers} layers")
    for name in types:
        if name not in WORDS:
            raise keys.refuse("layer_types", name, f"our layers can be {', '.join(WORDS)}")
    if "sliding_attention" in types and not window:
        raise keys.refuse("layer_types", types, "some layers have a window, and no other key gives its size")
    return [WORDS[name] for name in types]


def window_keys(words: list[str], window: int | None) -> dict[str, Any]:
    """`model.sliding_window` and `model.layer_pattern` for layers of these kinds."""
    pattern = words[: periods(words)[0]]
    alike = pattern in (["full"], ["window"])
    return {"sliding_window": window if "window" in words else 0, "layer_pattern": () if alike else tuple(pattern)}


def write_windows(cfg: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": cfg.sliding_window or None, "layer_types": [TYPES[word] for word in layer_words(cfg)]}
