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


SMALLEST = 1e-6  # of norms, before a logarithm or a division


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

    def forward(self, hidden: Tensor, rms: Tensor | None = None) -> Tensor:
        """Hidden states [N, D], root mean squares [N, 1] if known -> entropy / log(vocabulary), max probability, [N, 2]."""
        rms = hidden.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=SMALLEST) if rms is None else rms
        # Linear in the hidden state over its root mean square; dividing two numbers is cheaper than dividing D.
        weight, bias = self.linear.weight, self.linear.bias
        return torch.sigmoid(nn.functional.linear(hidden.to(weight.dtype), weight) / rms + bias).float()


def state_vector(probe: SignalProbe, hidden: Tensor, previous: Tensor, depth: float, remaining: Tensor) -> Tensor:
    """The signals of N tokens, float32 [N, 7] in the order of `SIGNALS`, each of the order of one.

    Norms are root mean squares, so that they mean the same in models of any width; the hidden state's norm and variance
    are logarithms, the delta is relative to the hidden state. Few kernels: a decision must not cost what it saves.

    Args:
        probe: estimates the first two.
        hidden: hidden states [N, D] that enter the decision layer.
        previous: hidden states [N, D] at the decision before.
        depth: decision layer / number of layers.
        remaining: budget not yet spent, float [N].
    """
    hidden, previous = hidden.float(), previous.float()
    variance, mean = torch.var_mean(torch.stack((hidden, hidden - previous)), dim=-1, correction=0, keepdim=True)
    rms = torch.addcmul(variance, mean, mean).sqrt_()  # [2, N, 1]: of the state, of the delta
    rms[0].clamp_(min=SMALLEST)
    constant = rms.new_full((1, 1), depth).expand(len(hidden), 1)
    parts = (probe(hidden, rms[0]), rms[0], rms[1] / rms[0], variance[0], constant, remaining.to(rms).unsqueeze(-1))
    signals = torch.cat(parts, dim=-1)
    signals[:, 2:5:2].clamp_(min=SMALLEST**2).log_()
    return signals
