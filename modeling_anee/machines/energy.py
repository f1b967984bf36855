"""Joules where no counter tells them, as modelled: what a machine takes while it is on, each byte read, and each operation.

One definition for everything that says `modelled`: simulated plans, stretches of work that were timed, prices in joules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..actions import FULL, NONE
from ..costs import CostTable
from ..hardware import Hardware
from ..narrow import whole_of
from ..trace import ExecutionTrace
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

    @classmethod
    def named(cls, name: str, dtype: str = FLOAT32) -> "EnergyModel":
        """That of a machine that comes along, or of a file. Raises as `Description.find`."""
        return cls(Description.find(name), dtype)

    def of_trace(self, model: Any, trace: ExecutionTrace, prompt: int, seconds: float) -> float:
        """Joules of what a trace tells, which took so long; what was discarded on the way is not in it.

        A forward reads the weights of each layer once for all its tokens, in the dearest of their variants: the prompt is one
        forward, and each new token of all rows another.

        Args:
            model: that was run.
            trace: of it.
            prompt: tokens of the prompt.
            seconds: that it took.
        """
        table, priced = model.config.table, self._arithmetic({whole_of(name) for name in model.config.table.variants})
        read = _per_token(model.stack.measure_costs("bytes", model.bridges, table), trace)
        done = _per_token(model.stack.measure_costs(priced, model.bridges, table), trace)
        layers = read.layers[:, :prompt].amax(dim=(0, 1)).sum() + read.layers[:, prompt:].amax(dim=0).sum()
        heads = read.heads[:, prompt - 1 :].amax(dim=0).sum()
        attending = trace.table.where([action.attention != NONE for action in trace.table])[trace.actions.long()].sum(dim=-1)
        before = torch.arange(attending.shape[1]).clamp(min=prompt) * (torch.arange(attending.shape[1]) >= prompt)
        seen = float((attending * trace.valid * before).sum()) * model.stack.blocks[0].kv_bytes
        arithmetic = float(done.layers.sum() + done.heads[:, prompt - 1 :].sum())
        return self.joules(seconds, float(layers + heads) + seen, {}) + arithmetic

    def _arithmetic(self, variants: set[str]) -> Hardware:
        """Joules of operations, as prices."""
        own = {name: Hardware("joules", flop=self.operation(name)) for name in variants - {FULL}}
        return Hardware("joules", flop=self.operation(FULL), variants=own)


class _PerToken(NamedTuple):
    """Of what every token ran: of its layers [B, T, L], of its head [B, T]; 0 for padding."""

    layers: Tensor
    heads: Tensor


def _per_token(costs: CostTable, trace: ExecutionTrace) -> _PerToken:
    taken = costs.layers[torch.arange(len(costs.layers)), trace.actions.long()] * trace.valid.unsqueeze(-1)
    full = torch.zeros_like(trace.valid, dtype=torch.uint8)
    heads = costs.of_heads(full if trace.head is None else trace.head) * trace.valid
    return _PerToken(taken * costs.total, heads * costs.total)
