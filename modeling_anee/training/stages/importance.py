"""Importance map and greedy plans: what to leave out next, with bridges in place.

Starting from everything processed, take the (layer, action) that adds least KL to the base per cost saved, again and
again; each choice gives one plan, and plans are nested. Gains are measured lazily: one that was measured under an
earlier plan is measured again only when it comes first in the queue (Minoux, 1978), as they mostly grow.
"""

import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...actions import NONE, PROCESS
from ...controller_learned import allowed_actions
from ...data.files import write_file
from ...evaluation.rollout import begin, run_layers, with_plan
from ...modeling_anee import AneeForCausalLM
from ..losses import kl_divergence
from ..run import Run


NAME = "importance"


@dataclass
class Search:
    """Where the greedy search stands.

    Args:
        plan: action of each layer so far, [L].
        plans: every plan so far, in short.
        loss: KL of the plan to the base, nats.
        queue: (KL added per cost saved, layer, action, number of choices made when it was measured, KL of the whole plan).
        first: KL that each action adds alone: [layer, action, KL].
    """

    plan: list[int]
    plans: list[str] = field(default_factory=list)
    loss: float = 0.0
    queue: list[tuple[float, int, int, int, float]] = field(default_factory=list)
    first: list[tuple[int, int, float]] = field(default_factory=list)


class PlanLoss:
    """KL to the base of plans that differ from a current one at one layer; what comes before is computed once."""

    @torch.no_grad()
    def __init__(self, model: AneeForCausalLM, windows: Tensor) -> None:
        self.model, self.ids = model, windows
        self.start, self.step = begin(model, windows)
        self.layers = model.config.num_layers
        self.target = model.stack.logits(self._run([PROCESS] * self.layers))

    @torch.no_grad()
    def settle(self, plan: list[int]) -> None:
        """Make a plan the current one."""
        self.plan = plan
        self.entering: list[Tensor] = []
        self._run(plan, self.entering)

    @torch.no_grad()
    def of(self, layer: int, action: int) -> float:
        """KL of the current plan with another action at one layer, mean over tokens, nats."""
        # Row by row: logits of all would not fit beside each other.
        rows = zip(self.target, self.hidden(layer, action), strict=True)
        return float(torch.stack([kl_divergence(target, self.model.stack.logits(row)).mean() for target, row in rows]).mean())

    @torch.no_grad()
    def hidden(self, layer: int, action: int) -> Tensor:
        """Final hidden states [B, T, D] of the current plan with another action at one layer."""
        plan = [*self.plan[:layer], action, *self.plan[layer + 1 :]]
        return run_layers(self.model, self.entering[layer], self.step, self._actions(plan), range(layer, self.layers))

    def _run(self, plan: list[int], keep: list[Tensor] | None = None) -> Tensor:
        return run_layers(self.model, self.start, self.step, self._actions(plan), range(self.layers), keep)

    def _actions(self, plan: list[int]) -> Tensor:
        return with_plan(self.model, self.ids, torch.tensor(plan, dtype=torch.uint8))


def run_stage(run: Run) -> dict:
    """Find plans down to the lowest budget of the recipe; returns them, and which layers need which bridge."""
    settings, model = run.settings(NAME), run.model
    loss = PlanLoss(model, shared_windows(run, settings.windows).to(run.device))

    def loss_of(layer: int, action: int) -> float:
        own = torch.tensor(loss.of(layer, action), dtype=torch.float64, device=run.device)
        return float(run.sum(own)) / run.accelerator.num_processes

    search = resume(run)
    measured = [*candidates(model)]
    total = len({layer for layer, _ in measured})
    for step in run.track(total, "greedy plans", len(search.plans)):
        loss.settle(search.plan)
        if not search.queue:
            search.first = [(layer, action, loss_of(layer, action)) for layer, action in measured]
            search.queue = [(kl / saving(model, layer, action), layer, action, 0, kl) for layer, action, kl in search.first]
            heapq.heapify(search.queue)
        choose(search, loss_of, model)
        cost = plan_cost(model, search.plan)
        run.log(NAME, step, cost=cost, kl=search.loss)
        run.save(NAME, step + 1, {}, {"search": vars(search)})
        if cost <= settings.lowest_budget:
            break
    write_map(run, search)
    rows = [model.config.table[action] for action in search.plan]
    skipped = [layer for layer, row in enumerate(rows) if not row.runs]
    attending = [layer for layer, row in enumerate(rows) if row.attention != NONE and row.feed_forward == NONE]
    return {"plans": search.plans, "bridge_layers": skipped, "ffn_bridge_layers": attending}


def shared_windows(run: Run, count: int) -> Tensor:
    """This process's equal share of the first windows, or all of them if they can't be shared equally: same mean."""
    windows = run.windows("choose")[:count]
    return windows if len(windows) % run.accelerator.num_processes else run.rows(windows)


def resume(run: Run) -> Search:
    """The search as it was last saved, or a new one."""
    saved = run.load(NAME)
    if saved is None:
        return Search(plan=[PROCESS] * run.model.config.num_layers)
    search = Search(**saved[2]["search"])
    # JSON made lists of its tuples.
    search.queue = [(gain, layer, action, made, kl) for gain, layer, action, made, kl in search.queue]
    return search


def candidates(model: AneeForCausalLM) -> list[tuple[int, int]]:
    """Every (layer, action) that may be left out."""
    allowed = allowed_actions(model.config)
    cheaper = [place for place, action in enumerate(model.config.table) if place != PROCESS and not action.leaves]
    return [(layer, action) for layer in range(model.config.num_layers) for action in cheaper if allowed[layer][action]]


def choose(search: Search, loss_of: Callable[[int, int], float], model: AneeForCausalLM) -> None:
    """Take the best candidate; the other actions of its layer are dropped."""
    made = len(search.plans)
    while True:
        _, layer, action, when, kl = heapq.heappop(search.queue)
        if search.plan[layer] != PROCESS:
            continue
        if when == made:
            break
        kl = loss_of(layer, action)
        heapq.heappush(search.queue, ((kl - search.loss) / saving(model, layer, action), layer, action, made, kl))
    search.plan = [*search.plan[:layer], action, *search.plan[layer + 1 :]]
    search.loss = kl
    search.plans.append(model.config.table.text(search.plan))


def saving(model: AneeForCausalLM, layer: int, action: int) -> float:
    """Cost that an action saves at a layer."""
    costs = model.costs.layers[layer]
    return float(costs[PROCESS] - costs[action])


def plan_cost(model: AneeForCausalLM, plan: list[int]) -> float:
    """Cost of a plan."""
    return float(model.costs.of_plans(torch.tensor([plan], dtype=torch.uint8)))


def write_map(run: Run, search: Search) -> None:
    """Keep what was measured beside the other results of the run."""
    if run.accelerator.is_main_process:
        names = run.model.config.table.names
        alone = [{"layer": layer, "action": names[action], "kl": kl} for layer, action, kl in search.first]
        write_file(run.folder / "importance.json", json.dumps({"alone": alone, "plans": search.plans}, indent=1) + "\n")
