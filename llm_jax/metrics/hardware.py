"""What the machine can do and holds: peak FLOP/s of a device, and memory in use."""

import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

PEAK_FLOPS = {  # jax's device_kind: dense bfloat16 FLOP/s of a chip, and devices a chip (makers' data sheets)
    "TPU v4": (275e12, 2),
    "TPU v5 lite": (197e12, 1),
    "TPU v5e": (197e12, 1),
    "TPU v5p": (459e12, 1),
    "TPU v5": (459e12, 1),
    "TPU v6 lite": (918e12, 1),
    "TPU v6e": (918e12, 1),
    "TPU7x": (2307e12, 2),
    "NVIDIA A100": (312e12, 1),
    "NVIDIA H100 80GB HBM3": (989e12, 1),  # SXM; the PCIe and NVL cards are slower and not in this table
    "NVIDIA H200 NVL": (836e12, 1),
    "NVIDIA H200": (989e12, 1),
    "NVIDIA B200": (2250e12, 1),
    "NVIDIA B300": (2250e12, 1),
}


def peak_flops(device_kind: str, devices_a_chip: int | None = None) -> float | None:
    """Dense bfloat16 FLOP/s of one device as JAX counts devices, or None for a kind that is not known (or a CPU).

    Args:
      device_kind: `jax.Device.device_kind`.
      devices_a_chip: as `devices_a_chip` finds them; by default as the table says.
    """
    for kind, (flops, devices) in PEAK_FLOPS.items():
        card_of = kind.startswith("NVIDIA") and device_kind.startswith((kind + " ", kind + "-"))  # with its form factor
        if device_kind == kind or card_of:
            return flops / (devices_a_chip or devices)
    return None


def devices_a_chip(devices: Iterable[jax.Device]) -> int | None:
    """How many of these devices share a chip (TPU v4 shows one or two, by its mode); None where they do not say."""
    coordinates = [getattr(device, "coords", None) for device in devices]
    if not coordinates or None in coordinates:
        return None
    return len(coordinates) // len({tuple(c) for c in coordinates})


def memory_stats(devices: Sequence[jax.Device] | None = None) -> dict[str, int]:
    """Bytes in use: the fullest local device's, now and at most, or this process's where devices do not say (CPU).

    Returns:
      {"device_bytes_in_use", "device_bytes_peak"}, or {"process_bytes_in_use", "process_bytes_peak"} (resident set;
      the first is left out where the system does not tell).
    """
    stats = [s for device in devices or jax.local_devices() if (s := device.memory_stats())]
    if stats:
        most = {name: max(s.get(name, 0) for s in stats) for name in ("bytes_in_use", "peak_bytes_in_use")}
        return {"device_bytes_in_use": most["bytes_in_use"], "device_bytes_peak": most["peak_bytes_in_use"]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else None
    return ({} if now is None else {"process_bytes_in_use": now}) | {"process_bytes_peak": peak}
