"""What the compilers say of ten settings, for the test of the quick estimate: `python make_plan_compiled.py`.

It needs libtpu and the CUDA plugin (those that are there; the other settings keep their figures), and some minutes.
"""

import importlib.util
import json
import os
from pathlib import Path

FILE = Path(__file__).parent / "plan_compiled.json"
SPLASH = "model.attention_kernel=splash"

# Topology, config, overrides.
SETTINGS = {
    "7b v5p full": (
        "v5p:4x4x4",
        "llama2/7b",
        ("mesh.fsdp=64", "data.sequence_length=2048", "train.global_batch_size=256"),
    ),
    "8b v6e full": ("v6e:4x8", "llama3/8b", ("mesh.fsdp=32", "train.global_batch_size=32", "train.accumulation=1")),
    "8x7b v5p full": (
        "v5p:4x4x4",
        "mixtral/8x7b",
        ("mesh.fsdp=64", "train.global_batch_size=128", "train.accumulation=1"),
    ),
    "7b h100 full": ("h100:1x8", "llama2/7b", ("mesh.fsdp=8", "train.global_batch_size=32")),
    "7b h100 dots": ("h100:1x8", "llama2/7b", ("mesh.fsdp=8", "train.global_batch_size=16", "model.remat=dots")),
    "8b h100 names": (
        "h100:1x8",
        "llama3/8b",
        (
            "mesh.fsdp=8",
            "train.global_batch_size=16",
            "model.remat=names",
            "model.remat_save=layer_input,query,key,value",
            "data.mask_documents=False",
        ),
    ),
    "8b h100 two nodes": (
        "h100:2x8",
        "llama3/8b",
        (
            "mesh.data=2",
            "mesh.fsdp=8",
            "mesh.across_slices=data=2",
            "train.global_batch_size=64",
            "train.accumulation=2",
            "data.mask_documents=False",
        ),
    ),
    "70b h100 tensor": (
        "h100:8x8",
        "llama3/70b",
        (
            "mesh.fsdp=16",
            "mesh.tensor=4",
            "mesh.across_slices=fsdp=8",
            "train.global_batch_size=64",
            "train.accumulation=2",
            "mesh.activation_rules=residual_length=sequence+tensor",
            "data.mask_documents=False",
        ),
    ),
    "70b h200 full": (
        "h200:8x8",
        "llama3/70b",
        (
            "mesh.fsdp=64",
            "mesh.across_slices=fsdp=8",
            "train.global_batch_size=128",
            "train.accumulation=1",
            "data.mask_documents=False",
        ),
    ),
    "1b3 a100 none": (
        "a100:1x8",
        "gpt3/1b3",
        ("mesh.fsdp=8", "train.global_batch_size=32", "model.remat=none", "train.accumulation=1"),
    ),
}


def measure(name: str) -> dict:
    from llm_jax.plan.compile import compile_setting
    from llm_jax.plan.estimate import estimate_compiled

    found = estimate_compiled(setting(name), compile_setting(setting(name), waiting=lambda _: None))
    times = vars(found.times) | {"total": found.times.total}
    return {
        "memory": {key: int(value) for key, value in vars(found.memory).items()},
        "times": {key: round(times[key], 5) for key in ("matrix", "kernel", "memory", "waited", "total")},
        "flops": found.times.flops,
    }


def setting(name: str):
    from llm_jax.config import load
    from llm_jax.plan.hardware import topology
    from llm_jax.plan.setting import make_setting

    machine, spec, overrides = SETTINGS[name]
    return make_setting(load(spec, ("mesh.data=1", *overrides)), topology(machine))


def main() -> None:
    there = {
        "tpu": importlib.util.find_spec("libtpu") or "TPU_LIBRARY_PATH" in os.environ,
        "gpu": importlib.util.find_spec("jax_cuda13_plugin"),
    }
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name, (machine, _, _) in SETTINGS.items():
        if there["tpu" if machine.startswith("v") else "gpu"]:
            found[name] = measure(name)
            FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
