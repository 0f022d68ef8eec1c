"""State dicts of transformers' models as our parameter trees, written out by hand: tests compare with them."""

from collections.abc import Callable

import numpy as np

State = dict[str, np.ndarray]


def stacked(layers: int, one: Callable[[int], dict]) -> dict:
    """The blocks' trees, one on top of the other."""
    blocks = [one(i) for i in range(layers)]

    def stack(*nodes):
        return {k: stack(*(n[k] for n in nodes)) for k in nodes[0]} if isinstance(nodes[0], dict) else np.stack(nodes)

    return {"blocks": stack(*blocks)}


def gpt2(state: State, layers: int) -> dict:
    """GPT2LMHeadModel: its Conv1D holds (in, out) as we do, with query, key and value side by side."""

    def affine(name: str) -> dict:
        return {"kernel": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def norm(name: str) -> dict:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(i: int) -> dict:
        at = f"transformer.h.{i}"
        kernels = np.split(state[f"{at}.attn.c_attn.weight"], 3, axis=1)
        biases = np.split(state[f"{at}.attn.c_attn.bias"], 3)
        projections = {
            name: {"kernel": kernel, "bias": bias}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        return {
            "attention_norm": norm(f"{at}.ln_1"),
            "attention": projections | {"out": affine(f"{at}.attn.c_proj")},
            "mlp_norm": norm(f"{at}.ln_2"),
            "mlp": {"up": affine(f"{at}.mlp.c_fc"), "down": affine(f"{at}.mlp.c_proj")},
        }

    return {
        "embedding": {"table": state["transformer.wte.weight"]},
        "positions": {"table": state["transformer.wpe.weight"]},
        "stack": stacked(layers, block),
        "final_norm": norm("transformer.ln_f"),
    }


def llama(state: State, layers: int) -> dict:
    """LlamaForCausalLM and those that name their parts alike: Mistral, Qwen2 (biases), Qwen3 (norms of heads)."""

    def linear(name: str) -> dict:  # torch.nn.Linear holds (out, in)
        bias = {"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {}
        return {"kernel": state[f"{name}.weight"].T} | bias

    def norm(name: str) -> dict:
        return {"scale": state[f"{name}.weight"]}

    def block(i: int) -> dict:
        at = f"model.layers.{i}"
        attention = {
            ours: linear(f"{at}.self_attn.{theirs}_proj")
            for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
        }
        if f"{at}.self_attn.q_norm.weight" in state:
            attention["query_norm"] = norm(f"{at}.self_attn.q_norm")
            attention["key_norm"] = norm(f"{at}.self_attn.k_norm")
        return {
            "attention_norm": norm(f"{at}.input_layernorm"),
            "attention": attention,
            "mlp_norm": norm(f"{at}.post_attention_layernorm"),
            "mlp": {name: linear(f"{at}.mlp.{name}_proj") for name in ("gate", "up", "down")},
        }

    return {
        "embedding": {"table": state["model.embed_tokens.weight"]},
        "stack": stacked(layers, block),
        "final_norm": norm("model.norm"),
        "head": {"kernel": state["lm_head.weight"].T},
    }
