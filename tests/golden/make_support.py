"""Writes llm_jax/convert/support.json: which tiny models of the tests prove each architecture of `convert --list`.

python tests/golden/make_support.py
"""

import json
import pathlib

GOLDEN = pathlib.Path(__file__).parent
FILE = GOLDEN.parents[1] / "llm_jax" / "convert" / "support.json"
MODELS = ("convert_models.json", "encoder_models.json")  # every model here has stored logits, and a test of parity


def support() -> dict[str, list[str]]:
    """{architecture: names of its tiny models}."""
    found: dict[str, list[str]] = {}
    for path in (GOLDEN / name for name in MODELS):
        for name, model in (json.loads(path.read_text()) if path.exists() else {}).items():
            found.setdefault(model["config"]["architectures"][0], []).append(name)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    FILE.write_text(json.dumps(support(), indent=1) + "\n")
