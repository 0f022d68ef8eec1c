"""The families that can be converted, one small table each. A new one joins this list."""

import json
from collections.abc import Mapping
from typing import Any

from llm_jax.config import DecoderConfig
from llm_jax.config.values import did_you_mean
from llm_jax.convert.families.experts import MIXTRAL, QWEN3_MOE
from llm_jax.convert.families.gpt2 import GPT2
from llm_jax.convert.families.llama import LLAMA, MISTRAL, PHI3
from llm_jax.convert.families.qwen import QWEN2, QWEN3
from llm_jax.convert.family import Family
from llm_jax.errors import ConfigError, UserError

# In the order in which a model that was trained here takes the first that can say it.
FAMILIES: dict[str, Family] = {
    family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, MIXTRAL, QWEN3_MOE, GPT2)
}


def find(architecture: str, where: str) -> Family:
    """The family of this architecture. Raises ConfigError with those that there are."""
    if architecture not in FAMILIES:
        known = f"these can be converted: {', '.join(FAMILIES)}"
        close = did_you_mean(architecture, FAMILIES, known)
        raise ConfigError(f"{where}: no family of the architecture {architecture!r} is known here; {close}"
                          + ("" if close == known else f" ({known})"))  # fmt: skip
    return FAMILIES[architecture]


def of_config(values: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json."""
    names = values.get("architectures")
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        return find(names[0], where)
    by_type = {family.model_type: family for family in FAMILIES.values()}
    if not names and values.get("model_type") in by_type:
        return by_type[values["model_type"]]
    raise ConfigError(
        f"{where}: architectures = {json.dumps(names)} with model_type = {json.dumps(values.get('model_type'))} does "
        f"not name one architecture; these can be converted: {', '.join(FAMILIES)}"
    )


def that_can_say(cfg: DecoderConfig) -> Family:
    """The first family whose config.json can describe a model. Raises UserError with what each of them lacks."""
    reasons = []
    for family in FAMILIES.values():
        try:
            family.hf_config(cfg)
            return family
        except UserError as error:
            reasons.append(f"  {error}")
    raise UserError("no family of the hub can say this model:\n" + "\n".join(reasons))
