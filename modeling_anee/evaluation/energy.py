"""Joules of a stretch of work where the machine can tell, and why not where it can't; or, where asked for, as modelled.

What is read, and how well it resolves, is in `energy_counters.py`; what is modelled in `machines/energy.py`.
"""

import threading
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from ..energy_counters import POWERCAP, find_counters, joules_between


# RAPL counters start at 0 again after some minutes at full load; two readings show one such turn at most.
READ_EVERY = 20.0  # seconds


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
        counters, problems, self.left_out = find_counters(devices, powercap)
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

    def describe(self, tokens: int, modelled: Callable[[], float] | None = None, machine: str = "") -> str:
        """One line: joules per token and what was counted, or why nothing was.

        Args:
            tokens: new ones.
            modelled: tells the joules where no counter does.
            machine: as whose these are modelled.
        """
        joules = self.joules
        if joules is not None:
            return f"{joules / max(tokens, 1):.3g} J per new token ({self.counted})"
        if modelled is None:
            return f"energy not known: {self.reason}"
        return f"{modelled() / max(tokens, 1):.3g} J per new token, modelled as {machine} (not measured: {self.reason})"

    def _update(self) -> None:
        """Read the counters and add what they have grown by; one that fails in between ends the counting."""
        with self._lock:
            if self.reason:
                return
            try:
                values = [counter.read() for counter in self._counters]
                if self._values:
                    self._total += joules_between(self._counters, self._values, values)
                self._values = values
            except OSError as error:
                self.reason, self._values = str(error), []

    def _keep_reading(self) -> None:
        while not self._stop.wait(READ_EVERY):
            self._update()
