"""A config.json, read so that nothing in it is passed over: every key is used, known to say nothing, or refused."""

from collections.abc import Mapping
from typing import Any

from llm_jax.config import RopeConfig
from llm_jax.config.values import refuse
from llm_jax.errors import ConfigError

REQUIRED = object()

# Keys that change nothing in what the model computes: bookkeeping, what generation starts from, other heads' labels.
SAYS_NOTHING = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attn_implementation auto_map
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
    keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    unk_token_id use_bfloat16 use_cache
    """.split()
)
# Keys that would change it with another value than these.
MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}


class Keys:
    """The values of one config.json; `where` is its path, for messages."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = dict(values), where
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a key that is used. `default`: what transformers takes where the file leaves it out."""
        self._taken.add(name)
        if name not in self.values and default is REQUIRED:
            raise ConfigError(f"{self.where}: {name} is missing; it is needed to build the model")
        return self.values.get(name, default)

    def only(self, name: str, *allowed: Any, reason: str, default: Any = None) -> None:
        """A key with one meaning of which our model can say one part only; left out, it stands for `default`."""
        value = self.take(name, default)
        if value not in allowed:
            raise self.refuse(name, value, reason)

    def choice(self, name: str, choices: Mapping[str, str], default: Any = REQUIRED) -> str:
        """Our word for theirs."""
        value = self.take(name, default)
        if value not in choices:
            raise self.refuse(name, value, f"our model can say {', '.join(choices)}")
        return choices[value]

    def ignore(self, *names: str) -> None:
        """Keys of this family that change nothing in what the model computes."""
        self._taken.update(names)

    def refuse(self, name: str, value: Any, reason: str) -> ConfigError:
        return refuse(f"{self.where}: {name}", value, reason, "this checkpoint cannot be converted")

    def finish(self) -> None:
        """Refuse what was neither taken nor is known to say nothing."""
        for name, value in self.values.items():
            if name in self._taken or name in SAYS_NOTHING:
                continue
            if name in MUST_BE and value in MUST_BE[name]:
                continue
            allowed = ", ".join(map(repr, MUST_BE.get(name, ())))
            reason = f"only {allowed} can be converted" if allowed else "this key is not known for its architecture"
            fix = "give a checkpoint without it" if allowed else "take it out of the file if it says nothing"
            raise refuse(f"{self.where}: {name}", value, reason, fix)


# ----------------------------------------------------------------------------------------------- positions


def read_rope(keys: Keys, *, base: float = 10_000.0, partial: bool = False) -> dict[str, Any]:
    """`model.rope`, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5).

    `partial`: heads may rotate in part; where transformers' own model has no such form, it would be passed over.
    """
    name, given = rope_group(keys)
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise keys.refuse(name, given, "our model has the same rotary positions in every layer")
    rope = rope_of(keys, name, given, keys.take("rope_theta", base), keys.take("partial_rotary_factor", 1.0))
    if rope["fraction"] != 1 and not partial:
        raise keys.refuse("partial_rotary_factor", rope["fraction"], "whole heads rotate in this architecture")
    return rope


def rope_group(keys: Keys) -> tuple[str, Any]:
    """The group that says how positions rotate: `rope_scaling` of transformers 4, `rope_parameters` of 5."""
    older, newer = keys.take("rope_scaling", None), keys.take("rope_parameters", None)
    if older and newer and older != newer:
        raise keys.refuse("rope_scaling", older, "rope_parameters says something else, and one of them alone can hold")
    return ("rope_parameters", newer) if newer else ("rope_scaling", older or {})


def rope_of(keys: Keys, name: str, given: Mapping[str, Any], base: float, fraction: float) -> dict[str, Any]:
    """`model.rope`, from one group of rotary keys; `base` and `fraction` are taken where it has none of its own."""
    rest = {key: value for key, value in given.items() if value is not None}
    kinds = {rest.pop(key) for key in ("rope_type", "type") if key in rest} or {"default"}
    rope = {
        "base": rest.pop("rope_theta", base),
        "fraction": rest.pop("partial_rotary_factor", fraction),
    }
    kind = "/".join(sorted(kinds))
    if kind in ("longrope", "su", "dynamic"):
        reason = "its angles change with the longest row of a batch, and ours are the same in every batch"
        raise keys.refuse(name, given, reason)
    if kind not in SCALINGS:
        raise keys.refuse(name, given, "our model can scale by default, linear, llama3 and yarn")
    try:
        rope |= SCALINGS[kind](keys, rest)
    except KeyError as missing:
        raise keys.refuse(name, given, f"{missing} is missing, and {kind} needs it") from None
    if rest:
        raise keys.refuse(name, given, f"{', '.join(rest)} has no meaning that our model knows with {kind}")
    return rope


# Each takes its keys out of `rest`; KeyError: there is none of that name.


def _read_default(keys: Keys, rest: dict[str, Any]) -> dict[str, Any]:
    return {}


def _read_linear(keys: Keys, rest: dict[str, Any]) -> dict[str, Any]:
    return {"scaling": "linear", "factor": rest.pop("factor")}


def _read_llama3(keys: Keys, rest: dict[str, Any]) -> dict[str, Any]:
    found = {key: rest.pop(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return found | {"scaling": "llama3", "original_length": rest.pop("original_max_position_embeddings")}


def _read_yarn(keys: Keys, rest: dict[str, Any]) -> dict[str, Any]:
    scale = rest.pop("attention_factor", None)
    if scale is not None and not scale > 0:
        raise keys.refuse("attention_factor", scale, "it scales sine and cosine, and is above 0")
    original = rest.pop("original_max_position_embeddings", None) or keys.take("max_position_embeddings")
    return {
        "scaling": "yarn",
        "factor": float(rest.pop("factor")),
        "original_length": original,
        "attention_factor": scale or 0.0,
        "truncate": rest.pop("truncate", True),
        "beta_fast": float(rest.pop("beta_fast", 32.0)),
        "beta_slow": float(rest.pop("beta_slow", 1.0)),
    }


SCALINGS = {"default": _read_default, "linear": _read_linear, "llama3": _read_llama3, "yarn": _read_yarn}


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which old and new readers know."""
    scaling = None
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        usual = RopeConfig()
        options = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        scaling |= {name: getattr(rope, name) for name in options if getattr(rope, name) != getattr(usual, name)}
    partial = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    return {"rope_theta": rope.base, "rope_scaling": scaling} | partial
