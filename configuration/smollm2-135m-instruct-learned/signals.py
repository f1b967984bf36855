"""The state vector: signals of one token at one decision layer, from its own past and present alone.

Seven of them always; a probe that has learned to adds how far the bridges of the following layers would be off.
"""

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
    """Estimates what is not known before the layers run: entropy, max probability, and what bridges would miss.

    Untrained (zeros) it answers 0.5, 0.5 and 0.

    Args:
        hidden_size: width D of the hidden states.
        layers: how many following layers' bridge errors it estimates as well.
    """

    def __init__(self, hidden_size: int, layers: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 2 + layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the untrained state."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, rms: Tensor | None = None) -> Tensor:
        """Hidden states [N, D], root mean squares [N, 1] if known -> float32 [N, 2 + layers].

        Entropy / log(vocabulary) and max probability in [0, 1], then the logarithm of each layer's bridge error relative
        to what the layer adds.
        """
        rms = hidden.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=SMALLEST) if rms is None else rms
        # Linear in the hidden state over its root mean square; dividing few numbers is cheaper than dividing D.
        weight, bias = self.linear.weight, self.linear.bias
        if weight.is_meta:  # offloaded: only there while the module itself runs
            answers = self.linear((hidden / rms).to(weight.dtype)).float()
            return torch.cat((torch.sigmoid(answers[..., :2]), answers[..., 2:]), dim=-1)
        answers = (nn.functional.linear(hidden.to(weight.dtype), weight) / rms + bias).float()
        return torch.cat((torch.sigmoid(answers[..., :2]), answers[..., 2:]), dim=-1)


def state_vector(probe: SignalProbe, hidden: Tensor, previous: Tensor, depth: float, remaining: Tensor) -> Tensor:
    """The signals of N tokens, float32 [N, 7 + layers]: those of `SIGNALS`, then the probe's bridge errors, if any.

    Norms are root mean squares, so that they mean the same in models of any width; the hidden state's norm and variance
    are logarithms, the delta is relative to the hidden state. Few kernels: a decision must not cost what it saves.

    Args:
        probe: estimates the first two, and bridge errors.
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
    probed = probe(hidden, rms[0])
    rest = rms[0], rms[1] / rms[0], variance[0], constant, remaining.to(rms).unsqueeze(-1)
    parts = (probed[:, :2], *rest, probed[:, 2:])
    signals = torch.cat(parts, dim=-1)
    signals[:, 2:5:2].clamp_(min=SMALLEST**2).log_()
    return signals
