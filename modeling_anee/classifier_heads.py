"""Heads of an early-exit classifier: what they read of a frozen base's hidden states, and what they cost.

A head's answer is mixed with that of the head before it, which has been mixed before, so that it knows all answers so far
(connections of heads as in Zero Time Waste, arXiv:2106.05409): a deep head of a frozen language model alone need not be better.

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
    of all real tokens, `last` the last of them, `first` the first.
    """
    valid = valid.to(hidden.device)
    if pooling != "mean":
        places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        order = places if pooling == "last" else places.flip(0)
        return normalised(hidden[torch.arange(len(hidden), device=hidden.device), (order * valid).argmax(dim=1)])
    shares = valid / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("bt,btd->bd", shares.float(), normalised(hidden).masked_fill(~valid.unsqueeze(-1), 0.0))


def read(now: Tensor, total: Tensor, heads: int) -> Tensor:
    """What a head reads, [B, F]: the vector of its own layer, and the mean of all `heads` so far, whose sum is `total`.

    The last layers of a language model are about the next token: what those before know of the text is kept for deep heads.
    """
    return torch.cat((now, total / heads), dim=1)


class ClassifierHeads(nn.Module):
    """A small head at each of the chosen layers, its mixing, and the temperature that calibrates it (arXiv:1706.04599).

    Args:
        config: its `classifier` says which layers, and the inner width of a head; 0: one linear map.
    """

    temperature: Tensor  # float32 [E], mixed logits are divided by it
    mixing: Tensor  # float32 [E, 2], of a head's own logits, and of those of the head before, mixed

    def __init__(self, config: AneeConfig) -> None:
        super().__init__()
        assert config.classifier is not None and config.num_labels is not None
        width, classes = 2 * config.text_config.hidden_size, config.num_labels
        inner, count = config.classifier["hidden_size"], len(config.classifier["layers"])
        self.exits = nn.ModuleList(_head(width, inner, classes) for _ in range(count))
        self.register_buffer("temperature", torch.ones(count))
        self.register_buffer("mixing", torch.tensor([[1.0, 0.0]] * count))

    def forward(self, place: int, features: Tensor, before: Tensor | None = None) -> Tensor:
        """Mixed logits of one head, not calibrated: features [B, F], those of the head before [B, C] -> float32 [B, C]."""
        head: Any = self.exits[place]
        weight = next(head.parameters())
        return mixed(self.mixing[place], head(features.to(weight.dtype)).float(), before)

    def calibrated(self, place: int, logits: Tensor) -> Tensor:
        """Logits of one head that can be taken literally."""
        return logits / self.temperature[place]

    def all(self, features: Tensor) -> Tensor:
        """Calibrated logits of all heads, what they read [B, E, F] -> [B, E, C]."""
        before, found = None, []
        for place in range(features.shape[1]):
            before = self(place, features[:, place], before)
            found.append(self.calibrated(place, before))
        return torch.stack(found, dim=1)


def mixed(mixing: Tensor, own: Tensor, before: Tensor | None) -> Tensor:
    """Logits of a head [B, C] with those of the head before it, by the two numbers of `mixing`."""
    return mixing[0] * own if before is None else mixing[0] * own + mixing[1] * before


def _head(width: int, inner: int, classes: int) -> nn.Module:
    if not inner:
        return nn.Linear(width, classes)
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, classes))


@dataclass(frozen=True)
class ExitCosts:
    """What leaving at each head costs, as a share of all layers and heads.

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

    def of_rows(self, places: Tensor, tokens: Tensor) -> Tensor:
        """Cost of rows, float64 [B], that left at heads int64 [B], which had asked all heads before, and had `tokens` [B]."""
        heads = self.heads.cumsum(dim=0)
        return (self.layers[places] * tokens + heads[places]) / (self.layers[-1] * tokens + heads[-1])

    @property
    def reached(self) -> Tensor:
        """Cost of the layers up to each head, float64 [E]; the heads themselves, some thousandths of a layer, left out."""
        return self.layers / self.layers[-1]
