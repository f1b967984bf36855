"""The state vector: seven signals of one token at one decision layer, from its own past and present alone."""

import torch
from torch import Tensor, nn


SIGNALS = (
    "hidden_entropy",
    "max_probability",
    "hidden_norm",
    "delta_norm",
    "activation_variance",
    "relative_depth",
    "remaining_budget",
)


class SignalProbe(nn.Module):
    """Estimates the entropy and the max probability of the next token from a hidden state, without the head.

    Untrained (zeros) it answers 0.5 and 0.5.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the untrained state."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] -> entropy / log(vocabulary) and max probability, [N, 2] in [0, 1]."""
        hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:]).to(self.linear.weight.dtype)
        return torch.sigmoid(self.linear(hidden)).float()


def state_vector(probe: SignalProbe, hidden: Tensor, previous: Tensor, depth: float, remaining: Tensor) -> Tensor:
    """The signals of N tokens, float32 [N, 7] in the order of `SIGNALS`, each of the order of one.

    Args:
        probe: estimates the first two.
        hidden: hidden states [N, D] that enter the decision layer.
        previous: hidden states [N, D] at the decision before.
        depth: decision layer / number of layers.
        remaining: budget not yet spent, float [N].
    """
    hidden, previous = hidden.float(), previous.float()
    norm = hidden.norm(dim=-1)
    delta = (hidden - previous).norm(dim=-1) / norm.clamp(min=1e-6)
    scalars = torch.stack(
        (
            norm.clamp(min=1e-6).log() / 10,
            delta,
            hidden.var(dim=-1).clamp(min=1e-12).log() / 10,
            torch.full_like(norm, depth),
            remaining.to(norm),
        ),
        dim=-1,
    )
    return torch.cat((probe(hidden), scalars), dim=-1)
