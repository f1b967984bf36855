"""What leaving out each feed-forward of each token alone would lose, for all of them at once, from one backward.

KL between the base's next-token distributions before and after a change of one hidden state is, to second order, half the mean
square of that change along the gradient of the log probability of tokens drawn from these distributions (the Fisher
information). One draw for each token gives an estimate that is right on the mean and varies much, with what the change does to
all tokens that follow in it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..actions import FULL
from ..evaluation.rollout import begin
from ..modeling_anee import AneeForCausalLM
from ..step import Step
from .mixing import controller_of, fed_in, in_variant


@dataclass(frozen=True)
class Sensitivities:
    """The base on some tokens, and what each of its feed-forwards is needed for; without gradients.

    Args:
        step: the tokens.
        entering: what enters every layer, [B, T, D] each.
        attended: what enters its second half, [B, T, D] each.
        losses: what its cheapest feed-forward alone would lose, nats [B, T] each.
        logits: what the base says, [B, T, V].
    """

    step: Step
    entering: list[Tensor]
    attended: list[Tensor]
    losses: list[Tensor]
    logits: Tensor


def sensitivities(model: AneeForCausalLM, ids: Tensor, generator: torch.Generator) -> Sensitivities:
    """Run the base forward and once backward.

    Args:
        model: with a `gated` controller.
        ids: token ids int64 [B, T].
        generator: draws tokens, on the CPU.
    """
    with torch.no_grad():
        hidden, step = begin(model, ids)
    entering, middle, changes, leaving = [], [], [], []
    for layer in range(model.config.num_layers):
        entering.append(hidden.detach())
        attended = model.executor.layers.attend(layer, hidden, step, FULL)
        middle.append(attended.detach())
        hidden = fed_in(model, FULL, layer, hidden, attended)
        if layer == 0:
            hidden = hidden.detach().requires_grad_()
        leaving.append(hidden)
        with torch.no_grad():
            cheapest = in_variant(model, controller_of(model).cheapest, layer, entering[-1], attended, step)
            changes.append(cheapest - hidden)
    logits = model.stack.logits(hidden)
    said = logits.float().log_softmax(dim=-1)
    drawn = torch.multinomial(said.detach().flatten(0, 1).exp().cpu(), 1, generator=generator).view(*ids.shape, 1)
    of_drawn = said.gather(-1, drawn.to(said.device))[:, model.config.keep_first_tokens :].sum()
    gradients = torch.autograd.grad(of_drawn, leaving)
    products = [(gradient * change).sum(dim=-1) for gradient, change in zip(gradients, changes, strict=True)]
    return Sensitivities(step, entering, middle, [product.square() / 2 for product in products], logits.detach())
