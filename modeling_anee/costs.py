"""What an action costs, as a share of the full model's decoder stack.

Two units: `"flops"` (of the linear maps, per token) and `"bytes"` (of weights read, what decoding at batch 1 pays
for). Attention scores are left out of both: they depend on the context length and are saved in the same proportion.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .actions import Action
from .blocks import Block
from .bridges import Bridges
from .packed import is_packed, shape, stored_bytes


def work(modules: Iterable[nn.Module], unit: str) -> float:
    """FLOPs per token of the linear maps in `modules`, or bytes of all their weights."""
    parts = {id(part): part for module in modules for part in _parts(module)}.values()
    return float(sum(map(_bytes if unit == "bytes" else _flops, parts)))


def _parts(module: nn.Module) -> Iterator[nn.Parameter | nn.Module]:
    """Parameters, and the linear maps whose weights can't be read."""
    if is_packed(module):
        yield module
        return
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        yield from _parts(child)


def _bytes(part: nn.Parameter | nn.Module) -> int:
    return stored_bytes(part) if isinstance(part, nn.Module) else part.numel() * part.element_size()


def _flops(part: nn.Parameter | nn.Module) -> int:
    if isinstance(part, nn.Module):
        return 2 * math.prod(shape(part))
    return 2 * part.numel() if part.dim() > 1 else 0


@dataclass(frozen=True)
class CostTable:
    """Costs of one wrapped base.

    Args:
        layers: cost of each action at each layer, float64 [L, actions], on the CPU; PROCESS of all layers sums to 1.
        head: cost of one more call of the final norm and the head.
        stack: work of the whole decoder stack in `unit`, by which everything is divided.
        unit: `"flops"` or `"bytes"`.
        translator: cost of one call of an exit translator; `layers` has it at the last layer's EXIT.
    """

    layers: Tensor
    head: float
    stack: float
    unit: str
    translator: float = 0.0

    @classmethod
    def measure(cls, blocks: list[Block], head_modules: list[nn.Module], unit: str, bridges: Bridges | None) -> "CostTable":
        """Count the work of every layer of a base, and of what stands in for it.

        An exit translator is charged at the last layer, where every token that exits pays once; all have one rank.
        """
        translator = _optional_work(next(iter(bridges.exit.values()), None) if bridges else None, unit)
        rows = []
        for layer, block in enumerate(blocks):
            keys_values = work(block.qkv.modules, unit) * block.keys_values_share + _norm_work(block.key_norms, unit)
            attention = work([*block.qkv.modules, block.output], unit) + _norm_work(block.attention_norms, unit)
            own_norms = [norm for norm in block.mlp_norms if norm not in block.attention_norms]
            row = {
                Action.PROCESS: attention + work([block.mlp], unit) + _norm_work(own_norms, unit),
                Action.SKIP: keys_values + _optional_work(bridges and bridges.of_skip(layer), unit),
                Action.EXIT: keys_values,
                Action.SKIP_FFN: attention + _optional_work(bridges and bridges.of_skip_ffn(layer), unit),
            }
            rows.append(row)
        rows[-1][Action.EXIT] += translator
        stack = sum(row[Action.PROCESS] for row in rows)
        layers = torch.tensor([[row[action] for action in Action] for row in rows], dtype=torch.float64, device="cpu")
        return cls(layers / stack, work(head_modules, unit) / stack, stack, unit, translator / stack)

    @property
    def stack_share(self) -> float:
        """Share of the whole model's work, one head call included, that is the decoder stack."""
        return 1.0 / (1.0 + self.head)

    def of_actions(self, actions: Tensor, first: int = 0) -> Tensor:
        """Cost of actions [..., n] taken at the n layers from `first` on, float64 [...]."""
        return torch.take(self.layers, self._rows[first : first + actions.shape[-1]] + actions).sum(dim=-1)

    @cached_property
    def _rows(self) -> Tensor:
        """Place of each layer's first entry in the flat table."""
        return torch.arange(len(self.layers), device="cpu") * self.layers.shape[1]

    def of_module(self, module: nn.Module) -> float:
        """Cost of one call of a module of ours (a controller, a bridge)."""
        return work([module], self.unit) / self.stack


def _optional_work(module: nn.Module | None, unit: str) -> float:
    return 0.0 if module is None else work([module], unit)


def _norm_work(norms: Iterable[nn.Module], unit: str) -> float:
    """Norms are no linear maps, whatever the shape of their weights."""
    return work(norms, unit) if unit == "bytes" else 0.0
