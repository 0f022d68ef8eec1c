"""What the encoders' tables share: the keys of BERT's line, labels, and one `Family` for each head of a model."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from llm_jax.config import EncoderConfig
from llm_jax.convert.families.gpt2 import ACTIVATION_NAMES, ACTIVATIONS
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.keys import Keys
from llm_jax.convert.rules import Rule, linear

Table = Callable[[EncoderConfig], Iterator[Rule]]

# ------------------------------------------------------------------------------------------------- configs


def read_common(keys: Keys, **defaults: Any) -> dict[str, Any]:
    """The keys that BERT, RoBERTa, ELECTRA and DeBERTa share; `defaults`: of transformers, where they differ."""
    default = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
               "intermediate_size": 3072, "type_vocab_size": 2, "layer_norm_eps": 1e-12} | defaults  # fmt: skip
    check_encoder_keys(keys)
    hidden = keys.take("hidden_dropout_prob", 0.1)
    return {
        "family": "encoder",
        "vocab_size": keys.take("vocab_size", default["vocab_size"]),
        "num_layers": keys.take("num_hidden_layers", default["num_hidden_layers"]),
        "embed_dim": keys.take("hidden_size", default["hidden_size"]),
        "num_heads": keys.take("num_attention_heads", default["num_attention_heads"]),
        "mlp_dim": keys.take("intermediate_size", default["intermediate_size"]),
        "max_length": keys.take("max_position_embeddings", 512),
        "token_types": keys.take("type_vocab_size", default["type_vocab_size"]),
        "norm_eps": keys.take("layer_norm_eps", default["layer_norm_eps"]),
        "activation": keys.choice("hidden_act", ACTIVATIONS, "gelu"),
        "init_std": keys.take("initializer_range", 0.02),
        "dropout": {
            "embedding": hidden,
            "attention": keys.take("attention_probs_dropout_prob", 0.1),
            "attention_output": hidden,
            "mlp_output": hidden,
        },
    }


def check_encoder_keys(keys: Keys) -> None:
    """Keys that all encoders have and ours can say one value of."""
    reason = "our encoder has absolute positions for this architecture"
    keys.only("position_embedding_type", "absolute", default="absolute", reason=reason)
    keys.only("is_decoder", False, default=False, reason="our encoder sees both sides of a token")
    keys.only("tie_word_embeddings", True, default=True, reason="the head of masked tokens is the embedding here")
    keys.ignore("gradient_checkpointing")


def write_common(cfg: EncoderConfig) -> dict[str, Any]:
    says = function_of(cfg)
    return {
        "vocab_size": says.vocab_size,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.embed_dim,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": says.mlp_dim,
        "max_position_embeddings": cfg.max_length,
        "type_vocab_size": cfg.token_types,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": activation_name(cfg),
        "initializer_range": cfg.init_std,
        "hidden_dropout_prob": cfg.dropout.mlp_output,
        "attention_probs_dropout_prob": cfg.dropout.attention,
    }


def activation_name(cfg: EncoderConfig) -> str:
    return ACTIVATION_NAMES.get(cfg.activation, cfg.activation)


def read_labels(keys: Keys) -> int:
    """How many labels config.json names."""
    names = keys.take("id2label", None)
    return len(names) if names else keys.take("num_labels", 2)


# -------------------------------------------------------------------------------------------------- tables


def norm(theirs: str, ours: str, *, bias: bool = True) -> Iterator[Rule]:
    yield Rule.of(f"{theirs}.weight", f"{ours}/scale")
    if bias:
        yield Rule.of(f"{theirs}.bias", f"{ours}/bias")


def dense(theirs: str, ours: str, *, bias: bool = True) -> Iterator[Rule]:
    """A layer of our heads (`models.heads.Dense`)."""
    return linear(theirs, f"{ours}/linear", bias=bias)


def embedding_rules(cfg: EncoderConfig, prefix: str) -> Iterator[Rule]:
    yield Rule.of(f"{prefix}embeddings.word_embeddings.weight", "embedding/table")
    if cfg.positions == "learned":
        yield Rule.of(f"{prefix}embeddings.position_embeddings.weight", "positions/table")
    if cfg.token_types:
        yield Rule.of(f"{prefix}embeddings.token_type_embeddings.weight", "token_types/table")
    yield from norm(f"{prefix}embeddings.LayerNorm", "embedding_norm")


def layer_rules(prefix: str, projections: tuple[str, str, str] = ("query", "key", "value")) -> Iterator[Rule]:
    """BERT's blocks; `projections`: what a family calls them."""
    theirs, ours = f"{prefix}encoder.layer.{{layer}}", "stack/{layer}"
    for name, mine in zip(projections, ("query", "key", "value"), strict=True):
        yield from linear(f"{theirs}.attention.self.{name}", f"{ours}/attention/{mine}", bias=True)
    yield from linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out", bias=True)
    yield from norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention_norm")
    yield from linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up", bias=True)
    yield from linear(f"{theirs}.output.dense", f"{ours}/mlp/down", bias=True)
    yield from norm(f"{theirs}.output.LayerNorm", f"{ours}/mlp_norm")


# ------------------------------------------------------------------------------------------------- families


@dataclasses.dataclass(frozen=True)
class Head:
    """One architecture of a model.

    Attributes:
      name: what config.json calls it, behind the model's name.
      head: of the config.
      rules: of the head's parameters.
      labels: how many it has; -1: config.json says it; 0: none.
      form: `head_form`.
      dropout: the key of `head_dropout`; "": it has none.
      usual_dropout: its value in transformers; None: that of the trunk's `hidden_dropout`.
      pooling: `classifier_pooling` says what it reads.
      gelu: it takes GELU, whatever the blocks have.
      says: more keys of config.json.
      tied: (copy, original) of tensors that may be stored twice.
      needs: as in `Family`.
    """

    name: str
    head: str
    rules: Table = lambda cfg: iter(())
    labels: int = 0
    form: str = "bert"
    dropout: str = "classifier_dropout"
    usual_dropout: float | None = None
    pooling: bool = False
    gelu: bool = False
    says: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()

    def read(self, keys: Keys, trunk: dict[str, Any], hidden_dropout: str) -> dict[str, Any]:
        """The keys of `model.*` that are the head's, beside those of its trunk."""
        if self.gelu and trunk["activation"] != "gelu":
            reason = "its head of masked tokens has gelu, and ours what the blocks have"
            raise keys.refuse("hidden_act", trunk["activation"], reason)
        found: dict[str, Any] = {"head": self.head}
        if self.labels:
            found |= {"num_labels": read_labels(keys) if self.labels < 0 else self.labels, "head_form": self.form}
            found["head_dropout"] = 0.0
            if self.dropout:
                usual = keys.take(hidden_dropout, 0.1) if self.usual_dropout is None else self.usual_dropout
                own = keys.take(self.dropout, None)
                found["head_dropout"] = usual if own is None else own
        if self.pooling:
            found["head_pooling"] = keys.choice("classifier_pooling", POOLING, "cls")
        return found

    def write(self, cfg: EncoderConfig) -> dict[str, Any]:
        written = dict(self.says)
        if self.labels < 0:
            written["num_labels"] = cfg.num_labels
        if self.labels and self.dropout:
            written[self.dropout] = cfg.head_dropout
        if self.pooling:
            written["classifier_pooling"] = next(name for name, ours in POOLING.items() if ours == cfg.head_pooling)
        return written


POOLING = {"cls": "first", "mean": "mean"}


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What the heads of a model stand on.

    Attributes:
      title: the models people know it by.
      name: the model's, as its architectures begin.
      model_type: what config.json calls it.
      prefix: of the trunk's tensors where there is a head.
      read, write: the keys of the trunk.
      rules: (config, prefix) to its table.
      hidden_dropout: see Head.usual_dropout.
      head_keys: keys that say something to some heads alone.
      other_heads: as in `Family`.
    """

    title: str
    name: str
    model_type: str
    prefix: str
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[EncoderConfig], dict[str, Any]]
    rules: Callable[[EncoderConfig, str], Iterator[Rule]]
    other_heads: tuple[str, ...]
    hidden_dropout: str = "hidden_dropout_prob"
    head_keys: tuple[str, ...] = ("classifier_dropout",)

    def family(self, head: Head) -> Family:
        bare = head.head in ("embedding", "pooled")
        prefix = "" if bare else self.prefix

        def read(keys: Keys) -> dict[str, Any]:
            keys.ignore(*self.head_keys)
            trunk = self.read(keys)
            return trunk | head.read(keys, trunk, self.hidden_dropout)

        def rules(cfg: EncoderConfig, names: Collection[str]) -> Sequence[Rule]:
            return [*self.rules(cfg, prefix), *head.rules(cfg)]

        return Family(
            self.title,
            self.name + head.name,
            self.model_type,
            read,
            lambda cfg: self.write(cfg) | head.write(cfg),
            rules,
            prefix=prefix,
            no_parameters=(r".*embeddings\.position_ids",),
            tied=head.tied,
            model=EncoderConfig,
            bare_prefix=self.prefix if bare else "",
            needs=head.needs,
            other_heads=self.other_heads,
        )
