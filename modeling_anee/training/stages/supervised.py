"""The policy by imitation: what the teacher does at a random budget, told at the price that stands for that budget."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...controller import Observation
from ...controller_learned import LearnedController
from ..examples import Examples, read_examples
from ..optimise import train
from ..run import Run
from .probe import controller_of, probe_losses


NAME = "supervised"


def run_stage(run: Run) -> dict:
    """Cross-entropy against the teacher's actions; the probes go on learning beside it."""
    settings, model = run.settings(NAME), run.model
    controller, examples = controller_of(model), read_examples(run.folder, model)
    parameters = {name: p for name, p in run.own_parameters().items() if name.startswith("controller.")}

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(examples), (settings.batch_tokens,), generator=generator)
        drawn = torch.rand(settings.batch_tokens, generator=generator, dtype=torch.float64)
        chosen, drawn = run.rows(chosen), run.rows(drawn)
        budget = examples.budgets(drawn)
        loss, agreement = imitation(controller, examples, chosen, budget, model.costs, run.device)
        return loss + probe_losses(controller, examples, chosen, run.device).sum(), {"agreement": agreement}

    train(run, NAME, parameters, loss_of_step)
    return {}


def price_of(examples: Examples, budget: Tensor) -> Tensor:
    """Price that stands for the teacher's threshold: one unit of log(loss / saving) over what a layer can save, on the mean.

    The budget is float64 [N], and so is the price.
    """
    middle = examples.teacher.threshold(examples.budgets(torch.tensor([0.5], dtype=torch.float64)))
    savings = examples.ladder.savings.sum(dim=1)
    mean_saving = savings[savings > 0].mean()
    return (examples.teacher.threshold(budget) - middle).double() / mean_saving


def teacher_actions(examples: Examples, chosen: Tensor, budget: Tensor) -> Tensor:
    """What the teacher does with tokens `chosen` int64 [N] at budgets float64 [N]: int64 [N, L]."""
    return examples.ladder.taken(examples.scores[chosen], examples.teacher.threshold(budget))


def imitation(
    controller: LearnedController, examples: Examples, chosen: Tensor, budget: Tensor, costs, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of N tokens against the teacher, mean over layers that can be made cheaper; and the share that agrees.

    The tokens are `chosen` int64 [N], their budgets float64 [N]; both results are scalars.
    """
    actions = teacher_actions(examples, chosen, budget)
    price = price_of(examples, budget).to(device, torch.float32).view(-1, 1, 1)
    movable = examples.ladder.savings.sum(dim=1) > 0
    losses, agree = [], []
    for segment, (start, stop) in enumerate(controller.segments):
        free = movable[start:stop]
        if not free.any():
            continue
        seen = observation(controller, examples, chosen, budget, actions, segment, costs, device)
        worth = controller.logits(segment, seen) - price * costs.layers[start:stop].to(device, torch.float32)
        worth, target = worth[:, free].flatten(0, 1), actions[:, start:stop][:, free].flatten().to(device)
        losses.append(cross_entropy(worth, target, reduction="sum"))
        agree.append((worth.argmax(dim=-1) == target).float().sum())
    pairs = int(movable.sum()) * len(chosen)
    return torch.stack(losses).sum() / pairs, torch.stack(agree).sum() / pairs


def observation(
    controller: LearnedController,
    examples: Examples,
    chosen: Tensor,
    budget: Tensor,
    actions: Tensor,
    segment: int,
    costs,
    device: torch.device,
) -> Observation:
    """What a controller sees of tokens that took the teacher's actions so far."""
    index = torch.arange(len(chosen))
    spent = costs.of_heads(controller.heads(budget, index)) + controller.cost_before(segment)
    spent = spent + costs.of_actions(actions[:, : controller.segments[segment][0]])
    hidden, previous = (examples.states[i, chosen].to(device, torch.float32) for i in (segment + 1, segment))
    return Observation(hidden, previous, budget, spent, index, _no_logits)


def _no_logits(hidden: Tensor) -> Tensor:
    raise RuntimeError("a learned controller does not ask the head")
