"""What all LLaMA-2 sizes share (Touvron et al. 2023, arXiv 2307.09288, section 2.2 and table 1)."""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

CONTEXT = 4_096


def llama2(
    name: str, machine: str, *, layers: int, width: int, mlp: int, heads: int, kv_heads: int, learning_rate: float
) -> ConfigDict:
    """The config of one size on a machine of configs/machines.py; "": all devices shard the parameters.

    The paper's 4M tokens a step, and no mask between documents, of which it names none.
    """
    model = dict(
        vocab_size=32_000,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        max_length=CONTEXT,
        norm_eps=1e-5,
    )
    tokens = 2_000_000_000_000
    return on_token_files(f"llama2_{name}", machine, model, length=CONTEXT, tokens=tokens, learning_rate=learning_rate)
