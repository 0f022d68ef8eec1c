"""Writes collectives_jax_X.Y.json for the jax that runs it: how many collectives each cell's train step has.

    python tests/golden/make_collectives.py

One file for each minor version of jax, for its partitioner decides. Look at the difference before committing: a new
all-gather of activations, or a collective over one axis more, is a slower run.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import collectives
import jax


def golden_file() -> Path:
    return Path(__file__).parent / f"collectives_jax_{'.'.join(jax.__version__.split('.')[:2])}.json"


if __name__ == "__main__":
    table = {}
    for cell in collectives.CELLS:
        found = collectives.measure(cell)
        table[cell] = collectives.counts(found["collectives"])
        print(f"{cell}: lowered in {found['lower_seconds']} s, compiled in {found['compile_seconds']} s", flush=True)
        print("  ", table[cell], *found["warnings"][:1], flush=True)
    golden_file().write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
