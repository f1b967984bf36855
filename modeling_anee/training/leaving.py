"""What tokens that stay lose when others leave: they see keys and values of hidden states that went no further."""

import torch
from torch import Tensor

from ..evaluation.rollout import begin, processed, run_layers
from ..modeling_anee import AneeForCausalLM
from .losses import kl_divergence
from .mixing import controller_of
from .run import Run


SHARE = 0.1  # of the tokens that leave: those of which the base is surest


@torch.no_grad()
def missed_by_others(run: Run, windows: Tensor) -> Tensor:
    """What all others together lose by each token that leaves, at every exit: KL to the base, nats, float32 [E].

    Windows int64 [W, T], which processes share. It depends on nothing that is trained, so it is the same after an interruption.
    """
    sums = torch.zeros(2, len(controller_of(run.model).exit_layers), dtype=torch.float64, device=run.device)
    for ids in run.share(windows).split(1):
        sums += lost_by_others(run.model, ids)
    lost, left = run.sum(sums)
    return (lost / left.clamp(min=1.0)).float()


def lost_by_others(model: AneeForCausalLM, ids: Tensor) -> Tensor:
    """What those that stay lose at every exit, and how many leave, on token ids int64 [B, T]: float64 [2, E]."""
    controller, kept = controller_of(model), model.config.keep_first_tokens
    hidden, step = begin(model, ids)
    everything = processed(model, ids)
    entering: list[Tensor] = []
    hidden = run_layers(model, hidden, step, everything, range(model.config.num_layers), entering)
    target = model.stack.logits(hidden)
    sure = target.float().log_softmax(dim=-1).amax(dim=-1)
    sure[:, :kept] = -torch.inf
    leaves = sure > sure[:, kept:].quantile(1.0 - SHARE)
    sums = []
    for layer in controller.exit_layers:
        actions = everything.clone()
        actions[..., layer:][leaves.cpu()] = controller.leave
        rest = run_layers(model, entering[layer], step, actions, range(layer, model.config.num_layers))
        lost = kl_divergence(target, model.stack.logits(rest))
        sums.append(torch.stack((lost[~leaves].double().sum(), leaves.double().sum())))
    return torch.stack(sums, dim=-1)
