"""SmolLM2, 135M, 360M and 1.7B parameters: small models in the LLaMA form.

Command    llm-jax train --config=smollm2:135m --config.data.path='train_*.bin'
Data       token files with their vocabulary (49,152), held-out ones as data.validation_path; 2T, 4T and 11T tokens
Hardware   any machine of configs/machines.py, as smollm2:1b7:h100x8; it sets the mesh (launch/meshes.md)
Expected   HellaSwag 42.1, 54.5 and 68.7 were published, on mixtures that changed in the course of the runs
Source     Ben Allal et al. 2025, arXiv 2502.02737, sections 4 and 6; config.json of SmolLM2-135M to -1.7B
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

COLUMNS = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim")
SIZES = {
    "135m": ((30, 576, 9, 3, 1_536), 1e5, 2_000_000_000_000, 3e-3),
    "360m": ((32, 960, 15, 5, 2_560), 1e5, 4_000_000_000_000, 3e-3),
    "1b7": ((24, 2_048, 32, 32, 8_192), 1.3e5, 11_000_000_000_000, 5e-4),
}


def get_config(arg: str = "135m") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"smollm2:{size} is not one of {', '.join(SIZES)}"
    shape, base, tokens, learning_rate = SIZES[size]
    model = dict(zip(COLUMNS, shape, strict=True))
    model |= dict(vocab_size=49_152, max_length=8_192, rope=dict(base=base), norm_eps=1e-5, tie_embeddings=True)
    wsd = dict(schedule="wsd", cooldown_ratio=0.1, final_ratio=0.0)  # as published: decay over the last tenth
    return on_token_files(
        f"smollm2_{size}", machine, model, length=2_048, tokens=tokens, learning_rate=learning_rate, optim=wsd
    )
