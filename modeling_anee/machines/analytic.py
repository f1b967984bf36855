"""Predictions by a description alone: the roofline (Williams, Waterman and Patterson, 2009, doi:10.1145/1498765.1498785).

A kernel takes what its bytes or its arithmetic take, whichever is longer, and its launch. Each half of a layer has kernels
besides its linear maps (norm, rotation, attention or activation, residual), which read and write hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .description import FLOAT32, Description
from .prediction import PARTS, Times
from .workload import Kernel, LayerLoad, Workload


OTHER_KERNELS = 4  # of each half of a layer, besides its linear maps
TOUCHED = 8  # times that these read or write a hidden state
TOKEN_KERNELS = 4  # embedding, final norm, the choice of a token
BYTES = {FLOAT32: 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Analytic:
    """A machine by its description.

    Args:
        machine: its description.
        dtype: of hidden states, keys and values, and of full weights.
    """

    machine: Description
    dtype: str = FLOAT32

    def decode(self, load: Workload, batch: int, context: int) -> Times:
        """One token of every row, after so many others."""
        return self._times(load, batch, batch, self._context_ms(load, batch, context))

    def prefill(self, load: Workload, batch: int, tokens: int) -> Times:
        """Prompts of so many tokens each, and the logits of their last ones; a token sees half of the others on average."""
        return self._times(load, batch * tokens, batch, self._context_ms(load, batch * tokens, tokens / 2, batch))

    def map_ms(self, kernel: Kernel, rows: float) -> float:
        """Milliseconds of a linear map."""
        return self.launch_ms + max(self.memory_ms(kernel, rows), self.arithmetic_ms(kernel, rows))

    def memory_ms(self, kernel: Kernel, rows: float) -> float:
        """Of its weights, inputs and outputs."""
        moved = kernel.weight_bytes + rows * (kernel.inputs + kernel.outputs) * self._size
        return moved / self.machine.bytes_per_ms

    def arithmetic_ms(self, kernel: Kernel, rows: float) -> float:
        """Of its operations, in the narrowest arithmetic that the machine has for it."""
        return rows * kernel.flops / self.machine.ops_per_ms(self.machine.precision_of(kernel.variant, self.dtype))

    @property
    def launch_ms(self) -> float:
        """Milliseconds until a kernel begins."""
        return self.machine.launch_us.value / 1e3

    def fits(self, load: Workload, batch: int, context: int) -> bool:
        """Whether weights, keys and values fit into the memory."""
        return load.weight_bytes + batch * context * kv_bytes(load) <= self.machine.memory_gb.value * 1e9

    @property
    def _size(self) -> int:
        return BYTES.get(self.dtype, 4)

    def _times(self, load: Workload, rows: float, head_rows: float, context_ms: float) -> Times:
        names = PARTS[:3]
        parts = dict.fromkeys(names, 0.0)
        for layer in load.layers:
            for name, kernels in zip(names, parts_of(layer), strict=True):
                parts[name] += sum(self.map_ms(kernel, rows) for kernel in kernels)
        ran = sum(bool(half) for layer in load.layers for half in parts_of(layer)[:2])
        left_out = 2 * len(load.layers) - ran
        touched = TOUCHED * rows * load.width * self._size / self.machine.bytes_per_ms
        rest = ran * (OTHER_KERNELS * self.launch_ms + touched) + left_out * self.machine.skip_us.value / 1e3
        parts |= {"head": self.map_ms(load.head, head_rows), "context": context_ms, "layers' rest": rest}
        return Times({name: (parts | {"token": TOKEN_KERNELS * self.launch_ms})[name] for name in PARTS})

    def _context_ms(self, load: Workload, queries: float, context: float, rows: float | None = None) -> float:
        """Of keys and values: each row's are read once for all its new tokens, of which each is compared with all of them."""
        times_read = queries if rows is None else rows
        memory = times_read * context * kv_bytes(load) / self.machine.bytes_per_ms
        attending = sum(bool(layer.attention) for layer in load.layers)
        operations = 4.0 * queries * context * load.attention_width * attending
        precision = self.machine.precision_of("full", self.dtype)
        return max(memory, operations / self.machine.ops_per_ms(precision))


def parts_of(layer: LayerLoad) -> Sequence[tuple[Kernel, ...]]:
    """Its halves, and what stands in."""
    return layer.attention, layer.feed_forward, layer.stand_in


def kv_bytes(load: Workload) -> float:
    """Of keys and values of one token, in all layers that attend."""
    return sum(layer.kv_bytes for layer in load.layers)
