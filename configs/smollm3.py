"""SmolLM3, 3B parameters: every fourth layer has no positions.

Command    llm-jax train --config=smollm3:3b:h100x64 --config.data.path='train_*.bin'
Data       token files with LLaMA 3's vocabulary (128,256), held-out ones as data.validation_path; 11.2T tokens
Hardware   any machine of configs/machines.py; it sets the mesh (launch/meshes.md)
Expected   none for this recipe: the published model changed its mixture in three stages, then its base and its length
Source     Bakouch et al. 2025, huggingface.co/blog/smollm3; config.json of SmolLM3-3B. Its rotary base is that of the
           released model, for 65,536 tokens; most of the training had 50,000
"""

from ml_collections import ConfigDict

from configs.pretraining import on_token_files

SIZES = {"3b": dict(num_layers=36, embed_dim=2_048, num_heads=16, num_kv_heads=4, mlp_dim=11_008)}


def get_config(arg: str = "3b") -> ConfigDict:
    """`arg`: "SIZE" or "SIZE:MACHINE"."""
    size, _, machine = arg.partition(":")
    assert size in SIZES, f"smollm3:{size} is not one of {', '.join(SIZES)}"
    model = SIZES[size] | dict(vocab_size=128_256, max_length=65_536, rope=dict(base=5_000_000.0), norm_eps=1e-6)
    model |= dict(layer_pattern=("full", "full", "full", "full_without_positions"), tie_embeddings=True)
    return on_token_files(
        f"smollm3_{size}",
        machine,
        model,
        length=4_096,
        rows=576,  # 2.36M tokens a step
        tokens=11_200_000_000_000,
        learning_rate=2e-4,
        mask_documents=True,
        optim=dict(schedule="wsd", cooldown_ratio=0.1, final_ratio=0.0, eps=1e-8),
    )
