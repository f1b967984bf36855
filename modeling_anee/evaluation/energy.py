"""Joules of a stretch of work where the machine can tell, and why not where it can't. Nothing is estimated.

CPUs: the RAPL counters that Linux shows as files. They are read here and not by a library, because those that are kept up
either guess where there is no counter (codecarbon) or count nested domains twice and bring scikit-learn along (zeus).
NVIDIA GPUs: the energy counter of NVML, by NVIDIA's own `nvidia-ml-py` (the extra `energy`).

Counters belong to a whole CPU package or GPU: what else runs there is counted too. A GPU's counter moves on every 20 to
100 ms, so work that is much shorter than a second is not resolved.
"""

import importlib
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


POWERCAP = Path("/sys/class/powercap")
# RAPL counters start at 0 again after some minutes at full load; two readings show one such turn at most.
READ_EVERY = 20.0  # seconds


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


class EnergyMeter:
    """Counts the joules of devices while it is entered.

    Args:
        devices: what the work runs on. If one of them has no counter that can be read, nothing is counted; the CPU's
            packages are counted beside GPUs where they can be read.
        powercap: folder of the RAPL counters.

    Attributes:
        sources: what is counted.
        reason: why nothing is counted; empty if something is.
        left_out: why the CPU is not counted beside a GPU; empty if it is.
    """

    def __init__(self, devices: Collection[torch.device] = (torch.device("cpu"),), powercap: Path = POWERCAP) -> None:
        counters, problems, self.left_out = _find_counters(devices, powercap)
        self.reason = "; ".join(problems) or ("" if counters else "no device to count for")
        self._counters = [] if problems else counters
        self.sources = tuple(counter.name for counter in self._counters)
        self._values: list[int] = []
        self._total = 0.0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "EnergyMeter":
        """Count from now on, from 0."""
        self._total, self._values = 0.0, []
        self._update()
        if self._values and any(counter.wraps_at is not None for counter in self._counters):
            self._stop.clear()
            self._thread = threading.Thread(target=self._keep_reading, name="energy meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop counting; what was counted stays."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self._update()
        self._values = []

    @property
    def joules(self) -> float | None:
        """Joules since it was entered, or between entering and leaving; None where the machine can't tell."""
        if self._values:
            self._update()
        return None if self.reason else self._total

    @property
    def counted(self) -> str:
        """What is counted, and what is not; empty if nothing is."""
        if self.reason:
            return ""
        left_out = f"; without the CPU: {self.left_out}" if self.left_out else ""
        return f"{', '.join(self.sources)}, whatever else ran there included{left_out}"

    def describe(self, tokens: int) -> str:
        """One line: joules per token and what was counted, or why nothing was."""
        joules = self.joules
        if joules is None:
            return f"energy not known: {self.reason}"
        return f"{joules / max(tokens, 1):.3g} J per new token ({self.counted})"

    def _update(self) -> None:
        """Read the counters and add what they have grown by; one that fails in between ends the counting."""
        with self._lock:
            if self.reason:
                return
            try:
                values = [counter.read() for counter in self._counters]
                if self._values:
                    steps = zip(self._counters, self._values, values, strict=True)
                    self._total += sum(counter.joules(before, after) for counter, before, after in steps)
                self._values = values
            except OSError as error:
                self.reason, self._values = str(error), []

    def _keep_reading(self) -> None:
        while not self._stop.wait(READ_EVERY):
            self._update()


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


def _find_counters(devices: Collection[torch.device], powercap: Path) -> tuple[list[Counter], list[str], str]:
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
