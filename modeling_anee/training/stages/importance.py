"""Importance of neurons and of groups of heads, for narrow variants: how much each adds to its sublayer's output, on average.

The mean norm, over tokens, of what comes from it, in the base as it is. With directions along which the inputs of the output
maps mostly lie, what is left out is added again as far as what is kept tells of it, see `corrections.py`; where that brings no
nearer to the base on tokens that the directions were not found on, there are none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base_block import OUTPUT, Block, mlp_map
from ...base_linear import readable_weight
from ...corrections import PART, Corrections
from ...narrow import HEADS, NEURONS, Orders
from ..run import Run
from .corrections import inputs_of, leading


NAME = "importance"


def run_stage(run: Run) -> dict:
    """Run the base over some windows, and order what each layer has.

    Raises:
        ValueError: the model has no narrow variant.
    """
    settings, model = run.settings(NAME), run.model
    narrow = [*(model.config.narrow or ())]
    if not narrow:
        raise ValueError("stages.importance needs narrow variants, narrow: [int4_half] for example, in anee")
    blocks = model.stack.blocks_of(narrow[0])
    last = mlp_map(len(blocks[0].mlp_maps) - 1)
    maps = {name: [block.linear[name] for block in blocks] for name in (OUTPUT, last)}
    windows = run.windows("train")[: settings.windows].to(run.device)
    inputs = inputs_of(run, maps, windows, model.config.keep_first_tokens)
    model.orders = Orders.of(
        {
            NEURONS: torch.stack([of_parts(block, last, x) for block, x in zip(blocks, inputs[last], strict=True)]),
            HEADS: torch.stack([of_parts(block, OUTPUT, x) for block, x in zip(blocks, inputs[OUTPUT], strict=True)]),
        }
    )
    found = {name: own for name, own in model.corrections.named_buffers() if not name.startswith(PART)}
    if settings.rank:
        model.stack.orders = model.orders
        model.stack.prepare()  # narrow layers keep what is important now
        forms = [model.stack.blocks_of(variant) for variant in narrow]
        along: dict[str, list[Tensor]] = {name: [] for name in inputs}
        for layer in run.track(len(blocks), "directions of inputs"):
            for name, own in along.items():
                parts = [form[layer].linear[name] for form in forms]
                own.append(directions(parts, inputs[name][layer], settings.rank))
        found |= {PART + name: torch.stack(own) for name, own in along.items()}
    model.corrections = Corrections.of(found)
    return {"orders": model.orders.shapes, "corrections": model.corrections.shapes or None}


@torch.no_grad()
def of_parts(block: Block, name: str, x: Tensor) -> Tensor:
    """Mean norm of what comes from each neuron, or each group of heads, for inputs [N, in] of an output map; [parts]."""
    one = block.linear[name]
    weight = readable_weight(one.modules[0], one.variant).float()
    parts = block.kv_heads if name == OUTPUT else weight.shape[1]
    columns = weight.unflatten(1, (parts, -1))  # [out, parts, size]
    grams = torch.einsum("ops,opt->pst", columns, columns)
    own = x.float().unflatten(1, (parts, -1))
    return torch.einsum("nps,pst,npt->np", own, grams, own).clamp(min=0.0).sqrt().mean(dim=0)


def directions(parts: list[Any], x: Tensor, rank: int) -> Tensor:
    """Directions [rank, in] of inputs [N, in] of an output map, zeros where they don't help one of its narrow forms."""
    rank = min(rank, x.shape[0] // 2, x.shape[1])
    tried = leading(x[::2], rank)
    helps = all(missed(one, x[1::2], tried) < missed(one, x[1::2], torch.zeros_like(tried)) for one in parts)
    return leading(x, rank) if helps else torch.zeros_like(tried)


@torch.no_grad()
def missed(one: Any, x: Tensor, along: Tensor) -> float:
    """What a narrow output map with such directions misses for inputs [N, in], relative to its output, mean over tokens."""
    weight = readable_weight(one.modules[0], one.variant)
    exact, found = F.linear(x, weight), one.variant.map_of_part(weight, None, one.inputs, along)(x[:, one.inputs])
    return float(((found - exact).float().norm(dim=-1) / exact.float().norm(dim=-1).clamp(min=torch.finfo().tiny)).mean())
