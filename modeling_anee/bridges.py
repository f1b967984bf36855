"""Bridges and exit translators: small trained maps from the residual stream to itself.

They know nothing of budgets or controllers; which one is asked when is up to the executor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .actions import NONE, Action
from .configuration_anee import AneeConfig


EPSILON = 1e-6  # of the mean square, as in the norms of most families


class SilentLinear(nn.Linear):
    """A linear map from which nothing comes until it is trained."""

    def reset_parameters(self) -> None:
        """Back to zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Bridge(nn.Module):
    """`h + up(down(h / rms(h))) + bias`, with an inner width of `rank`; what it adds is the *delta*.

    As a bridge it stands for what a skipped layer (or feed-forward) would have added to the hidden state. As an exit
    translator it turns an intermediate hidden state into what the final norm expects (tuned lens, arXiv:2303.08112).
    Untrained it changes nothing. Parameters are float32 unless the model is cast; the result has the dtype of its input.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = SilentLinear(rank, hidden_size)

    def delta(self, hidden: Tensor) -> Tensor:
        """What is added to hidden states [..., D], in the dtype of the parameters, [..., D]."""
        return self.up(self.down(normalised(hidden).to(self.down.weight.dtype)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> [..., D]."""
        return hidden + self.delta(hidden).to(hidden.dtype)

    def row(self, row: Tensor) -> Tensor:
        """The same of one row [D], without gradients, in few kernels where it lies beside float32 parameters."""
        down, up = self.down.weight, self.up.weight
        if up.dtype != row.dtype or up.device != row.device:
            return self(row)
        return torch.addmv(row + self.up.bias, up, torch.mv(down, row), alpha=inverse_rms(row))


def inverse_rms(row: Tensor) -> float:
    """What `normalised` multiplies one row [D] with, in one kernel."""
    return (torch.dot(row, row).item() / row.numel() + EPSILON) ** -0.5


def normalised(hidden: Tensor) -> Tensor:
    """Hidden states [..., D] over their root mean square, float32."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + EPSILON)


class Bridges(nn.Module):
    """Every bridge and exit translator of one model, by layer.

    Args:
        config: says which layers have one (`bridge_layers`, `ffn_bridge_layers`, `exit_layers`) and of what rank; a rank
            of 0 means none.
    """

    skip: Any  # a ModuleDict, whose items have no type
    skip_ffn: Any
    exit: Any

    def __init__(self, config: AneeConfig) -> None:
        super().__init__()
        everywhere = range(config.num_layers)
        size = config.text_config.hidden_size
        self.skip = _by_layer(size, config.bridge_rank, config.bridge_layers, everywhere)
        self.skip_ffn = _by_layer(size, config.ffn_bridge_rank, config.ffn_bridge_layers, everywhere)
        self.exit = _by_layer(size, config.exit_translator_rank, config.exit_layers, everywhere)

    def stand_in(self, action: Action, layer: int) -> Bridge | None:
        """What stands for what an action leaves out at a layer; nothing does for a token that has left."""
        if action.leaves or action.feed_forward != NONE:
            return None
        return self.of_skip(layer) if action.attention == NONE else self.of_skip_ffn(layer)

    def of_skip(self, layer: int) -> Bridge | None:
        """What stands for a skipped layer."""
        return self.skip[str(layer)] if str(layer) in self.skip else None

    def of_skip_ffn(self, layer: int) -> Bridge | None:
        """What stands for a layer's feed-forward."""
        return self.skip_ffn[str(layer)] if str(layer) in self.skip_ffn else None

    def of_exit(self, layer: int) -> Bridge | None:
        """What hidden states that exit before `layer` go through."""
        return self.exit[str(layer)] if str(layer) in self.exit else None


def _by_layer(size: int, rank: int, layers: Iterable[int] | None, everywhere: range) -> nn.ModuleDict:
    chosen = sorted(everywhere if layers is None else layers) if rank else ()
    return nn.ModuleDict({str(layer): Bridge(size, rank) for layer in chosen})
