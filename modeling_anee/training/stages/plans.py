"""Plans by a greedy search: what to run cheaper, or leave out, next, with bridges in place.

Starting from everything processed in full, take the step that adds least KL to the base per cost saved, again and again: one
layer on to a cheaper action, or the head on to a cheaper variant. Each step gives one plan, and plans are nested. Gains are
measured lazily: one that was measured under an earlier plan is measured again only when it comes first in the queue (Minoux,
1978), as they mostly grow. Steps that cost next to nothing, as most to fewer bits, are taken without another look.
"""

import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...actions import NONE, PROCESS
from ...controller_learned import allowed_actions
from ...data.files import write_file
from ...evaluation.rollout import begin, run_layers, with_plan
from ...modeling_anee import AneeForCausalLM
from ..losses import kl_divergence
from ..run import Run


NAME = "plans"
NEGLIGIBLE = 1e-3  # nats per cost of the whole model


@dataclass
class Search:
    """Where the greedy search stands. A plan here is the action of each layer, and at last the variant of the head, [L + 1].

    Args:
        plan: the current one.
        plans: every plan so far, in short.
        loss: KL of the current one to the base, nats.
        queue: (KL added per cost saved, place in the plan, what comes there, number of steps made when it was measured, KL).
        first: KL that each step adds alone: [place, what comes there, KL].
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
        self.settled: list[int] = []
        self.start, self.step = begin(model, windows)
        self.layers = model.config.num_layers
        self.target = model.stack.logits(self._run([PROCESS] * self.layers))

    @torch.no_grad()
    def settle(self, plan: list[int]) -> None:
        """Make a plan the current one; it may end with the variant of the head, else that is full."""
        self.settled = list(plan)
        self.plan, self.head = plan[: self.layers], (plan[self.layers :] or [0])[0]
        self.entering: list[Tensor] = []
        self.final = self._run(self.plan, self.entering)

    @torch.no_grad()
    def of(self, place: int, what: int) -> float:
        """KL of the current plan with another action at one layer, or another head; mean over tokens, nats."""
        hidden, head = (self.final, what) if place == self.layers else (self.hidden(place, what), self.head)
        name = self.model.config.table.heads[head]
        # Row by row: logits of all would not fit beside each other.
        rows = zip(self.target, hidden, strict=True)
        lost = [kl_divergence(target, self.model.stack.logits(row, name)).mean() for target, row in rows]
        return float(torch.stack(lost).mean())

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

    def loss_of(place: int, what: int) -> float:
        if loss.settled != search.plan:
            loss.settle(search.plan)
            search.loss = over_processes(loss.of(loss.layers, search.plan[-1])) if search.plans else 0.0
        return over_processes(loss.of(place, what))

    def over_processes(mine: float) -> float:
        own = torch.tensor(mine, dtype=torch.float64, device=run.device)
        return float(run.sum(own)) / run.accelerator.num_processes

    search = resume(run)
    measured = candidates(model)
    for step in run.track(len(measured), "greedy plans", len(search.plans)):
        if not search.first:
            search.first = [(place, what, loss_of(place, what)) for place, what in measured]
            search.queue = [
                (kl / saving(model, search.plan, place, what), place, what, 0, kl) for place, what, kl in search.first
            ]
            heapq.heapify(search.queue)
        if not choose(search, loss_of, model):
            break
        cost = plan_cost(model, search.plan)
        run.log(NAME, step, cost=cost, kl=search.loss)
        run.save(NAME, step + 1, {}, {"search": vars(search)})
        if cost <= settings.lowest_budget:
            break
    write_map(run, search)
    table, layers = model.config.table, model.config.num_layers
    plans = [[table[action] for action in table.plan(plan, layers)] for plan in search.plans]
    skipped = [layer for layer in range(layers) if any(not plan[layer].runs for plan in plans)]
    attending = [
        layer
        for layer in range(layers)
        if any(plan[layer].attention != NONE and plan[layer].feed_forward == NONE for plan in plans)
    ]
    return {"plans": search.plans, "bridge_layers": skipped, "ffn_bridge_layers": attending}


def shared_windows(run: Run, count: int) -> Tensor:
    """This process's equal share of the first windows, or all of them if they can't be shared equally: same mean."""
    windows = run.windows("choose")[:count]
    return windows if len(windows) % run.accelerator.num_processes else run.rows(windows)


def resume(run: Run) -> Search:
    """The search as it was last saved, or a new one."""
    saved = run.load(NAME)
    if saved is None:
        return Search(plan=[*[PROCESS] * run.model.config.num_layers, 0])
    search = Search(**saved[2]["search"])
    # JSON made lists of its tuples.
    search.queue = [(gain, layer, action, made, kl) for gain, layer, action, made, kl in search.queue]
    return search


def candidates(model: AneeForCausalLM) -> list[tuple[int, int]]:
    """Every step down from everything processed in full: (layer, action), or (number of layers, variant of the head)."""
    config, costs = model.config, model.costs
    allowed, start = allowed_actions(config), [*[PROCESS] * config.num_layers, 0]
    actions = [place for place, action in enumerate(config.table) if not action.leaves]
    steps = [(layer, action) for layer in range(config.num_layers) for action in actions if allowed[layer][action]]
    steps += [(config.num_layers, head) for head in range(len(costs.heads))]
    return [(place, what) for place, what in steps if saving(model, start, place, what) > 0]


def choose(search: Search, loss_of: Callable[[int, int], float], model: AneeForCausalLM) -> bool:
    """Take the best step down from the current plan; False where there is none."""
    made = len(search.plans)
    while search.queue:
        gain, place, what, when, kl = heapq.heappop(search.queue)
        saved = saving(model, search.plan, place, what)
        if saved <= 0:
            continue
        if gain < NEGLIGIBLE:
            kl = search.loss + max(gain, 0.0) * saved
        elif when != made:
            kl = loss_of(place, what)
            heapq.heappush(search.queue, ((kl - search.loss) / saved, place, what, made, kl))
            continue
        search.plan = [*search.plan[:place], what, *search.plan[place + 1 :]]
        search.loss = kl
        search.plans.append(model.config.table.text(search.plan[:-1], search.plan[-1]))
        return True
    return False


def saving(model: AneeForCausalLM, plan: list[int], place: int, what: int) -> float:
    """Cost that one step from a plan saves."""
    costs: Any = model.costs.heads if place == len(plan) - 1 else model.costs.layers[place]
    return float(costs[plan[place]] - costs[what])


def plan_cost(model: AneeForCausalLM, plan: list[int]) -> float:
    """Cost of a plan and its head."""
    actions, head = (torch.tensor([part], dtype=torch.uint8) for part in (plan[:-1], plan[-1]))
    return float(model.costs.of_plans(actions, head))


def write_map(run: Run, search: Search) -> None:
    """Keep what was measured beside the other results of the run: what each step loses alone, the cost that it saves, plans."""
    if run.accelerator.is_main_process:
        table, layers = run.model.config.table, run.model.config.num_layers
        start = [*[PROCESS] * layers, 0]
        alone = [
            ({"layer": place, "action": table.names[what]} if place < layers else {"head": table.heads[what]})
            | {"kl": kl, "saved": saving(run.model, start, place, what)}
            for place, what, kl in search.first
        ]
        write_file(run.folder / "plans.json", json.dumps({"alone": alone, "plans": search.plans}, indent=1) + "\n")
