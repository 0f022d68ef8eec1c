"""The tutorial on adding a family: its code runs as it stands, and what it adds converts both ways."""

import pathlib
import re

import hub_models
import pytest
from test_convert import assert_same_bits, export, put_reference
from tiny import quick_compiler

from llm_jax.convert import families
from llm_jax.errors import ConfigError
from llm_jax.training import convert

TUTORIAL = pathlib.Path(convert.__file__).parents[1] / "convert" / "README.md"


@pytest.fixture
def example(monkeypatch):
    code = re.search(r"```python\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)[1]
    found = {}
    exec(compile(code, str(TUTORIAL), "exec"), found)
    monkeypatch.setitem(families.FAMILIES, "ExampleForCausalLM", found["EXAMPLE"])
    if hasattr(families, "ALL"):
        monkeypatch.setattr(families, "ALL", (*families.ALL, found["EXAMPLE"]))
    return found["EXAMPLE"]


def checkpoint(folder, **changes):
    """LLaMA 2's tiny model under the example's names."""
    config, arrays = hub_models.stored("LLaMA 2")
    config = {key: value for key, value in config.items() if key not in ("mlp_bias", "attention_bias")}
    config["ffn_dim"] = config.pop("intermediate_size")
    config |= dict(architectures=["ExampleForCausalLM"], model_type="example") | changes
    names = {".mlp.gate_proj": ".ffn.w_gate", ".mlp.up_proj": ".ffn.w_up", ".mlp.down_proj": ".ffn.w_down"}
    for theirs, example in names.items():
        arrays = {key.replace(theirs, example): array for key, array in arrays.items()}
    return hub_models.write(folder, config, arrays), arrays


def test_its_code_converts_both_ways(example, tmp_path):
    with quick_compiler():
        source, arrays = checkpoint(tmp_path / "source")
        put_reference(source, "LLaMA 2")
        convert.from_hub(str(source), str(tmp_path / "run"))
        assert_same_bits(export(tmp_path / "run", tmp_path / "back"), arrays)


def test_it_refuses_as_it_says(example, tmp_path):
    source, _ = checkpoint(tmp_path / "source", ffn_bias=True)
    with pytest.raises(ConfigError, match="ffn_bias = True: our MLP has biases where attention has them"):
        convert.from_hub(str(source), str(tmp_path / "run"))
