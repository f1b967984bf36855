"""The router of a `routed` controller, and the bridges once more, tuned together on the tokens that the router sends there.

Every step runs a batch with a plan for every token, most of them as the router would choose at a random budget. The
bridges learn from the KL to the base that results, the router learns to predict it: the mean of an exponential
distribution, so that what counts is the expected loss and not its logarithm. The router sees standardised hidden states
while it learns; at the end that is folded into its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...bridges import normalised
from ...budget import TOLERANCE
from ...controller_routed import RoutedController
from ...evaluation.rollout import begin, logits_of, run_layers, with_plan
from ...evaluation.rollout import run as run_tokens
from ...modeling_anee import AneeForCausalLM
from ...plans import listed_plans
from ...step import Step
from ..kinds import controller_as
from ..losses import kl_divergence
from ..optimise import batch_of, train
from ..run import Run


NAME = "routing"
EXPLORE = 0.15  # share of the steps in which tokens take random plans
WEIGHT = 0.05  # of the router's loss: it has gradients of its own, but the norm is clipped over all
STANDARD_WINDOWS = 8
MEAN_WINDOWS = 2
SMALLEST = 1e-6  # of standard deviations and KL
ITERATIONS = 40


@dataclass(frozen=True)
class Standard:
    """Mean and 1 / standard deviation of what the router reads, float32 [D]."""

    mean: Tensor
    scale: Tensor

    def predict(self, controller: RoutedController, hidden: Tensor) -> Tensor:
        """Logarithm of the loss of each plan, hidden states [..., D] -> [..., K]."""
        return controller.predictor((normalised(hidden) - self.mean) * self.scale)

    @torch.no_grad()
    def fold(self, controller: RoutedController) -> None:
        """Let the controller do the same with hidden states as they are."""
        first, _ = ends_of(controller)
        first.weight.mul_(self.scale)
        first.bias.sub_(first.weight @ self.mean)

    @torch.no_grad()
    def unfold(self, controller: RoutedController) -> None:
        """The reverse, to go on with a controller that has learned."""
        first, _ = ends_of(controller)
        first.bias.add_(first.weight @ self.mean)
        first.weight.div_(self.scale)


def run_stage(run: Run) -> dict:
    """Tune bridges and router for `steps` steps of `batch_windows` windows; returns the plans that it chooses among."""
    settings, model = run.settings(NAME), run.model
    controller = controller_of(model)
    trained = ("bridges.skip.", "bridges.skip_ffn.", "controller.predictor.")
    parameters = {name: p for name, p in run.own_parameters().items() if name.startswith(trained)}
    windows = run.windows("train")
    before = run.recipe.stages.bridges
    seen = before.steps * before.batch_windows if before else 0  # go on with text that the bridges have not seen
    standard = standard_of(model, windows[:STANDARD_WINDOWS].to(run.device))
    learned = has_learned(controller)
    # At first a router tells no token from another and would send all of them the same way.
    warmup = 0 if learned else settings.warmup * settings.steps
    budgets = settings.budgets or budgets_of(controller)
    if run.load(NAME) is None:
        if learned:
            standard.unfold(controller)
        start_from_means(model, standard, windows[:MEAN_WINDOWS].to(run.device))

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch_of(windows, settings, step, run, seen)
        explores = step < warmup or float(torch.rand(1, generator=generator)) < EXPLORE
        budget = None if explores else draw_budget(budgets, generator)
        return losses(model, standard, ids, budget, generator)

    train(run, NAME, parameters, loss_of_step)
    standard.fold(controller)
    return places_of(model)


def places_of(model: AneeForCausalLM) -> dict[str, list[int]]:
    """Where the plans that the router has learned about stand among those of the configuration, if all of them do."""
    known = [*zip(*listed_plans(model.config), strict=True)]
    ways = [*zip(*(part.tolist() for part in controller_of(model).ways), strict=True)]
    listed = model.config.plans and all(way in known for way in ways)
    return {"router_plans": [known.index(way) for way in ways]} if listed else {}


def budgets_of(controller: RoutedController) -> tuple[float, float]:
    """Costs of the cheapest plan and of the dearest that leaves something out.

    Raises:
        ValueError: none does.
    """
    cheaper = controller.plan_costs[controller.plan_costs < controller.plan_costs[0] - TOLERANCE]
    if len(cheaper) == 0:
        raise ValueError("no plan of the router leaves anything out: seek cheaper plans, or name lower router_budgets")
    return float(cheaper.min()), float(cheaper.max())


def draw_budget(budgets: Sequence[float], generator: torch.Generator) -> Tensor:
    """A budget between the lowest and the highest, float64 [1]; low ones have the larger losses, and so count for more."""
    low, high = budgets
    return low + (high - low) * torch.rand(1, generator=generator, dtype=torch.float64)


def has_learned(controller: RoutedController) -> bool:
    """Whether it tells one token from another."""
    _, last = ends_of(controller)
    return bool(last.weight.any())


def ends_of(controller: RoutedController) -> tuple[nn.Linear, nn.Linear]:
    """The predictor's first and last layers, which are the same if it has no hidden one."""
    first, last = controller.predictor[0], controller.predictor[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return first, last


def controller_of(model: AneeForCausalLM) -> RoutedController:
    """The controller, if it routes.

    Raises:
        ValueError: another kind.
    """
    return controller_as(model, RoutedController, "routed", "no router")


@torch.no_grad()
def standard_of(model: AneeForCausalLM, ids: Tensor) -> Standard:
    """What standardises the hidden states of token ids [B, T] that enter the decision."""
    seen = normalised(entering(model, ids).flatten(0, 1))
    return Standard(seen.mean(dim=0), 1.0 / (seen.std(dim=0) + SMALLEST))


@torch.no_grad()
def entering(model: AneeForCausalLM, ids: Tensor) -> Tensor:
    """Hidden states that the router reads of token ids [B, T], kept first tokens left out, [B, T - kept, D]."""
    return until_routed(model, ids)[0][:, model.config.keep_first_tokens :]


@torch.no_grad()
def until_routed(model: AneeForCausalLM, ids: Tensor) -> tuple[Tensor, Step]:
    """Token ids [B, T] through the layers that all plans begin with, [B, T, D], and the step to go on in."""
    controller = controller_of(model)
    hidden, step = begin(model, ids)
    return run_layers(model, hidden, step, with_plan(model, ids, controller.plans[0]), range(controller.start)), step


@torch.no_grad()
def start_from_means(model: AneeForCausalLM, standard: Standard, ids: Tensor) -> None:
    """Let what the router says of each plan be right in the mean over token ids [B, T]: steps alone would move it slowly.

    One that has learned goes on to tell tokens apart as it does; its plans may be others than those that it learned with.
    """
    controller = controller_of(model)
    target = model.stack.logits(run_tokens(model, ids))
    means = []
    for plan, head in zip(controller.plans, controller.heads, strict=True):
        hidden = run_tokens(model, ids, with_plan(model, ids, plan))
        means.append(float(kl_divergence(target, logits_of(model, hidden, head.expand(ids.shape))).mean()))
    # Beside tokens that leave something out, those that don't lose a little too.
    means[0] = max(means[0], min(means[1:]) / 2)
    said = standard.predict(controller, entering(model, ids)).flatten(0, 1).exp().mean(dim=0)
    _, last = ends_of(controller)
    last.bias.add_((torch.tensor(means).to(said).clamp(min=SMALLEST) / said).log())


def losses(
    model: AneeForCausalLM, standard: Standard, ids: Tensor, budget: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a step minimises, and its parts for the log.

    Args:
        model: with a `routed` controller.
        standard: of what the router reads.
        ids: token ids int64 [B, T].
        budget: mean cost of the batch as the router would reach it, float64 [1]; None for random plans.
        generator: draws random plans.
    """
    controller, kept = controller_of(model), model.config.keep_first_tokens
    with torch.no_grad():
        target = model.stack.logits(run_tokens(model, ids))[:, kept:]
    hidden, step = until_routed(model, ids)
    predicted = standard.predict(controller, hidden[:, kept:])
    chosen = choose(predicted.detach(), controller.plan_costs, budget, generator)
    actions = controller.plans[nn.functional.pad(chosen, (kept, 0))]  # the first plan leaves nothing out
    hidden = run_layers(model, hidden, step, actions, range(controller.start, actions.shape[-1]))
    hidden = model.executor.translate(hidden, actions)[:, kept:]
    kl = kl_divergence(target, logits_of(model, hidden, controller.heads[chosen]))
    expected = predicted.gather(-1, chosen.to(ids.device).unsqueeze(-1)).squeeze(-1)
    misfit = (kl.detach() * (-expected).exp() + expected).mean()
    cost = controller.plan_costs[chosen].mean().to(kl)
    return kl.mean() + WEIGHT * misfit, {"kl": kl.mean(), "misfit": misfit, "cost": cost}


def choose(predicted: Tensor, costs: Tensor, budget: Tensor | None, generator: torch.Generator) -> Tensor:
    """Plans int64 [B, T] on the CPU for predicted log losses [B, T, K], at the price that meets the budget; or random."""
    if budget is None:
        return torch.randint(predicted.shape[-1], predicted.shape[:-1], generator=generator)
    loss = predicted.double().exp().cpu()
    low, high = torch.tensor(-15.0, dtype=torch.float64), torch.tensor(15.0, dtype=torch.float64)
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        chosen = (loss + middle.exp() * costs).argmin(dim=-1)
        if costs[chosen].mean() > budget:
            low = middle
        else:
            high = middle
    return chosen
