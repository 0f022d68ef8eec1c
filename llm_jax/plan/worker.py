"""A process of its own that compiles one step for a machine that is not there: `python -m llm_jax.plan.worker FOLDER`.

It reads FOLDER/request.json and writes FOLDER/program.txt.gz and FOLDER/result.json. A process, because a compiler
may end the one it is in, and because several can run beside one another.
"""

import gzip
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file lets one process compile at a time
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server what TPU this is
    "TPU_ACCELERATOR_TYPE": "",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def environment(tpu: bool) -> dict[str, str]:
    """For the process that compiles: its own devices are CPUs, whatever the machine has."""
    return {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"} | (TPU_ENVIRONMENT if tpu else {})


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    result = compile_step(request, folder)
    waiting = folder / "result.json.new"
    waiting.write_text(json.dumps(result), encoding="utf-8")
    os.replace(waiting, folder / "result.json")  # last: it says that the rest is there


def compile_step(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    import jax

    from llm_jax import sharding
    from llm_jax.backend import compiler_options
    from llm_jax.config import from_dict
    from llm_jax.plan.hardware import topology
    from llm_jax.training import executable
    from llm_jax.training.lower import batch_shapes, lower_step

    cfg = from_dict(request["config"])
    machine = topology(request["topology"], request["slices"])
    devices = absent_devices(machine)
    layout = sharding.make_layout(cfg.mesh, devices)
    began = time.monotonic()
    lowered = lower_step(cfg, layout)
    lowered_after = time.monotonic() - began
    options = compiler_options(devices[0].platform, devices[0].device_kind) | request["options"]
    result = {
        "places": [place(device) for device in layout.mesh.devices.flat],
        "kind": devices[0].device_kind,
        "jax": jax.__version__,
        "compiler": compiler_version(machine.hardware.tpu),
        "lower_seconds": round(lowered_after, 1),
    }
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {"refused": str(error)[:20_000]}
    text = compiled.as_text()
    with gzip.open(folder / "program.txt.gz", "wt", encoding="utf-8", compresslevel=3) as stream:
        stream.write(text)
    if request["save"]:
        made_from = executable.fingerprint(cfg, devices, batch_shapes(cfg, layout))
        executable.save(Path(request["save"]), compiled, made_from)
    stats = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code", "host_argument", "host_temp")
    return result | {
        "memory": {name: getattr(stats, f"{name}_size_in_bytes") for name in names},
        "compile_seconds": round(time.monotonic() - began, 1),
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def absent_devices(machine: Any) -> list[Any]:
    """The machine's devices, as its compiler knows them."""
    from jax.experimental import topologies

    from llm_jax.plan.hardware import card_description

    if machine.hardware.tpu:
        # Unless it is told of the rings, the compiler takes every dimension for open, and gathers by sums over zeros.
        given = {"wrap": (*machine.wrap, False)[:3]} | ({"num_slices": machine.slices} if machine.slices > 1 else {})
        given |= {"chip_config_name": "megacore"} if machine.hardware.name == "v4" else {}
        return list(topologies.get_topology_desc(machine.name, "tpu", **given).devices)
    nodes, gpus = machine.shape
    name = f"1x{nodes}x{gpus}"
    described = card_description(machine.hardware)
    return list(topologies.get_topology_desc(name, "cuda", topology=name, target_config=described).devices)


def place(device: Any) -> list[int]:
    """Where a device is: slice (or node), coordinates, core on its chip."""
    coordinates = getattr(device, "coords", None)
    if coordinates is None:
        return [device.process_index, device.id]
    return [getattr(device, "slice_index", None) or 0, *coordinates, getattr(device, "core_on_chip", 0)]


def compiler_version(tpu: bool) -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("libtpu",) if tpu else ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "libtpu" if tpu else "the CUDA plugin"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
