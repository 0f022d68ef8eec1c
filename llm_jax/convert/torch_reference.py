"""Writes the logits that transformers computes for a checkpoint: what its conversion is compared with.

    python -m llm_jax.convert.torch_reference FOLDER [--to=FILE] [--rounded=DTYPE] [--adapter=FOLDER [--merge]]

Needs torch and transformers, for an adapter peft too (the extra `parity`). A process of its own: nothing else of the
package imports torch.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.config import EncoderConfig
from llm_jax.convert import safetensors
from llm_jax.convert.reference import STORED, kept_positions, prompts
from llm_jax.convert.source import Source, open_folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the logits of a checkpoint, as transformers computes them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, help=f"default: FOLDER/{STORED}")
    parser.add_argument("--rounded", help="round the parameters to this dtype first")
    parser.add_argument("--adapter", type=Path, help="an adapter of the library peft, with which logits are computed")
    parser.add_argument("--merge", action="store_true", help="merge the adapter before rounding")
    args = parser.parse_args()
    found = open_folder(args.folder)
    cfg = found.cfg
    tokens = prompts(cfg.vocab_size, cfg.max_length)
    pad = found.values.get("pad_token_id")
    if isinstance(cfg, EncoderConfig) and pad is not None:  # RoBERTa counts no positions there
        tokens[tokens == pad] = (pad + 1) % cfg.vocab_size
    positions = kept_positions(tokens.shape[1], cfg.vocab_size)
    logits = logits_of(found, tokens, positions, args.rounded, args.adapter, merge=args.merge)
    write(args.to or (args.adapter or args.folder) / STORED, tokens, positions, logits)


def logits_of(
    found: Source,
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

    encoder = isinstance(found.cfg, EncoderConfig)
    form = getattr(transformers, found.family.architecture) if encoder else transformers.AutoModelForCausalLM
    model = form.from_pretrained(
        found.folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
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
        rows = []
        for row in torch.from_numpy(tokens).long():
            if encoder:
                given = row[None, None] if "MultipleChoice" in found.family.architecture else row[None]
                out = encoder_outputs(model(given, attention_mask=torch.ones_like(given)), found.cfg.head, keep)
            else:
                out = model(row[None]).logits[:, keep]
            rows.append(out[0].numpy())
    return np.stack(rows).astype(np.float32)


def encoder_outputs(found: Any, head: str, positions: Any) -> Any:
    """(B, P, V) of an output of transformers: what the head makes of tokens, behind it of the text, at each place."""
    import torch

    def everywhere(of_text: Any) -> Any:
        return of_text[:, None].expand(-1, len(positions), -1)

    match head:
        case "masked":
            return found.logits[:, positions]
        case "masked_pairs" if "prediction_logits" in found:
            tokens = found.prediction_logits[:, positions]
            return torch.cat([tokens, everywhere(found.seq_relationship_logits)], -1)
        case "masked_pairs":  # a class without the head of pairs
            return found.logits[:, positions]
        case "text":
            return everywhere(found.logits)
        case "token":
            logits = found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits], -1)
            return logits[:, positions]
        case "replaced":
            return found.logits[:, positions, None]
        case "embedding":
            return found.last_hidden_state[:, positions]
    return torch.cat([found.last_hidden_state[:, positions], everywhere(found.pooler_output)], -1)


def write(path: Path, tokens: np.ndarray, positions: np.ndarray, logits: np.ndarray) -> None:
    arrays = {"tokens": tokens.astype(np.int32), "positions": positions.astype(np.int32), "logits": logits}
    planned = [safetensors.Planned(name, array.dtype, array.shape) for name, array in arrays.items()]
    safetensors.write_file(path, planned, lambda tensor: arrays[tensor.name])


if __name__ == "__main__":
    main()
