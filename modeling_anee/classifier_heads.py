"""Heads of an early-exit classifier: what they read of a frozen base's hidden states, and what they cost.

Shapes: B rows, T tokens, D hidden size, E heads, C classes, F = 2 D features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .bridges import normalised
from .configuration_anee import AneeConfig
from .hardware import Hardware
from .work import work_of


def pooled(hidden: Tensor, valid: Tensor, pooling: str) -> Tensor:
    """One vector for each row of hidden states [B, T, D] whose real tokens are in a mask [B, T]: float32 [B, D].

    Every token is divided by its root mean square, since a few have massive activations (arXiv:2402.17762); then `mean` is that
    of all real tokens, `last` the last of them.
    """
    valid = valid.to(hidden.device)
    if pooling == "last":
        places = torch.arange(hidden.shape[1], device=hidden.device)
        return normalised(hidden[torch.arange(len(hidden), device=hidden.device), (places * valid).argmax(dim=1)])
    shares = valid / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("bt,btd->bd", shares.float(), normalised(hidden).masked_fill(~valid.unsqueeze(-1), 0.0))


def read(now: Tensor, total: Tensor, heads: int) -> Tensor:
    """What a head reads, [B, F]: the vector of its own layer, and the mean of all `heads` so far, whose sum is `total`.

    The last layers of a language model are about the next token: what those before know of the text is kept for deep heads.
    """
    return torch.cat((now, total / heads), dim=1)


class ClassifierHeads(nn.Module):
    """A small head at each of the chosen layers, and the temperature that calibrates it (Guo et al., arXiv:1706.04599).

    Args:
        config: its `classifier` says which layers, and the inner width of a head; 0: one linear map.
    """

    temperature: Tensor  # float32 [E], logits are divided by it

    def __init__(self, config: AneeConfig) -> None:
        super().__init__()
        assert config.classifier is not None and config.num_labels is not None
        width, classes = 2 * config.text_config.hidden_size, config.num_labels
        inner, count = config.classifier["hidden_size"], len(config.classifier["layers"])
        self.exits = nn.ModuleList(_head(width, inner, classes) for _ in range(count))
        self.register_buffer("temperature", torch.ones(count))

    def forward(self, place: int, features: Tensor) -> Tensor:
        """Calibrated logits of one head, features [B, F] -> [B, C], float32."""
        head: Any = self.exits[place]
        weight = next(head.parameters())
        return head(features.to(weight.dtype)).float() / self.temperature[place]


def _head(width: int, inner: int, classes: int) -> nn.Module:
    if not inner:
        return nn.Linear(width, classes)
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, classes))


@dataclass(frozen=True)
class ExitCosts:
    """What leaving at each head costs, as a share of all layers and the last head alone.

    Args:
        layers: price of the layers up to each head, for one token, float64 [E].
        heads: price of each head, which runs once a row, float64 [E].
    """

    layers: Tensor
    heads: Tensor

    @classmethod
    def of(cls, layer_prices: Tensor, layers: list[int], heads: ClassifierHeads, hardware: Hardware) -> "ExitCosts":
        """Count: `layer_prices` float64 [L] of one token, a head after each of so many `layers`."""
        prices = [hardware.price(work_of([head])) for head in heads.exits]
        sums = layer_prices.cumsum(dim=0)[torch.tensor(layers, device="cpu") - 1]
        return cls(sums, torch.tensor(prices, dtype=torch.float64, device="cpu"))

    def of_rows(self, places: Tensor, tokens: Tensor, asked: Tensor) -> Tensor:
        """Cost of rows, float64 [B], that left at heads int64 [B], had `tokens` [B], and asked the heads in bool [B, E]."""
        spent = self.layers[places] * tokens + (asked * self.heads).sum(dim=1)
        return spent / (self.layers[-1] * tokens + self.heads[-1])

    @property
    def reached(self) -> Tensor:
        """Cost of the layers up to each head, float64 [E]; the heads themselves, some thousandths of a layer, left out."""
        return self.layers / self.layers[-1]
