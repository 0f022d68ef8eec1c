"""What a model's keys ask of one another, refused when the config is read: nothing here touches a device."""

import dataclasses
import re

from llm_jax.config.schema import (
    LAYER_KINDS,
    EncoderConfig,
    LatentConfig,
    LoraConfig,
    MoEConfig,
    TransformerConfig,
)
from llm_jax.config.values import did_you_mean, divisors, nearest_multiples, refuse

# What `model.remat_save` may name: the tensors of a block that the backward pass can find kept. Of experts the "mlp"
# ones are of all rows that they work on: top_k times as many as of an MLP.
TENSOR_NAMES = (
    "layer_input", "query", "key", "value", "attention", "attention_output", "mlp_gate", "mlp_up", "mlp_output",
)  # fmt: skip
GATED = ("swiglu", "geglu", "geglu_erf", "clamped_swiglu")
NEEDS_LATENT = ("query_rank", "rope_dim", "value_dim")


def check_model(model: TransformerConfig) -> None:
    if not model.head_dim and model.embed_dim % model.num_heads:
        reason = f"it does not split into model.num_heads = {model.num_heads} heads"
        raise refuse(
            "model.embed_dim",
            model.embed_dim,
            reason,
            f"give {nearest_multiples(model.embed_dim, model.num_heads)}, or set model.head_dim",
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        reason = f"each serves the same number of query heads, and model.num_heads = {model.num_heads}"
        raise refuse(
            "model.num_kv_heads",
            model.num_kv_heads,
            reason,
            f"give one of {', '.join(map(str, divisors(model.num_heads)))}",
        )
    check_positions(model)
    if isinstance(model, EncoderConfig):
        check_encoder(model)
    check_pattern(model)
    check_latent(model)
    check_experts(model)
    check_remat(model)
    check_lora(model.lora)
    if model.bias == "all" and model.norm == "layernorm" and model.norm_scale == "none":
        raise refuse(
            "model.norm_scale",
            "none",
            "model.bias = 'all' asks for a bias in each LayerNorm",
            "set norm_scale=one, or bias=attention, qkv or none",
        )
    if model.padded_vocab_in_softmax and model.vocab_multiple == 1:
        raise refuse(
            "model.padded_vocab_in_softmax",
            True,
            "model.vocab_multiple is 1, so nothing is padded",
            "set model.vocab_multiple, or leave this False",
        )


def check_encoder(model: EncoderConfig) -> None:
    """What an encoder has no form of, and keys that its head or positions do not read."""
    default = EncoderConfig()
    for key, value, needed, reason in (
        ("moe.num_experts", model.moe.num_experts, 0, "an encoder's objectives have no terms for routing"),
        ("latent.kv_rank", model.latent.kv_rank, 0, "latent attention is a decoder's"),
        ("sliding_window", model.sliding_window % 2, 0, "half of an encoder's window lies on each side of a token"),
    ):
        if value != needed:
            raise refuse(f"model.{key}", value if key != "sliding_window" else model.sliding_window, reason,
                         "give an even number" if key == "sliding_window" else f"set it to {needed}")  # fmt: skip
    labelled = ("text", "token")
    for key, other, needed in (
        ("num_labels", "head", labelled),
        ("head_dropout", "head", labelled),
        ("head_form", "head", (*labelled, "pooled")),
        ("head_pooling", "head", ("text", "pooled")),
        ("tie_embeddings", "head", ("masked", "masked_pairs")),
        ("generator_divisor", "head", ("replaced",)),
        ("first_position", "positions", ("learned",)),
    ):
        value, condition = getattr(model, key), getattr(model, other)
        if value != getattr(default, key) and condition not in needed:
            reason = f"it is read only with model.{other} = {' or '.join(needed)}, and that is {condition!r}"
            raise refuse(f"model.{key}", value, reason, "change that, or leave this key out")
    if model.positions == "disentangled":
        check_disentangled(model)
    if model.generator_divisor:
        check_generator(model)


def check_generator(model: EncoderConfig) -> None:
    """A generator is the encoder with its width, heads and MLP divided, over the same embeddings."""
    parts = model.generator_divisor
    for key in ("embed_dim", "num_heads", "num_kv_heads", "mlp_dim"):
        if getattr(model, key) % parts:
            reason = f"model.{key} = {getattr(model, key)} does not split into so many"
            raise refuse("model.generator_divisor", parts, reason, "give a divisor of it")
    if model.positions in ("relative", "disentangled"):
        reason = "the generator reads the positions in its embeddings, and these lie in the discriminator's attention"
        raise refuse("model.positions", model.positions, reason, "set learned, sinusoidal or rotary")
    if model.lora.rank:
        raise refuse("model.lora.rank", model.lora.rank, "a generator has no adapters", "set model.generator_divisor=0")


def check_disentangled(model: EncoderConfig) -> None:
    for key, needed in (("num_kv_heads", (0, model.num_heads)), ("attention_scale", (0.0,)), ("qk_norm", ("none",))):
        value = getattr(model, key)
        if value not in needed:
            reason = "model.positions = 'disentangled' adds scores of positions by the same projections"
            raise refuse(f"model.{key}", value, reason, f"set {key}={needed[0]}")
    buckets = model.relative_buckets
    if buckets % 4 or model.relative_max_distance <= buckets // 4 + 1:
        reason = "a quarter of them is exact on each side, up to model.relative_max_distance = "
        reason += str(model.relative_max_distance)
        raise refuse("model.relative_buckets", buckets, reason, "give a multiple of 4, and a larger distance")


def check_pattern(model: TransformerConfig) -> None:
    """`layer_pattern` reads as kinds of layers, and the window is one that some layers have."""
    pattern, window = model.layer_pattern, model.sliding_window
    for word in pattern:
        if word not in LAYER_KINDS:
            listed = f"it can be {', '.join(LAYER_KINDS)}"
            reason = "there is no such kind of layer"
            raise refuse("model.layer_pattern", word, reason, did_you_mean(word, LAYER_KINDS, listed))
    if "window" in pattern and not window:
        reason = "model.sliding_window is 0, so there is no window"
        raise refuse("model.layer_pattern", ",".join(pattern), reason, "set model.sliding_window")
    if pattern and window and "window" not in pattern:
        reason = "no layer of model.layer_pattern has the window"
        raise refuse("model.sliding_window", window, reason, "set it 0, or name window in model.layer_pattern")
    if model.num_layers < len(pattern):
        reason = f"model.num_layers = {model.num_layers} layers do not reach its end"
        raise refuse("model.layer_pattern", ",".join(pattern), reason, "give the kinds of those layers alone")
    if "full_without_positions" in pattern and model.positions != "rotary":
        reason = f"model.positions = {model.positions} are added below all layers, or to all scores"
        raise refuse("model.layer_pattern", ",".join(pattern), reason, "set model.positions=rotary")
    if model.window_rope_base and (model.positions != "rotary" or not window):
        reason = "no layer has both a window and rotary positions"
        fix = "leave it 0, or set model.sliding_window and model.positions=rotary"
        raise refuse("model.window_rope_base", model.window_rope_base, reason, fix)


def check_latent(model: TransformerConfig) -> None:
    latent, default = model.latent, LatentConfig()
    if not latent.kv_rank:
        for name in NEEDS_LATENT:
            if getattr(latent, name) != getattr(default, name):
                reason = "model.latent.kv_rank is 0, so attention is not latent"
                fix = "set model.latent.kv_rank, or leave this out"
                raise refuse(f"model.latent.{name}", getattr(latent, name), reason, fix)
        return
    if latent.rope_dim % 2:
        raise refuse("model.latent.rope_dim", latent.rope_dim, "rotary positions turn pairs", "give an even number")
    for key, value, needed in (
        ("positions", model.positions, ("rotary",)),
        ("qk_norm", model.qk_norm, ("none",)),
        ("num_kv_heads", model.num_kv_heads, (0, model.num_heads)),
        ("rope.fraction", model.rope.fraction, (1.0,)),
        ("bias", model.bias, ("none",)),
        ("attention_sinks", model.attention_sinks, (False,)),
    ):
        if value not in needed:
            reason = f"model.latent.kv_rank = {latent.kv_rank} makes attention latent, which has no such form"
            raise refuse(f"model.{key}", value, reason, f"set {key.rpartition('.')[2]}={needed[0]}")


def check_experts(model: TransformerConfig) -> None:
    moe, default = model.moe, MoEConfig()
    for name, value in vars(moe).items():
        if not moe.num_experts and value != getattr(default, name):
            reason = "model.moe.num_experts is 0, so there are no experts"
            raise refuse(f"model.moe.{name}", value, reason, "set model.moe.num_experts, or leave this out")
    if not moe.num_experts:
        return
    if moe.top_k > moe.num_experts:
        reason = f"a token cannot go to more than model.moe.num_experts = {moe.num_experts} experts"
        raise refuse("model.moe.top_k", moe.top_k, reason, f"give at most {moe.num_experts}")
    if moe.top_k == 1 and moe.renormalize:
        reason = "with model.moe.top_k = 1 the weight would always be 1, and the loss could not train the router"
        raise refuse("model.moe.renormalize", True, reason, "set renormalize=False (Switch), or top_k=2")
    if moe.dense_layers >= model.num_layers:
        reason = f"no layer of model.num_layers = {model.num_layers} would have experts"
        raise refuse("model.moe.dense_layers", moe.dense_layers, reason, "give fewer, or set num_experts=0")
    if moe.balance_rate != default.balance_rate and not moe.balance_bias:
        reason = "model.moe.balance_bias is False, so nothing moves by it"
        raise refuse("model.moe.balance_rate", moe.balance_rate, reason, "set balance_bias=True, or leave this out")
    check_expert_groups(moe)


def check_expert_groups(moe: MoEConfig) -> None:
    """Groups are equal, and those that are chosen hold as many experts as a token goes to."""
    if moe.num_experts % moe.groups:
        reason = f"model.moe.num_experts = {moe.num_experts} does not split into so many equal groups"
        fix = f"give one of {', '.join(map(str, divisors(moe.num_experts)))}"
        raise refuse("model.moe.groups", moe.groups, reason, fix)
    size = moe.num_experts // moe.groups
    if moe.top_groups > moe.groups:
        reason = f"there are model.moe.groups = {moe.groups} of them"
        raise refuse("model.moe.top_groups", moe.top_groups, reason, f"give at most {moe.groups}")
    if moe.top_groups * size < moe.top_k:
        reason = f"so many groups of {size} experts do not hold the model.moe.top_k = {moe.top_k} that a token goes to"
        raise refuse("model.moe.top_groups", moe.top_groups, reason, f"give at least {-(-moe.top_k // size)}")
    if moe.groups > 1 and moe.scores == "sigmoid" and size < 2:
        reason = "by sigmoid scores a group is as good as its best two experts, and each group has one"
        raise refuse("model.moe.groups", moe.groups, reason, "give fewer groups, or scores=softmax")


def check_lora(lora: LoraConfig) -> None:
    default = LoraConfig()
    for field in dataclasses.fields(lora):
        value = getattr(lora, field.name)
        if not lora.rank and value != getattr(default, field.name):
            reason = "model.lora.rank is 0, so there are no adapters"
            raise refuse(f"model.lora.{field.name}", value, reason, "set model.lora.rank, or leave this out")
    if not lora.targets:
        raise refuse("model.lora.targets", (), "nothing would have adapters", 'leave it out for all: (".*",)')
    for pattern in lora.targets:
        try:
            re.compile(pattern)
        except re.error as error:
            raise refuse("model.lora.targets", pattern, f"it is no regular expression ({error})", "mend it") from None


def check_remat(model: TransformerConfig) -> None:
    absent = {} if model.activation in GATED else {"mlp_gate": f"model.activation = {model.activation} has no gate"}
    names = [entry.partition("=")[0] for entry in model.remat_save]
    for entry in model.remat_save:
        name, equals, place = entry.partition("=")
        if name not in TENSOR_NAMES or equals and place != "host":
            reason = f"it does not read as NAME or NAME=host, with one of {', '.join(TENSOR_NAMES)}"
            fix = did_you_mean(name, TENSOR_NAMES, "query keeps the queries, query=host in the host's memory")
            raise refuse("model.remat_save", entry, reason, fix)
        if name in absent:
            raise refuse("model.remat_save", entry, absent[name], "leave it out")
        if names.count(name) > 1:
            raise refuse("model.remat_save", entry, f"{name} is named twice", "keep one of the two")
    if model.remat == "names" and not model.remat_save:
        raise refuse("model.remat", "names", "model.remat_save names nothing to keep", "set it, or remat=full")


def check_positions(model: TransformerConfig) -> None:
    head_dim = model.head_dim or model.embed_dim // model.num_heads
    if model.positions == "rotary":
        rotated = head_dim * model.rope.fraction
        if not model.latent.kv_rank and (rotated != int(rotated) or int(rotated) % 2):  # of latents: check_latent
            reason = f"rotary positions turn pairs, and {rotated:g} of each head's {head_dim} numbers would turn"
            key, value = ("head_dim", head_dim) if model.rope.fraction == 1 else ("rope.fraction", model.rope.fraction)
            raise refuse(f"model.{key}", value, reason, "give a value that makes it an even whole number")
        if model.rope.scaling != "none" and model.rope.factor == 1:
            raise refuse(
                "model.rope.scaling",
                model.rope.scaling,
                "model.rope.factor is 1, so nothing is scaled",
                "set model.rope.factor, or scaling=none",
            )
        if model.rope.high_freq_factor <= model.rope.low_freq_factor:
            reason = f"it must be above model.rope.low_freq_factor = {model.rope.low_freq_factor:g}"
            raise refuse("model.rope.high_freq_factor", model.rope.high_freq_factor, reason, "4 and 1 are usual")
        if model.rope.beta_fast <= model.rope.beta_slow:
            reason = f"it must be above model.rope.beta_slow = {model.rope.beta_slow:g}"
            raise refuse("model.rope.beta_fast", model.rope.beta_fast, reason, "32 and 1 are usual")
    if model.positions == "sinusoidal" and model.embed_dim % 2:
        raise refuse(
            "model.embed_dim", model.embed_dim, "sinusoidal positions are pairs of sine and cosine", "make it even"
        )
    if model.positions == "relative" and model.relative_max_distance <= model.relative_buckets // 2:
        reason = f"the first {model.relative_buckets // 2} buckets already hold one distance each"
        raise refuse(
            "model.relative_max_distance",
            model.relative_max_distance,
            reason,
            f"give more than {model.relative_buckets // 2}, or fewer model.relative_buckets",
        )
