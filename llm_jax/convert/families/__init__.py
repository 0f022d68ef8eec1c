"""The families that can be converted, one small table each. A new one joins this list."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from llm_jax.config import TransformerConfig
from llm_jax.config.values import did_you_mean
from llm_jax.convert.families.bert import BERTS
from llm_jax.convert.families.deberta import DEBERTAS
from llm_jax.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from llm_jax.convert.families.distilbert import DISTILBERTS
from llm_jax.convert.families.electra import ELECTRAS
from llm_jax.convert.families.experts import MIXTRAL, QWEN3_MOE
from llm_jax.convert.families.gemma import GEMMA, GEMMA2, GEMMA3
from llm_jax.convert.families.gpt2 import GPT2
from llm_jax.convert.families.gpt_oss import GPT_OSS
from llm_jax.convert.families.llama import LLAMA, MINISTRAL, MISTRAL, OLMO2, PHI3, SMOLLM3
from llm_jax.convert.families.modernbert import MODERNBERTS
from llm_jax.convert.families.neox import NEOX
from llm_jax.convert.families.qwen import QWEN2, QWEN3
from llm_jax.convert.families.roberta import ROBERTAS
from llm_jax.convert.family import Family
from llm_jax.errors import ConfigError, UserError

# In the order in which a model that was trained here takes the first that can say it.
DECODERS = (
    LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, MIXTRAL, QWEN3_MOE, GPT2, MINISTRAL, SMOLLM3, OLMO2, GEMMA, GEMMA2, GEMMA3,
    NEOX, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS,
)  # fmt: skip
ENCODERS = (*BERTS, *ROBERTAS, *DISTILBERTS, *ELECTRAS, *DEBERTAS, *MODERNBERTS)
ALL: tuple[Family, ...] = (*DECODERS, *ENCODERS)
FAMILIES: dict[str, Family] = {family.architecture: family for family in reversed(ALL)}  # of several forms the first
FAMILIES = {family.architecture: FAMILIES[family.architecture] for family in ALL}


def find(architecture: str, where: str) -> Family:
    """The family of this architecture. Raises ConfigError with those that there are."""
    if architecture not in FAMILIES:
        known = f"these can be converted: {', '.join(FAMILIES)}"
        close = did_you_mean(architecture, FAMILIES, known)
        raise ConfigError(f"{where}: no family of the architecture {architecture!r} is known here; {close}"
                          + ("" if close == known else f" ({known})"))  # fmt: skip
    return FAMILIES[architecture]


def of_config(values: Mapping[str, Any], where: str, tensors: Collection[str] = ()) -> Family:
    """The family of a config.json. `tensors`: the names in the checkpoint, where they are known."""
    return with_tensors(_of_config(values, where), tensors)


def with_tensors(family: Family, tensors: Collection[str]) -> Family:
    """The form of the architecture that a checkpoint with these tensors has."""
    there = {name.removeprefix(family.prefix).removeprefix(family.bare_prefix) for name in tensors}
    forms = sorted(forms_of(family.architecture), key=lambda form: -len(form.needs))
    return next((form for form in forms if there.issuperset(form.needs)), family) if tensors else family


def forms_of(architecture: str) -> list[Family]:
    return [family for family in ALL if family.architecture == architecture]


def _of_config(values: Mapping[str, Any], where: str) -> Family:
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


def that_can_say(cfg: TransformerConfig, families: Collection[Family] = ALL) -> Family:
    """The first family whose config.json can describe a model. Raises UserError with what each of them lacks."""
    reasons = []
    for family in [family for family in families if family.model is type(cfg)] or families:
        try:
            family.hf_config(cfg)
            return family
        except UserError as error:
            reasons.append(f"  {error}")
    raise UserError("no family of the hub can say this model:\n" + "\n".join(reasons))
