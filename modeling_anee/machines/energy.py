"""Joules where no counter tells them, as modelled: what a machine takes while it is on, each byte read, and each operation.

One definition for everything that says `modelled`: simulated plans, stretches of work that were timed, prices in joules.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .analytic import kv_bytes
from .description import FLOAT32, Description
from .workload import Workload


@dataclass(frozen=True)
class EnergyModel:
    """The energy of a machine.

    Args:
        machine: its description.
        dtype: of full weights.
    """

    machine: Description
    dtype: str = FLOAT32

    @property
    def byte(self) -> float:
        """Joules of a byte that is read."""
        return self.machine.byte_pj.value / 1e12

    def operation(self, variant: str) -> float:
        """Joules of an operation of a linear map in a variant."""
        return self.machine.op_pj[self.machine.precision_of(variant, self.dtype)].value / 1e12

    def joules(self, seconds: float, moved: float, operations: Mapping[str, float]) -> float:
        """Joules of some work.

        Args:
            seconds: that it took.
            moved: bytes that were read.
            operations: by variant.
        """
        arithmetic = sum(count * self.operation(variant) for variant, count in operations.items())
        return self.machine.idle_watts.value * seconds + moved * self.byte + arithmetic

    def of_call(self, load: Workload, ms: float, rows: float, head_rows: float, context_read: float) -> float:
        """Joules of one call of a plan.

        Args:
            load: what it runs.
            ms: that it takes.
            rows: of its linear maps.
            head_rows: of the head.
            context_read: tokens whose keys and values are read, over all rows.
        """
        operations: dict[str, float] = {}
        for kernel in load.kernels:
            count = kernel.flops * (head_rows if kernel is load.head else rows)
            operations[kernel.variant] = operations.get(kernel.variant, 0.0) + count
        return self.joules(ms / 1e3, load.weight_bytes + context_read * kv_bytes(load), operations)
