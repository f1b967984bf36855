"""Counters of energy that a machine has: of CPUs, the RAPL counters that Linux shows as files; of NVIDIA GPUs, NVML's.

RAPL is read here and not by a library, because those that are kept up either guess where there is no counter (codecarbon) or
count nested domains twice and bring scikit-learn along (zeus). NVML is read by NVIDIA's own `nvidia-ml-py`, the extra `energy`.

Counters belong to a whole CPU package or GPU: what else runs there is counted too. A GPU's counter moves on every 20 to
100 ms, so work that is much shorter than a second is not resolved.
"""

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One counter of energy.

    Args:
        name: what it counts for.
        read: its value now; raises OSError.
        unit: joules of one step.
        wraps_at: the value after which it starts at 0 again; None for never.
    """

    name: str
    read: Callable[[], int]
    unit: float
    wraps_at: int | None = None

    def joules(self, before: int, after: int) -> float:
        """Joules between two readings, with at most one turn between them.

        Raises:
            OSError: it went backwards, which a reset of the device does.
        """
        grown = after - before
        if grown < 0 and self.wraps_at is not None:
            grown += self.wraps_at
        if grown < 0:
            raise OSError(f"the energy counter of {self.name} was reset")
        return grown * self.unit


def joules_between(counters: Sequence[Counter], before: Sequence[int], after: Sequence[int]) -> float:
    """Joules of all counters between two readings of each.

    Raises:
        OSError: one went backwards.
    """
    return sum(counter.joules(old, new) for counter, old, new in zip(counters, before, after, strict=True))


def devices_of(model: nn.Module) -> set[torch.device]:
    """The devices that hold a model's parameters."""
    return {p.device for p in model.parameters() if p.device.type != "meta"}


def rapl_counters(powercap: Path = POWERCAP) -> list[Counter]:
    """Counters of every CPU package and of the memory at it.

    The domains `core` and `uncore` are parts of a package, `psys` and those of `intel-rapl-mmio` count it again.

    Raises:
        OSError: there are none, or they can't be read.
    """
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = _read(zone / "name")
        if name.startswith("package") or name == "dram":
            label = f"CPU {name}" if name != "dram" else f"memory of CPU {zone.name.split(':')[1]}"
            counter = Counter(label, _reader(zone / "energy_uj"), 1e-6, _number(zone / "max_energy_range_uj"))
            counter.read()  # fails now rather than later
            counters.append(counter)
    if not counters:
        raise OSError(f"no RAPL counters in {powercap}")
    return counters


def gpu_counter(device: torch.device) -> Counter:
    """The counter of an NVIDIA GPU.

    Raises:
        OSError: NVML is not there, or this GPU has none (those before Volta, and MIG parts).
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError as error:
        raise OSError("NVML needs nvidia-ml-py: pip install 'modeling-anee[energy]'") from error
    try:
        nvml.nvmlInit()  # counted by NVML; the end of the process closes it
        handle = nvml.nvmlDeviceGetHandleByUUID(_uuid(device))
        name = f"GPU {device.index or 0} {nvml.nvmlDeviceGetName(handle)}"
    except nvml.NVMLError as error:
        raise OSError(f"NVML can't be used for {device}: {error}") from error

    def read() -> int:
        try:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except nvml.NVMLError as error:
            raise OSError(f"{name} does not tell its energy: {error}") from error

    read()
    return Counter(name, read, 1e-3)


def find_counters(devices: Collection[torch.device], powercap: Path = POWERCAP) -> tuple[list[Counter], list[str], str]:
    """Counters of devices, why those that are missing are, and why the CPU is not counted where it needn't be."""
    counters: dict[str, Counter] = {}
    problems: list[str] = []
    wanted = {device.type for device in devices}
    left_out = ""
    try:
        counters |= {counter.name: counter for counter in rapl_counters(powercap)}
    except OSError as error:
        if "cpu" in wanted:
            problems.append(str(error))
        else:
            left_out = str(error)
    for device in sorted(devices, key=str):
        try:
            if device.type == "cuda":
                counter = gpu_counter(device)
                counters[counter.name] = counter
            elif device.type != "cpu":
                problems.append(f"no energy counter is known for {device}")
        except OSError as error:
            problems.append(str(error))
    return list(counters.values()), problems, left_out


def _uuid(device: torch.device) -> str:
    """How NVML calls a GPU; its numbers are not torch's where CUDA_VISIBLE_DEVICES is set."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _reader(file: Path) -> Callable[[], int]:
    return lambda: _number(file)


def _number(file: Path) -> int:
    text = _read(file)
    if not text.isdigit():
        raise OSError(f"{file} is not a number: {text!r}")
    return int(text)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except PermissionError as error:
        raise OSError(f"{file} may not be read by this user; an administrator can allow it") from error
