"""`convert --list`: the table of what is supported says what the tests prove, and the README shows it."""

import importlib.util
import json
import pathlib

from llm_jax.convert import families
from llm_jax.training import mapping

ROOT = pathlib.Path(__file__).parents[1]


def maker():
    path = ROOT / "tests" / "golden" / "make_support.py"
    spec = importlib.util.spec_from_file_location("make_support", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stored_table_is_what_the_tests_hold():
    made = maker()
    assert json.loads(made.FILE.read_text()) == made.support(), "run python tests/golden/make_support.py"


def test_every_family_of_decoders_is_proven():
    proven = maker().support()
    decoders = [name for name in families.FAMILIES if name.endswith(("CausalLM", "LMHeadModel"))]
    assert len(decoders) >= 8 and all(proven.get(name) for name in decoders)
    rows = mapping.support_table().splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(families.FAMILIES)


def test_the_readme_shows_the_rows_of_the_decoders():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("$ llm-jax convert --list\n")[1].split("```")[0].splitlines()
    wanted = [row.rstrip() for row in mapping.support_table().splitlines() if "CausalLM" in row or "LMHeadModel" in row]
    assert [line for line in shown[1:] if line.strip() and line != "..."] == wanted
