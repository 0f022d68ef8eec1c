"""From files to batches: sources, tokenizers, prepared stores."""
