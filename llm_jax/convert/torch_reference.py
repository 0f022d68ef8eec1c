"""Writes the logits that transformers computes for a checkpoint: what its conversion is compared with.

    python -m llm_jax.convert.torch_reference FOLDER [--to=FILE] [--rounded=DTYPE] [--adapter=FOLDER [--merge]]

Needs torch and transformers, for an adapter peft too (the extra `parity`). A process of its own: nothing else of the
package imports torch.
"""

import argparse
from pathlib import Path

import numpy as np

from llm_jax.convert import safetensors
from llm_jax.convert.reference import STORED, kept_positions, prompts
from llm_jax.convert.source import open_folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the logits of a checkpoint, as transformers computes them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, help=f"default: FOLDER/{STORED}")
    parser.add_argument("--rounded", help="round the parameters to this dtype first")
    parser.add_argument("--adapter", type=Path, help="an adapter of the library peft, with which logits are computed")
    parser.add_argument("--merge", action="store_true", help="merge the adapter before rounding")
    args = parser.parse_args()
    cfg = open_folder(args.folder).cfg
    tokens = prompts(cfg.vocab_size, cfg.max_length)
    positions = kept_positions(tokens.shape[1], cfg.vocab_size)
    logits = logits_of(args.folder, tokens, positions, args.rounded, args.adapter, merge=args.merge)
    write(args.to or (args.adapter or args.folder) / STORED, tokens, positions, logits)


def logits_of(
    folder: Path,
    tokens: np.ndarray,
    positions: np.ndarray,
    rounded: str | None,
    adapter: Path | None = None,
    *,
    merge: bool = False,
) -> np.ndarray:
    """(B, P, V) float32, one row at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    ).eval()
    base = list(model.parameters())
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        if merge:
            model = model.merge_and_unload()
            base = list(model.parameters())
    keep = torch.from_numpy(positions).long()
    with torch.no_grad():
        for parameter in base if rounded else ():
            parameter.copy_(parameter.to(getattr(torch, rounded)))
        rows = [model(torch.from_numpy(row[None]).long()).logits[0, keep].numpy() for row in tokens]
    return np.stack(rows).astype(np.float32)


def write(path: Path, tokens: np.ndarray, positions: np.ndarray, logits: np.ndarray) -> None:
    arrays = {"tokens": tokens.astype(np.int32), "positions": positions.astype(np.int32), "logits": logits}
    planned = [safetensors.Planned(name, array.dtype, array.shape) for name, array in arrays.items()]
    safetensors.write_file(path, planned, lambda tensor: arrays[tensor.name])


if __name__ == "__main__":
    main()
