"""Config files, overrides, types and ranges; the way to plain data and back."""

import dataclasses
import json
import math
import textwrap

import ml_collections
import pytest

from llm_jax.config import Config, SourceConfig, check, config_names, differences, find_config, from_dict, load, to_dict
from llm_jax.config.resolve import all_keys
from llm_jax.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """Writes a config file below tmp_path and returns its path."""

    def write_file(body: str, name: str = "x.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import ml_collections\n" + textwrap.dedent(body))
        return str(path)

    return write_file


def refusal(*overrides: str, spec: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        load(spec, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.steps=1000", 1000),
        ("train.steps=1e3", 1000),
        ("train.steps=1_000", 1000),
        ("train.tokens=1e11", 10**11),
        ("optim.learning_rate=3", 3.0),
        ("optim.learning_rate=3e-4", 3e-4),
        ("mesh.data=-1", -1),
        ("data.shuffle=false", False),
        ("data.shuffle=True", True),
        ("data.shuffle=0", False),
        ("data.tokenizer=none", "none"),
        ("generate.prompt=a = b", "a = b"),
        ("optim.freeze=", ()),
        ("optim.freeze=()", ()),
        ("optim.freeze=a", ("a",)),
        ("optim.freeze=a, b", ("a", "b")),
        ("optim.freeze=[a,b]", ("a", "b")),
        ("optim.freeze=('a','b,c')", ("a", "b,c")),
        ("optim.freeze=('a')", ("a",)),
        ("optim.freeze=(a|b)/[cd]", ("(a|b)/[cd]",)),
        ('generate.stop=["\\n"]', ("\n",)),
        ("config.train.steps=7", 7),
    ],
)
def test_override_becomes_the_keys_type(override, expected):
    value = load("", [override])
    for name in override.partition("=")[0].removeprefix("config.").split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_later_overrides_win():
    assert load("", ["train.steps=1", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.learnig_rate=1", ["optim.learnig_rate = '1'", "no such key", "did you mean optim.learning_rate?"]),
        ("learning_rate=1", ["did you mean optim.learning_rate?"]),
        ("lr=1", ["did you mean optim.learning_rate?"]),
        ("batch_size=1", ["train.global_batch_size"]),
        ("model.num_kv_head=1", ["model.num_kv_heads"]),
        ("data.mixture.wiki.wieght=1", ["data.mixture.NAME.weight"]),
        ("zzz=1", ["the keys and groups are name, seed, model"]),
        ("train.steps=abc", ["train.steps = 'abc'", "whole number"]),
        ("train.steps=1.5", ["whole number", "1 or 2"]),
        ("train.steps=1e999999999", ["64 bits"]),
        ("train.steps=true", ["whole number"]),
        ("train.steps=", ["whole number"]),
        ("train.steps=nan", ["whole number"]),
        ("train.steps=-5", ["train.steps = -5", "at least 0"]),
        ("optim.learning_rate=nan", ["optim.learning_rate = 'nan'", "NaN"]),
        ("optim.learning_rate=inf", ["infinity"]),
        ("optim.learning_rate=-1", ["above 0"]),
        ("optim.learning_rate=0", ["above 0"]),
        ("optim.warmup_ratio=1.1", ["at least 0 and at most 1"]),
        ("data.shuffle=maybe", ["yes or no", "true or false"]),
        ("model.norm=rms", ["did you mean rmsnorm?", "rmsnorm, layernorm"]),
        ("model.norm=None", ["not one of its choices"]),
        ("optim.name=AdamW", ["did you mean adamw?"]),
        ("data.path=None", ["every key has a value", "'stdlib'"]),
        ("train.steps=None", ["every key has a value"]),
        ("model=3", ["model = '3'", "group of keys", "model.family"]),
        ("model.rope.base.x=3", ["model.rope.base is one value"]),
        ("data.mixture=3", ["data.mixture.NAME.path"]),
        ("data.mixture.a b.path=x", ["letters, digits"]),
        ("model.family=decodr", ["no such model family", "decoder"]),
        ("train.steps", ["lacks its key or value", "train.steps=VALUE"]),
        ("=3", ["lacks its key or value", "KEY=VALUE"]),
        ("norms.x=3", ["norms.x = '3'", "no such key"]),
    ],
)
def test_bad_override_is_refused_in_words(override, words):
    message = refusal(override)
    for word in words:
        assert word in message


def test_mixture_entries_are_added_and_changed_by_override():
    cfg = load("", ["data.mixture.wiki.path=w", "data.mixture.code.path=c", "data.mixture.wiki.weight=2"])
    assert cfg.data.mixture == {"wiki": SourceConfig("w", weight=2.0), "code": SourceConfig("c")}


# ------------------------------------------------------------------------------------------- values in files


@pytest.mark.parametrize(
    "nested, words",
    [
        ({"train": {"steps": True}}, ["train.steps = True", "whole number"]),
        ({"train": {"steps": "10"}}, ["train.steps = '10'", "whole number"]),
        ({"train": {"steps": 1.5}}, ["whole number", "1 or 2"]),
        ({"train": {"steps": math.nan}}, ["whole number"]),
        ({"train": {"steps": math.inf}}, ["64 bits"]),
        ({"train": {"steps": 10**400}}, ["64 bits"]),
        ({"optim": {"learning_rate": "3e-4"}}, ["number is needed"]),
        ({"optim": {"learning_rate": True}}, ["number is needed"]),
        ({"optim": {"learning_rate": math.nan}}, ["NaN"]),
        ({"optim": {"learning_rate": None}}, ["every key has a value"]),
        ({"data": {"shuffle": 1}}, ["yes or no"]),
        ({"data": {"path": 3}}, ["text is needed"]),
        ({"optim": {"freeze": "a"}}, ["list of texts", "['a']"]),
        ({"optim": {"freeze": ["a", 3]}}, ["optim.freeze[1] = 3"]),
        ({"model": 3}, ["group of keys"]),
        ({"train": {"steps": {"x": 1}}}, ["train.steps is one value"]),
        ({"data": {"mixture": {"a": {"wieght": 1}}}}, ["data.mixture.a.wieght"]),
        ({"data": {"mixture": {"a": 1}}}, ["data.mixture.a = 1"]),
        ({3: 4}, ["3 = 4"]),
    ],
)
def test_bad_value_in_a_file_is_refused(nested, words):
    with pytest.raises(ConfigError) as caught:
        from_dict(nested)
    for word in words:
        assert word in str(caught.value)


def test_numbers_keep_the_declared_type():
    cfg = from_dict({"train": {"steps": 1e3, "epochs": 2}})
    assert (cfg.train.steps, type(cfg.train.steps)) == (1000, int)
    assert (cfg.train.epochs, type(cfg.train.epochs)) == (2.0, float)


def another(value, field):
    """A valid value that differs from `value`."""
    choices = field.metadata.get("choices")
    if choices:
        return choices[-1]
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 2 if value * 2 <= field.metadata["high"] and value else value / 2 or 0.5
        case str():
            return value + "x"
    return [*value, "y"]


@pytest.mark.parametrize("key", all_keys())
def test_every_key_can_be_overridden_and_nothing_else_changes(key):
    base = load("", ["data.mixture.NAME.weight=1"])
    *groups, leaf = key.split(".")
    owner = base
    for name in groups:
        owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    field = {field.name: field for field in dataclasses.fields(owner)}[leaf]
    value = another(getattr(owner, leaf), field)
    if key == "model.family":
        return  # has one choice
    changed = differences(load("", ["data.mixture.NAME.weight=1", f"{key}={value}"]), base)
    assert [(key, value) for key, value, _ in changed] == [(key, value)]


# Off by default: a run that leaves one off meets its switch alone.
PARTS = ("model.moe.", "model.latent.", "model.lora.", "data.masking.", "data.columns.", "data.mixture.NAME.")
# Of labelled tasks: a run on plain text is refused with one of them.
LABELLED = {"data.buckets", "data.pack_texts", "data.stride", "data.answer_length", "train.temperature",
            "train.discriminator_weight"}  # fmt: skip
# A mixture's sources replace the one source's keys, so no run reaches both.
SOURCE = {"data.path", "data.format", "data.validation_path", "data.text_key", "data.separator"}


def test_fewer_than_150_keys():
    """In a run of a decoder on text: `all_keys` are those of the default family."""
    keys = [key for key in all_keys() if key not in SOURCE | LABELLED and not key.startswith(PARTS)]
    assert len(keys) + len(PARTS) < 150
    for key in LABELLED - {"data.pack_texts"}:
        with pytest.raises(ConfigError, match=key):
            check(load("", ["train.steps=5", f"{key}={7 if key != 'train.temperature' else 0.5}"]))


# ------------------------------------------------------------------------------------------------- and back


def test_saved_config_loads_back_equal(tmp_path):
    cfg = load("", ["train.steps=5", "optim.freeze=a,b", "data.mixture.a.path=x", "model.rope.base=5e5"])
    saved = json.dumps(to_dict(cfg), allow_nan=False)
    assert from_dict(json.loads(saved)) == cfg
    (tmp_path / "config.json").write_text(saved)
    assert load(str(tmp_path / "config.json")) == cfg


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[1]", "JSON object"), ('{"x": 1}', "no such key")])
def test_broken_saved_config_is_refused(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    message = refusal(spec=str(path))
    assert str(path) in message and words in message


def test_differences_name_key_and_both_values():
    a = load("", ["train.steps=1", "optim.freeze=x"])
    b = load("", ["train.steps=2", "data.mixture.m.weight=3"])
    assert differences(a, a) == []
    assert ("train.steps", 1, 2) in differences(a, b)
    assert ("optim.freeze", ["x"], []) in differences(a, b)
    assert ("data.mixture.m.weight", None, 3.0) in differences(a, b)


# --------------------------------------------------------------------------------------------- config files


def test_file_holds_what_differs_and_overrides_win(write):
    path = write("""
        def get_config(arg="") -> ml_collections.ConfigDict:
            config = ml_collections.ConfigDict()
            config.train = dict(steps=5)
            config.optim = ml_collections.ConfigDict(dict(learning_rate=1, freeze=["a"]))
            config.name = arg or "unnamed"
            return config
        """)
    cfg = load(f"{path}:mine", ["train.steps=6"])
    expected = Config()
    expected = dataclasses.replace(
        expected,
        name="mine",
        train=dataclasses.replace(expected.train, steps=6),
        optim=dataclasses.replace(expected.optim, learning_rate=1.0, freeze=("a",)),
    )
    assert cfg == expected
    assert load(path).name == "unnamed"


def test_references_are_resolved(write):
    path = write("""
        def get_config():
            config = ml_collections.ConfigDict()
            config.train = dict(steps=8)
            config.checkpoint = dict(every=config.train.get_ref("steps"))
            return config
        """)
    assert load(path).checkpoint.every == 8


@pytest.mark.parametrize(
    "body, words",
    [
        ("def get_config(:\n  pass", ["x.py, line 2", "not valid Python"]),
        ("a = 1", ["no function get_config()"]),
        ("def get_config():\n  raise KeyError('boom')", ["x.py, line 3", "KeyError", "boom"]),
        ("raise SystemExit(3)", ["x.py, line 2", "SystemExit"]),
        ("import no_such_module\n", ["x.py, line 2", "no_such_module"]),
        ("def get_config():\n  return 3", ["returned int", "ConfigDict"]),
        ("def get_config():\n  return {'train': {'stps': 3}}", ["x.py: train.stps = 3", "train.steps"]),
        (
            "def get_config():\n  c = ml_collections.ConfigDict()\n"
            "  c.x = ml_collections.config_dict.required_placeholder(int)\n  return c",
            ["x.py"],
        ),
        (
            "def get_config():\n  c = ml_collections.ConfigDict()\n"
            "  c.seed = ml_collections.config_dict.placeholder(int)\n  return c",
            ["seed = None", "every key has a value"],
        ),
    ],
)
def test_broken_file_is_one_sentence_with_file_and_line(write, body, words):
    message = refusal(spec=write(body))
    for word in words:
        assert word in message


def test_argument_for_a_config_without_one_is_refused(write):
    path = write("def get_config():\n  return ml_collections.ConfigDict()")
    assert "takes no argument" in refusal(spec=f"{path}:big")


def test_configs_import_each_other_and_the_shipped_ones(write):
    import sys

    ours = lambda: {name for name in sys.modules if name.partition(".")[0] == "configs"}  # noqa: E731
    before = ours()  # of other tests, which import configs as a package
    write("base = dict(steps=9)", "configs/parts/shared.py")
    path = write(
        """
        from configs.parts.shared import base
        from configs.quickstart import get_config as shipped

        def get_config():
            config = shipped()
            config.train.update(base)
            return config
        """,
        "configs/mine.py",
    )
    cfg = load(path)
    assert (cfg.name, cfg.train.steps) == ("quickstart", 9)
    assert ours() == before


# -------------------------------------------------------------------------------------------- finding files


def test_every_shipped_config_loads_by_name_and_by_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in config_names()
    for name in config_names():
        assert load(name) == load(f"configs/{name}.py") == load(find_config(name))


def test_a_file_of_the_current_folder_comes_first(monkeypatch, tmp_path, write):
    monkeypatch.chdir(tmp_path)
    mine = write("def get_config():\n  return ml_collections.ConfigDict(dict(seed=7))", "configs/quickstart.py")
    assert find_config("configs/quickstart.py") == mine
    assert load("configs/quickstart.py").seed == 7
    assert find_config("quickstart") != mine


def test_unknown_config_names_the_nearest():
    assert "did you mean quickstart?" in refusal(spec="quikstart")
    assert "the shipped configs are" in refusal(spec="zzzzzz")
    assert "no file" in refusal(spec="/no/such/file.py")


def test_file_that_is_no_config_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1")
    assert "end in .py" in refusal(spec=str(path))


def test_get_config_may_return_a_plain_or_frozen_dictionary(write):
    frozen = write("def get_config():\n  return ml_collections.FrozenConfigDict(dict(seed=3))")
    assert load(frozen).seed == 3
    assert isinstance(ml_collections.FrozenConfigDict(), ml_collections.ConfigDict)
