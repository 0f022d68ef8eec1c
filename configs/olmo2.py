"""OLMo 2, 1B, 7B, 13B and 32B parameters: norms of what attention and MLP give, and of all heads together.

Command    llm-jax train --config=olmo2:7b:h100x64 --config.data.path='train_*.bin'
Data       token files with its vocabulary (100,278), held-out ones as data.validation_path; the text of OLMo-mix-1124
           is open
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   MMLU 63.7 (7B) and 67.5 (13B) were published, after a second stage on other data that is not in this recipe
Source     Walsh et al. 2024, arXiv 2501.00656, section 3; config.json of OLMo-2-0425-1B, OLMo-2-1124-7B and -13B,
           OLMo-2-0325-32B
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

COLUMNS = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim")
SIZES = {  # rows a step, tokens, learning rate
    "1b": ((16, 2_048, 16, 16, 8_192), 512, 4_000_000_000_000, 4e-4),
    "7b": ((32, 4_096, 32, 32, 11_008), 1_024, 4_000_000_000_000, 3e-4),
    "13b": ((40, 5_120, 40, 40, 13_824), 2_048, 5_000_000_000_000, 9e-4),
    "32b": ((64, 5_120, 40, 8, 27_648), 2_048, 6_000_000_000_000, 6e-4),
}


def get_config(arg: str = "7b") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"olmo2:{size} is not one of {', '.join(SIZES)}"
    shape, rows, tokens, learning_rate = SIZES[size]
    model = dict(zip(COLUMNS, shape, strict=True))
    model |= dict(vocab_size=100_352, max_length=4_096, rope=dict(base=500_000.0), norm_eps=1e-6)
    model |= dict(norm_placement="output", qk_norm="all", residual_init_scale=False)  # all from N(0, 0.02)
    cfg = on_token_files(
        f"olmo2_{size}",
        machine,
        model,
        length=4_096,
        rows=rows,
        tokens=tokens,
        learning_rate=learning_rate,
        optim=dict(eps=1e-8),
    )
    cfg.train.z_loss = 1e-5
    return cfg
