"""What a default recipe follows from, of a base: its size, and what it costs in fewer bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.uniform import PRECISIONS
from ..modeling_anee import AneeForCausalLM


@dataclass(frozen=True)
class Shape:
    """Size and costs of a base; costs are shares of the whole model in full.

    Args:
        layers: how many.
        hidden_size: width of the hidden states.
        context: tokens that the base takes; None if it does not say.
        actions: how many plans are sought over, besides processing in full.
        bridged: whether some of these leave something out.
        head: cost of the head in full.
        in_8_bits: cost of everything in 8 bits.
        in_4_bits: cost of all layers in 4 bits and the head in 8.
        least: cost of everything in 4 bits.
        least_head: cost of the head in 4 bits.
        gated: whether a `gated` controller is made for it.
    """

    layers: int
    hidden_size: int
    context: int | None
    actions: int
    bridged: bool
    head: float
    in_8_bits: float
    in_4_bits: float
    least: float
    least_head: float
    gated: bool = False

    @classmethod
    def of(cls, model: AneeForCausalLM) -> "Shape":
        """That of a wrapped base.

        Raises:
            ValueError: fewer bits save nothing, since the base has few already.
        """
        config, costs = model.config, model.costs
        heads = {bits: config.table.heads.index(bits) for bits in PRECISIONS}

        def cost(layers: str, head: str) -> float:
            return float(costs.of_plans(plan_in(model, layers), torch.tensor(heads[head])))

        in_4_bits = cost("int4", "int8")
        if in_4_bits > 0.99:
            raise ValueError("the base's weights can't be read as numbers, or have few bits already: with fewer none is saved")
        return cls(
            layers=config.num_layers,
            hidden_size=config.text_config.hidden_size,
            context=getattr(config.text_config, "max_position_embeddings", None),
            actions=len(config.controller_actions or ()),
            bridged=max(config.bridge_rank, config.ffn_bridge_rank) > 0,
            head=costs.head,
            in_8_bits=cost("int8", "int8"),
            in_4_bits=in_4_bits,
            least=cost("int4", "int4"),
            least_head=costs.heads[heads["int4"]],
            gated=config.controller == "gated",
        )

    def budgets(self, shares: Sequence[float]) -> list[float]:
        """Budgets that spend these shares of what all layers cost in 4 bits, and the head in 4.

        Where the head is most of a base, its bits go before any layer is left out, so bridges must begin below that.
        """
        return [round(self.least_head + share * (self.least - self.least_head), 4) for share in shares]


def plan_in(model: AneeForCausalLM, bits: str) -> torch.Tensor:
    """The plan of a variant at every layer, uint8 [L]."""
    place = model.config.table.place_of(bits, bits)
    return torch.full((model.config.num_layers,), place, dtype=torch.uint8)


def check_layers(config: Any) -> None:
    """Notice a base that is too small to leave anything out.

    Raises:
        ValueError: it has too few layers.
    """
    layers = config.num_hidden_layers
    if layers < 3:
        raise ValueError(f"the base has {layers} layers: at least 3 are needed, since the first and the last are always run")
