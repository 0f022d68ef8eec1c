"""DeepSeek-V2 and V3: latent attention, shared and routed experts, experts chosen within groups, scaled YaRN.

Their rotary pairs are neighbours (x0, y0, x1, y1, ...), ours lie half a head apart: the same model, with rows in
another order.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.config import DecoderConfig
from llm_jax.convert.families.experts import expert_rules, mlp_key
from llm_jax.convert.families.llama import mlp_rules, outer_rules, read_common, write_common
from llm_jax.convert.family import Family, function_of
from llm_jax.convert.keys import Keys, rope_group, rope_of
from llm_jax.convert.packed import read_packing
from llm_jax.convert.rules import Arrays, Chain, Cut, Rule, Shape, Swapped, Transform, linear
from llm_jax.models.attention import query_dim

LATENT_EPS = 1e-6  # of the norms of the latents, whatever rms_norm_eps is
MORE_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")  # behind the others, each predicts one token more

# ------------------------------------------------------------------------------------------------- configs


def read_deepseek(keys: Keys, **defaults: Any) -> dict[str, Any]:
    """What V2 and V3 share; `defaults` of the keys where transformers' differ."""
    keys.only("attention_bias", False, default=False, reason="our latent attention has no biases")
    keys.only("moe_layer_freq", 1, default=1, reason="our model has experts in every layer after the dense ones")
    keys.only("rms_norm_eps", LATENT_EPS, default=LATENT_EPS, reason="the norms of the latents have 1e-6 there")
    keys.ignore("head_dim", "qk_head_dim", "ep_size", "seq_aux")  # qk_rope_head_dim; its sum; how it was trained
    no_positions, rope_dim = keys.take("qk_nope_head_dim", 128), keys.take("qk_rope_head_dim", 64)
    shared, width = keys.take("n_shared_experts", defaults["n_shared_experts"]), keys.take("moe_intermediate_size")
    if not shared:
        raise keys.refuse("n_shared_experts", shared, "transformers' own model always has some")
    rope, scale = read_scaled_rope(keys, no_positions + rope_dim)
    keys.ignore("intermediate_size")  # of the dense layers
    dense = keys.take("first_k_dense_replace", defaults["first_k_dense_replace"])
    found = read_common(keys, rope=rope, mlp_dim=mlp_key(dense), max_length=defaults["max_position_embeddings"])
    if found["num_kv_heads"] != found["num_heads"]:
        raise keys.refuse("num_key_value_heads", found["num_kv_heads"], "latent attention has as many as queries")
    return found | {
        "head_dim": no_positions,
        "attention_scale": scale,
        "latent": {
            "kv_rank": keys.take("kv_lora_rank", 512),
            "query_rank": keys.take("q_lora_rank", 1536) or 0,
            "rope_dim": rope_dim,
            "value_dim": keys.take("v_head_dim", 128),
        },
        "moe": {
            "num_experts": keys.take("n_routed_experts", defaults["n_routed_experts"]),
            "top_k": keys.take("num_experts_per_tok", defaults["num_experts_per_tok"]),
            "expert_dim": width,
            "shared_dim": shared * width,
            "dense_layers": dense,
            "scale": keys.take("routed_scaling_factor", defaults["routed_scaling_factor"]),
            "balance_loss": keys.take("aux_loss_alpha", 0.0),
        },
    }


def write_deepseek(cfg: DecoderConfig) -> dict[str, Any]:
    says = function_of(cfg)
    latent, moe = says.latent, says.moe
    written = write_common(cfg, mlp_dim=mlp_key(moe.dense_layers)) | write_scaled_rope(cfg)
    del written["head_dim"]
    return written | {
        "attention_bias": False,
        "qk_nope_head_dim": says.head_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.query_rank or None,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim,
        "n_shared_experts": moe.shared_dim // moe.expert_dim if moe.expert_dim else 0,
        "first_k_dense_replace": moe.dense_layers,
        "moe_layer_freq": 1,
        "routed_scaling_factor": moe.scale,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "aux_loss_alpha": cfg.moe.balance_loss,
    }


def read_v2(keys: Keys) -> dict[str, Any]:
    keys.only("scoring_func", "softmax", default="softmax", reason="transformers' own V2 scores by softmax")
    keys.only("norm_topk_prob", False, default=False, reason="transformers' own V2 does not read it")
    keys.only("mlp_bias", False, default=False, reason="our latent attention goes with no biases")
    found = read_deepseek(
        keys, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=None, first_k_dense_replace=0,
        routed_scaling_factor=1.0, max_position_embeddings=2048,
    )  # fmt: skip
    methods = {"greedy": "all", "group_limited_greedy": "groups"}
    limited = keys.choice("topk_method", methods, "greedy") == "groups"
    groups, top_groups = keys.take("n_group", None) or 1, keys.take("topk_group", None) or 1
    groups, top_groups = (groups, top_groups) if limited else (1, 1)
    found["moe"] |= {"scores": "softmax", "renormalize": False, "groups": groups, "top_groups": top_groups}
    return found


def write_v2(cfg: DecoderConfig) -> dict[str, Any]:
    method = "group_limited_greedy" if cfg.moe.groups > 1 else "greedy"
    return write_deepseek(cfg) | {"topk_method": method, "scoring_func": "softmax", "norm_topk_prob": False}


def read_v3(keys: Keys) -> dict[str, Any]:
    keys.only("scoring_func", "sigmoid", default="sigmoid", reason="transformers' own V3 scores by sigmoid")
    keys.only("topk_method", "noaux_tc", default="noaux_tc", reason="transformers' own V3 chooses so")
    keys.only("rope_interleave", True, default=True, reason="we write and read rotary pairs as neighbours")
    for name in MORE_LAYERS:
        count = keys.take(name, 0)
        if not isinstance(count, int) or count < 0:
            raise keys.refuse(name, count, "it is a number of layers, whose tensors are left out")
    read_packing(keys, "fp8")
    found = read_deepseek(
        keys, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3,
        routed_scaling_factor=2.5, max_position_embeddings=4096,
    )  # fmt: skip
    found["moe"] |= {
        "scores": "sigmoid",
        "renormalize": keys.take("norm_topk_prob", True),
        "groups": keys.take("n_group", 8),
        "top_groups": keys.take("topk_group", 4),
        "balance_bias": True,
    }
    return found


def write_v3(cfg: DecoderConfig) -> dict[str, Any]:
    return write_deepseek(cfg) | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": cfg.moe.renormalize,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


# ----------------------------------------------------------------------------------------------------- YaRN


def read_scaled_rope(keys: Keys, size: int) -> tuple[dict[str, Any], float]:
    """`model.rope` and `model.attention_scale`: DeepSeek's YaRN scales the scores by the square of a factor m.

    m = 0.1 mscale_all_dim ln(factor) + 1; sine and cosine are scaled by the same of mscale, over m.
    """
    name, given = rope_group(keys)
    given = dict(given)
    over, all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    rope = rope_of(keys, name, given, keys.take("rope_theta", 10_000.0), keys.take("partial_rotary_factor", 1.0))
    if rope.get("scaling") != "yarn":
        if over or all_dim:
            raise keys.refuse(name, given, "mscale and mscale_all_dim have a meaning with yarn alone")
        return rope, 0.0
    if over and all_dim and not rope["attention_factor"]:
        rope["attention_factor"] = magnitude(rope["factor"], over) / magnitude(rope["factor"], all_dim)
    return rope, magnitude(rope["factor"], all_dim) ** 2 * size**-0.5 if all_dim else 0.0


def write_scaled_rope(cfg: DecoderConfig) -> dict[str, Any]:
    """`rope_scaling` with the numbers that `read_scaled_rope` makes the same of; others are refused by reading back."""
    rope = cfg.rope
    if rope.scaling != "yarn" or not cfg.attention_scale:
        return {}
    growth = 0.1 * math.log(rope.factor)
    m = math.sqrt(cfg.attention_scale * query_dim(cfg) ** 0.5)
    found = {"mscale_all_dim": round((m - 1) / growth, 9)}
    if rope.attention_factor:
        found["mscale"] = round((rope.attention_factor * m - 1) / growth, 9)
    written = write_common(cfg)["rope_scaling"]
    written.pop("attention_factor", None)
    return {"rope_scaling": written | found}


def magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0


# -------------------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class OfEachHead:
    """Of each of theirs (heads * H, in): `within`, for each head's (H, in)."""

    heads: int
    within: Transform

    def to_ours(self, theirs: Arrays) -> Arrays:
        return self._joined(self.within.to_ours(self._apart(theirs)))

    def to_theirs(self, ours: Arrays) -> Arrays:
        return self._joined(self.within.to_theirs(self._apart(ours)))

    def their_shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        apart = [(self.heads, rows // self.heads, size) for rows, size in ours]
        return [(heads * rows, size) for heads, rows, size in self.within.their_shapes(apart)]

    def _apart(self, arrays: Arrays) -> Arrays:
        return [array.reshape(self.heads, -1, array.shape[-1]) for array in arrays]

    def _joined(self, arrays: Arrays) -> Arrays:
        return [array.reshape(-1, array.shape[-1]) for array in arrays]


@dataclasses.dataclass(frozen=True)
class PairsApart:
    """The last `size` rows of theirs (..., H, in) are pairs of neighbours; ours are all first ones, then all second."""

    size: int

    def to_ours(self, theirs: Arrays) -> Arrays:
        return [np.concatenate([rest, last[..., 0::2, :], last[..., 1::2, :]], -2) for rest, last in self._cut(theirs)]

    def to_theirs(self, ours: Arrays) -> Arrays:
        found = []
        for rest, last in self._cut(ours):
            pairs = np.stack(np.split(last, 2, axis=-2), axis=-2)
            found.append(np.concatenate([rest, pairs.reshape(last.shape)], -2))
        return found

    def their_shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        return ours

    def _cut(self, arrays: Arrays) -> Iterator[Arrays]:
        return (np.split(array, [array.shape[-2] - self.size], axis=-2) for array in arrays)


def latent_rules(cfg: DecoderConfig) -> Iterator[Rule]:
    theirs, ours = "model.layers.{layer}.self_attn", "stack/{layer}/attention"
    says, latent = function_of(cfg), function_of(cfg).latent
    heads, apart = cfg.num_heads, PairsApart(latent.rope_dim)
    query = Chain((OfEachHead(heads, apart), Swapped()))
    if latent.query_rank:
        yield from linear(f"{theirs}.q_a_proj", f"{ours}/query_down", bias=False)
        yield Rule.of(f"{theirs}.q_a_layernorm.weight", f"{ours}/query_norm/scale")
        yield Rule.of(f"{theirs}.q_b_proj.weight", f"{ours}/query_up/kernel", query)
    else:
        yield Rule.of(f"{theirs}.q_proj.weight", f"{ours}/query/kernel", query)
    down = [f"{ours}/latent_down/kernel", f"{ours}/key_rope/kernel"]
    steps = (apart, Cut(-2, (latent.kv_rank, latent.rope_dim)), Swapped())
    yield Rule.of(f"{theirs}.kv_a_proj_with_mqa.weight", down, Chain(steps))
    yield Rule.of(f"{theirs}.kv_a_layernorm.weight", f"{ours}/latent_norm/scale")
    up = [f"{ours}/key_up/kernel", f"{ours}/value_up/kernel"]
    by_head = OfEachHead(heads, Cut(-2, (says.head_dim, latent.value_dim)))
    yield Rule.of(f"{theirs}.kv_b_proj.weight", up, Chain((by_head, Swapped())))
    yield from linear(f"{theirs}.o_proj", f"{ours}/out", bias=False)


def deepseek_rules(cfg: DecoderConfig, names: Collection[str]) -> Iterator[Rule]:
    theirs, ours = "model.layers.{layer}.mlp", "stack/{layer}"
    yield from outer_rules(cfg)
    yield from latent_rules(cfg)
    yield from expert_rules(cfg, names)
    if cfg.moe.dense_layers:
        yield from mlp_rules(cfg)
    if cfg.moe.balance_bias:
        yield Rule.of(f"{theirs}.gate.e_score_correction_bias", f"{ours}/moe/balance_bias")
    for name in ("gate", "up", "down"):
        yield from linear(f"{theirs}.shared_experts.{name}_proj", f"{ours}/shared_mlp/{name}", bias=False)


def further_layers(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of multi-token prediction (arXiv 2412.19437, section 2.2): numbered on from the model's own layers, they
    have no part in what it computes."""
    depth, more = values["num_hidden_layers"], max(values.get(name, 0) for name in MORE_LAYERS)
    return tuple(rf"model\.layers\.{layer}\..*" for layer in range(depth, depth + more))


DEEPSEEK_V2 = Family("DeepSeek-V2", "DeepseekV2ForCausalLM", "deepseek_v2", read_v2, write_v2, deepseek_rules)
DEEPSEEK_V3 = Family(
    "DeepSeek-V3, R1",
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    read_v3,
    write_v3,
    deepseek_rules,
    further_layers=further_layers,
    wide=(r".*\.e_score_correction_bias",),
)
