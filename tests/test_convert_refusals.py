"""What cannot be converted is refused by name, and nothing is left behind."""

import json
import os
import sys

import hub_models
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects

from llm_jax.config import from_dict, to_dict
from llm_jax.convert import families, hub, reference, safetensors
from llm_jax.convert.family import function_of
from llm_jax.errors import ConfigError, DataError, UserError
from llm_jax.training import convert, mapping


def refused(tmp_path, message, source=None, **options):
    """The error, with nothing left beside the source."""
    with pytest.raises(UserError, match=message) as error:
        convert.from_hub(str(source or tmp_path / "source"), str(tmp_path / "run"), check=False, **options)
    assert [name for name in os.listdir(tmp_path) if "run" in name] == []
    return str(error.value)


# ---------------------------------------------------------------------------------------------- config.json

LLAMA, MISTRAL, QWEN2, MOE, MIXTRAL, PHI3, GPT2 = (
    "LLaMA 2", "Mistral with a window", "Qwen 2, tied", "Qwen 3 MoE", "Mixtral", "Phi-3", "GPT-2",
)  # fmt: skip
SMOLLM3, OLMO2, GEMMA, GEMMA2, GEMMA3, PYTHIA = "SmolLM3", "OLMo 2", "Gemma", "Gemma 2", "Gemma 3", "Pythia"
V2, V3, OSS = "DeepSeek-V2 Lite", "DeepSeek-V3", "GPT-OSS"
VALUES = [
    (LLAMA, {"rope_scale_factor": 2}, "rope_scale_factor = 2: this key is not known"),
    (LLAMA, {"hidden_act": "relu2"}, "hidden_act = 'relu2': our model can say silu"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias = True: attention_bias is False, and our model has no biases of MLPs alone"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5: whole heads rotate"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config = .* only None can be converted"),
    (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder = True: only False"),
    (LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = .*dynamic"),
    (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters = .*'factor' is missing, and linear needs"),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "beta": 1}}, "rope_parameters = .*beta has no meaning"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "the same rotary positions in every"),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}},
        "attention_factor = 0.0: it scales sine and cosine, and is above 0",
    ),
    (LLAMA, {"num_attention_heads": 5}, "describes a model that cannot be built: model.num_kv_heads = 4"),
    (LLAMA, {"hidden_size": "wide"}, "describes a model that cannot be built: model.embed_dim = 'wide'"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*can be converted"),
    (LLAMA, {"architectures": ["A", "B"]}, "does not name one architecture"),
    (
        MISTRAL,
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = .*MinistralForCausalLM reads it",
    ),
    (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "some layers have a window, and no other key"),
    (QWEN2, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types = 'chunked_attention': our layers"),
    (QWEN2, {"layer_types": ["full_attention"]}, "layer_types = .*it names the kind of each of the 2 layers"),
    (MOE, {"layer_types": ["full_attention", "sliding_attention"]}, "has full_attention in every layer"),
    (
        MOE,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "max_window_layers = 1: the window is that of every",
    ),
    (MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2: our model has experts in every layer"),
    (
        MOE,
        {"mlp_only_layers": [1]},
        r"mlp_only_layers = \[1\]: our model can have MLPs in place of experts in the first",
    ),
    (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    (
        PHI3,
        {"rope_parameters": None, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        "longrope.*longest row",
    ),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    (GPT2, {"activation_function": "silu"}, "activation_function = 'silu': our model can say gelu_new"),
    (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers = .*it has a number for each of the 3 layers"),
    (
        SMOLLM3,
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": None},
        "no_rope_layers = .*layer 1 has a window, and ours with one have positions",
    ),
    (OLMO2, {"clip_qkv": 8.0}, "clip_qkv = 8.0: this key is not known"),
    (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: our decoder is causal"),
    (GEMMA, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu': only some readers follow it"),
    (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu': our model can say"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: transformers' own Gemma 3 does not cap"),
    (GEMMA3, {"rope_parameters": {"rope_type": "default"}}, "rope_parameters = .*it holds a group for full_attention"),
    (
        GEMMA3,
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters = .*layers with a window rotate unscaled",
    ),
    (PYTHIA, {"attention_bias": False}, "attention_bias = False: our model has no biases of MLPs and norms alone"),
    (PYTHIA, {"hidden_act": "gelu_fast"}, "hidden_act = 'gelu_fast': our model can say"),
    (PYTHIA, {"architectures": ["GPTNeoXForTokenClassification"]}, "GPTNeoXForTokenClassification.*can be converted"),
    (V2, {"norm_topk_prob": True}, "norm_topk_prob = True: transformers' own V2 does not read it"),
    (V2, {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc': our model can say greedy, group_limited_greedy"),
    (V2, {"moe_layer_freq": 2}, "moe_layer_freq = 2: our model has experts in every layer after"),
    (V2, {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05: the norms of the latents have 1e-6 there"),
    (V2, {"num_key_value_heads": 1}, "num_key_value_heads = 1: latent attention has as many as queries"),
    (V2, {"attention_bias": True}, "attention_bias = True: our latent attention has no biases"),
    (V2, {"n_shared_experts": 0}, "n_shared_experts = 0: transformers' own model always has some"),
    (V2, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .* only None can be converted"),
    (V2, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "with yarn alone"),
    (V3, {"rope_interleave": False}, "rope_interleave = False: we write and read rotary pairs as neighbours"),
    (V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax': transformers' own V3 scores by sigmoid"),
    (V3, {"n_group": 4}, "describes a model that cannot be built: model.moe.groups = 4"),
    (V3, {"quantization_config": {"quant_method": "awq"}}, "weights are read as they are, or as fp8"),
    (OSS, {"swiglu_limit": 5.0}, "swiglu_limit = 5.0: our clamped SwiGLU ends at 7"),
    (OSS, {"attention_bias": False}, "attention_bias = False: our model has biases in all layers or in none"),
]


@pytest.mark.parametrize("name, changes, message", VALUES, ids=lambda value: str(value)[:40])
def test_a_value_that_the_model_cannot_say(name, changes, message):
    config = hub_models.stored(name)[0] | changes
    with pytest.raises(ConfigError, match=message) as error:
        families.of_config(config, "x/config.json").config(config, "x/config.json")
    assert "x/config.json" in str(error.value)


def test_a_missing_key_is_named():
    config = hub_models.stored(LLAMA)[0]
    del config["hidden_size"]
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        families.of_config(config, "here").config(config, "here")


def test_older_spellings_mean_the_same():
    config = hub_models.stored("LLaMA 3.1, tied")[0]
    family = families.of_config(config, "here")
    older = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    scaling = dict(config["rope_parameters"])
    older |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    assert family.config(older, "here") == family.config(config, "here")
    del config["architectures"]
    assert families.of_config(config, "here") is family  # by its model_type


def test_every_family_reads_back_what_it_writes():
    for name in hub_models.CASES:
        config = hub_models.stored(name)[0]
        family = families.of_config(config, "here")
        cfg = family.config(config, "here")
        assert from_dict({"model": to_dict(from_dict({}))["model"]})  # the schema itself round-trips
        again = family.config(family.hf_config(cfg), "here")
        assert function_of(again) == function_of(cfg)
        assert again.rope == cfg.rope and again.moe == cfg.moe and again.sliding_window == cfg.sliding_window
        assert again.dropout == cfg.dropout or name.startswith("Phi")


# ------------------------------------------------------------------------------------------------- tensors


def without(name):
    return lambda arrays: arrays.pop(name)


def another(name, array):
    return lambda arrays: arrays.update({name: array})


def with_nan(arrays):
    arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf


TENSORS = [
    (without("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing, and Llama"),
    (another("model.extra.weight", np.zeros(3, np.float32)), "model.extra.weight is left over: no rule of LlamaFor"),
    (
        another("model.norm.weight", np.zeros(31, np.float32)),
        r"model.safetensors: the tensor model.norm.weight has the shape \[31\] and config.json makes it \[32\]",
    ),
    (with_nan, "model.layers.1.mlp.up_proj.weight in .*model.safetensors holds numbers that are not finite"),
]


@pytest.mark.parametrize("change, message", TENSORS, ids=["missing", "left over", "shape", "not finite"])
def test_tensors_that_do_not_fit(change, message, tmp_path):
    config, arrays = hub_models.stored(LLAMA)
    change(arrays)
    hub_models.write(tmp_path / "source", config, arrays)
    refused(tmp_path, message)


def test_quantised_numbers(tmp_path):
    config, arrays = hub_models.stored(LLAMA)
    arrays = {name: array.astype(np.int8) for name, array in arrays.items()}
    hub_models.write(tmp_path / "source", config, {})
    planned = [hub_models.Planned(name, array.dtype, array.shape) for name, array in arrays.items()]
    hub_models.safetensors.write_folder(tmp_path / "source", planned, lambda t: arrays[t.name], largest=1 << 30)
    refused(tmp_path, "is int8; weights are read as .*dequantised first")


def test_a_shard_that_is_cut_is_named(tmp_path):
    hub_models.checkpoint(tmp_path / "source", LLAMA, largest=20_000)
    path = sorted((tmp_path / "source").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused(tmp_path, "is cut off")


# ------------------------------------------------------------------------------------------ what is asked for


def test_folders_that_are_no_checkpoint(tmp_path):
    refused(tmp_path, "there is no such folder")
    (tmp_path / "source").mkdir()
    refused(tmp_path, "config.json is missing")
    (tmp_path / "source" / "config.json").write_text("[]")
    refused(tmp_path, "it holds no JSON object")
    (tmp_path / "source" / "config.json").write_text("{")
    refused(tmp_path, "is damaged or cannot be read")


def test_nothing_is_overwritten(tmp_path):
    hub_models.checkpoint(tmp_path / "source", LLAMA)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="it exists already"):
        convert.from_hub(str(tmp_path / "source"), str(tmp_path / "there"))


def test_an_override_that_would_make_it_another_model(tmp_path):
    hub_models.checkpoint(tmp_path / "source", LLAMA)
    refused(tmp_path, "model.norm_eps = 0.1: the checkpoint was made with 1e-06", overrides=["model.norm_eps=0.1"])
    refused(tmp_path, "model.num_layer", overrides=["model.num_layer=3"])
    refused(tmp_path, "--dtype=float16: parameters are kept in", dtype="float16")


def test_a_crash_leaves_no_half_run(tmp_path, monkeypatch):
    hub_models.checkpoint(tmp_path / "source", LLAMA)
    monkeypatch.setattr(convert.hub_files, "describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.from_hub(str(tmp_path / "source"), str(tmp_path / "run"))
    assert os.listdir(tmp_path) == ["source"]


def test_two_conversions_and_a_folder_of_the_user_do_not_meet(tmp_path):
    to, kept = tmp_path / "run", tmp_path / "run.partial"
    kept.mkdir()
    (kept / "mine").write_text("kept")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="it exists already"), convert.new_folder(str(to)) as first:
        (first / "a").write_text("of the first")
        with convert.new_folder(str(to)) as second:
            (second / "a").write_text("of the second")
        assert (first / "a").read_text() == "of the first"
    assert (to / "a").read_text() == "of the second" and (kept / "mine").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["plain", "run", "run.partial"]
    assert to.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("taken", [lambda to: to.mkdir(), lambda to: to.write_text("a file"),
                                   lambda to: to.symlink_to("nowhere")], ids=["folder", "file", "link"])  # fmt: skip
def test_a_name_that_is_taken_meanwhile_stays(taken, tmp_path):
    to = tmp_path / "run"
    with pytest.raises(UserError, match="it exists already"), convert.new_folder(str(to)) as folder:
        (folder / "a").write_text("")
        taken(to)
    assert os.listdir(tmp_path) == ["run"] and not (to / "a").exists()


# ------------------------------------------------------------------------------------------------- the hub


class FakeHub:
    """Stands in for huggingface_hub: a repository's files go to a cache as they are asked for, or it fails."""

    def __init__(self, cache=None, files=(), error=None, offline=False):
        self.cache, self.error, self.calls, self.offline = cache, error, [], offline
        self.files = files if isinstance(files, dict) else dict.fromkeys(files, "")

    def snapshot_download(self, name, *, revision, allow_patterns):
        self.calls.append((name, revision))
        if self.error:
            raise self.error
        folder = self.cache / "0123abc"
        folder.mkdir(exist_ok=True)
        for file in () if self.offline else filter_repo_objects(list(self.files), allow_patterns=allow_patterns):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(self.files[file])
        return str(folder)

    def list_repo_files(self, name, *, revision):
        if self.offline:
            raise OSError("offline")
        assert revision == "0123abc"
        return list(self.files)

    def fetched(self):
        files = (path for path in self.cache.rglob("*") if path.is_file())
        return {path.relative_to(self.cache / "0123abc").as_posix() for path in files}


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    def of(*files, **options):
        fake = FakeHub(tmp_path, *files, **options)
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        return fake

    return of


BESIDE = {"config.json": "{}", "1_Pooling/config.json": "{}"}
MORE = ("consolidated.safetensors", "original/model.safetensors", "original/consolidated.safetensors",
        "pytorch_model.bin", "modeling.py", "onnx/config.json")  # fmt: skip


def test_one_file_is_fetched_and_nothing_that_is_not_read(fake_hub, tmp_path):
    fake = fake_hub(BESIDE | dict.fromkeys(MORE, "") | {"model.safetensors": "", reference.STORED: ""})
    assert hub.folder_of("owner/name", None, weights=False) == tmp_path / "0123abc"
    assert fake.fetched() == BESIDE.keys()
    assert hub.folder_of("owner/name", None) == tmp_path / "0123abc"
    assert fake.fetched() == BESIDE.keys() | {"model.safetensors", reference.STORED}


def test_shards_are_those_that_the_index_names_of_one_commit(fake_hub):
    where = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors", "c": "model-1-of-2.safetensors"}
    index = {safetensors.INDEX: json.dumps({"weight_map": where})}
    shards = dict.fromkeys([*where.values(), "model.safetensors", "model-1-of-3.safetensors"], "")
    fake = fake_hub(BESIDE | dict.fromkeys(MORE, "") | index | shards)
    hub.folder_of("owner/name", "v1")
    assert fake.fetched() == BESIDE.keys() | index.keys() | set(where.values())
    assert fake.calls == [("owner/name", "v1"), ("owner/name", "0123abc")]  # a branch may move meanwhile


@pytest.mark.parametrize(
    "files, message",
    [
        (["pytorch_model-2-of-2.bin", "pytorch_model-1-of-2.bin", "original/model.safetensors"],
         "hf:owner/name holds pytorch_model-1-of-2.bin alone, a pickle: .*runs whatever code.*save_pretrained"),
        (["consolidated.safetensors"], "hf:owner/name holds consolidated.safetensors, and neither model.safetensors"),
        (["model.gguf"], "hf:owner/name holds no model.safetensors and no"),
    ],
)  # fmt: skip
def test_a_repository_without_weights_that_are_read(files, message, fake_hub):
    fake_hub(BESIDE | dict.fromkeys(files, ""))
    with pytest.raises(DataError, match=message):
        hub.folder_of("owner/name", None)


def test_offline_what_is_in_the_cache_is_taken(fake_hub):
    files = BESIDE | {"model.safetensors": ""}
    fake_hub(files)
    hub.folder_of("owner/name", None, weights=False)
    offline = fake_hub(files, offline=True)
    with pytest.raises(DataError, match="hf:owner/name, as far as it is here, holds no model.safetensors"):
        hub.folder_of("owner/name", None)
    fake_hub(files)
    hub.folder_of("owner/name", None)
    fake_hub(files, offline=True)
    assert (hub.folder_of("owner/name", None) / "model.safetensors").is_file()
    assert offline.fetched() == files.keys()


def test_an_adapter_is_fetched_without_a_models_weights(fake_hub):
    files = dict.fromkeys(["adapter_config.json", "adapter_model.safetensors"], "")
    fake = fake_hub(files | {"model.safetensors": "", "checkpoint-1/adapter_model.safetensors": ""})
    convert.adapter_folder("owner/name")
    assert fake.fetched() == files.keys()


def test_the_dtype_of_a_name_is_read_as_either_transformers_writes_it(fake_hub):
    config = {key: value for key, value in hub_models.stored(LLAMA)[0].items() if key not in ("dtype", "torch_dtype")}
    for stated, expected in (({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "bfloat16"}, "bfloat16"),
                             ({"dtype": "float16"}, "float32"), ({}, "float32")):  # fmt: skip
        fake_hub({"config.json": json.dumps(config | stated), "model.safetensors": ""})
        lines = mapping.mapping("owner/name").splitlines()
        assert all(line.split()[3] == expected for line in lines[1:])


def test_what_the_hub_does_not_give_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(error=OSError("we are\noffline")))
    with pytest.raises(UserError, match=r"hf:owner/name: .*\(OSError: we are offline\).*HF_HUB_OFFLINE"):
        hub.folder_of("owner/name", None)


def test_paths_are_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(error=AssertionError()))
    assert hub.folder_of(str(tmp_path), None) == tmp_path
    assert hub.folder_of("./owner/name", None).name == "name"
    with pytest.raises(UserError, match="--revision=main is for names on the hub"):
        hub.folder_of(str(tmp_path), "main")


@pytest.mark.parametrize("folder_of", [lambda name: hub.folder_of(name, None), convert.adapter_folder])
def test_a_name_may_say_its_revision(fake_hub, tmp_path, folder_of):
    fake = fake_hub(BESIDE | {"model.safetensors": ""})
    assert folder_of("owner/name@v1/b") == tmp_path / "0123abc"
    assert fake.calls[0] == ("owner/name", "v1/b")


def test_revisions_are_of_names_and_said_once(fake_hub, tmp_path, monkeypatch):
    fake_hub(BESIDE | {"model.safetensors": ""})
    with pytest.raises(UserError, match="--revision=v2: owner/name@v1 names a revision too"):
        hub.folder_of("owner/name@v1", "v2")
    (tmp_path / "a@b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.folder_of("a@b", None) == tmp_path / "a@b"  # a path that is there
    assert hub.split("owner/name@v1") == ("owner/name", "v1") and hub.split("a@b") == ("a@b", None)
