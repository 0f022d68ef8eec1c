"""What a family of models is to the converter: a name, two functions between configs, and a table of rules."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from llm_jax.config import (
    DecoderConfig,
    DropoutConfig,
    EncoderConfig,
    MoEConfig,
    RopeConfig,
    TransformerConfig,
    from_dict,
)
from llm_jax.config.kinds import layer_words
from llm_jax.config.model import check_model
from llm_jax.convert.keys import Keys
from llm_jax.convert.rules import Rule, matches
from llm_jax.errors import ConfigError, UserError
from llm_jax.models.attention import query_dim


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of the hub.

    Attributes:
      title: the models people know it by.
      architecture: what config.json calls it.
      model_type: likewise.
      read: config.json to the keys of `model.*`.
      write: the model's config to config.json, where the family can say it.
      rules: the table, for one model and the names that a checkpoint has (none: those that we write).
      prefix: of names, left out by checkpoints of the model without its head.
      no_parameters: patterns of tensors that hold none.
      embedding, head: their names; a tied head may be stored too.
      tied: (copy, original) of more tensors that may be stored twice.
      model: the kind of config that it describes.
      bare_prefix: of names, had by some checkpoints of a model without its head.
      needs: tensors that tell this form of the architecture from another, without `prefix` or `bare_prefix`.
      wide: patterns of tensors that are parameters in float32 here, whatever the others are.
      other_heads: patterns of tensors that belong to heads other than the architecture's: they are left out.
      further_layers: config.json to patterns of tensors of layers that predict further tokens: they are left out.
    """

    title: str
    architecture: str
    model_type: str
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any, Collection[str]], Sequence[Rule]]
    prefix: str = "model."
    no_parameters: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    tied: tuple[tuple[str, str], ...] = ()
    model: type[TransformerConfig] = DecoderConfig
    bare_prefix: str = ""
    needs: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    further_layers: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda values: ()

    def config(self, values: Mapping[str, Any], where: str) -> TransformerConfig:
        """The model that a config.json describes. Raises ConfigError: a key or value that cannot be said here."""
        keys = Keys(values, where)
        found = self.read(keys)
        keys.finish()
        try:
            cfg = from_dict({"model": found}).model
            check_model(cfg)
        except ConfigError as error:
            raise ConfigError(f"{where} describes a model that cannot be built: {error}") from None
        return cfg

    def hf_config(self, cfg: TransformerConfig) -> dict[str, Any]:
        """The config.json of a model. Raises UserError where this family cannot say it: it is read back to see."""
        written = {"architectures": [self.architecture], "model_type": self.model_type} | self.write(cfg)
        try:
            back = self.config(written, "config.json")
        except ConfigError as error:
            raise UserError(f"{self.architecture} cannot say this model: {error}") from None
        if type(cfg) is not type(back):
            raise UserError(f"{self.architecture} cannot say this model: it is no {cfg.family}")
        ours, theirs = function_of(cfg), function_of(back)
        for field in dataclasses.fields(ours):
            mine, said = getattr(ours, field.name), getattr(theirs, field.name)
            if mine != said:
                raise UserError(
                    f"{self.architecture} cannot say this model: model.{field.name} is {mine!r}, and read back from "
                    f"its config.json it would be {said!r}"
                )
        return written

    def is_no_parameter(self, name: str) -> bool:
        return matches(name, self.no_parameters)


def function_of(cfg: TransformerConfig) -> TransformerConfig:
    """The config with everything at its default that does not change what the trained model computes."""
    rope, moe = cfg.rope, cfg.moe
    vocab = -(-cfg.vocab_size // cfg.vocab_multiple) * cfg.vocab_multiple
    if cfg.positions != "rotary":
        rope = RopeConfig()
    if rope.scaling == "none":
        rope = RopeConfig(base=rope.base, fraction=rope.fraction)
    head_dim, mlp_dim = cfg.head_dim or cfg.embed_dim // cfg.num_heads, cfg.mlp_dim or 4 * cfg.embed_dim
    attention_scale = 0.0 if math.isclose(cfg.attention_scale, query_dim(cfg) ** -0.5) else cfg.attention_scale
    window_rope = 0.0 if rope.scaling == "none" and cfg.window_rope_base == rope.base else cfg.window_rope_base
    latent, default = cfg.latent, MoEConfig()
    if latent.kv_rank:
        latent = dataclasses.replace(latent, value_dim=latent.value_dim or head_dim)
    if moe.num_experts:
        of_training = "capacity_factor", "balance_loss", "router_z_loss", "balance_rate"
        training = {name: getattr(default, name) for name in of_training}
        moe = dataclasses.replace(moe, expert_dim=moe.expert_dim or mlp_dim, **training)
        mlp_dim = mlp_dim if moe.dense_layers else moe.expert_dim
    else:
        moe = default
    plain = type(cfg)()
    training = ("init", "init_std", "residual_init_scale", "scan_layers", "remat", "remat_save", "attention_kernel")
    if isinstance(cfg, EncoderConfig):
        cfg = head_function(cfg)
    return dataclasses.replace(
        cfg,
        vocab_size=vocab if cfg.padded_vocab_in_softmax else cfg.vocab_size,
        vocab_multiple=1,
        padded_vocab_in_softmax=False,
        num_kv_heads=cfg.num_kv_heads or cfg.num_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        layer_pattern=layer_words(cfg),
        rope=rope,
        window_rope_base=window_rope,
        attention_scale=attention_scale,
        latent=latent,
        moe=moe,
        dropout=DropoutConfig(),
        **{name: getattr(plain, name) for name in training},
    )


def differences_in_function(ours: TransformerConfig, theirs: TransformerConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, our value, theirs) of each key of `model` that makes the same parameters another model."""
    mine, other = function_of(ours), function_of(theirs)
    for field in dataclasses.fields(mine):
        if getattr(mine, field.name) != getattr(other, field.name):
            yield f"model.{field.name}", getattr(ours, field.name), getattr(theirs, field.name)


def head_function(cfg: EncoderConfig) -> EncoderConfig:
    """The keys of the head that its kind does not read at their defaults, and an embedding of the usual width."""
    default = EncoderConfig()
    unread = ["head_dropout"]
    unread += [] if cfg.head in ("text", "token") else ["num_labels"]
    unread += [] if cfg.head in ("text", "token", "pooled") else ["head_form"]
    unread += [] if cfg.head in ("text", "pooled") else ["head_pooling"]
    unread += [] if cfg.head in ("masked", "masked_pairs") else ["tie_embeddings"]
    width = 0 if cfg.embedding_dim == cfg.embed_dim else cfg.embedding_dim
    return dataclasses.replace(cfg, embedding_dim=width, **{name: getattr(default, name) for name in unread})
