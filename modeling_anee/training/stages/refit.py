"""Bridges in closed form once more, with plans known: layer by layer, on the states that skipping really leads to.

The closed form of `closed_form.py` sees only states of the base, which a token that has skipped no longer has. Here the
base and several budgets' plans walk up the layers side by side. Where a plan leaves something out, the bridge is solved
for the way from the plan's own state to the base's next one, so it also mends what earlier bridges missed (error
compensation layer by layer, as in GPTQ, arXiv:2210.17323). One bridge serves all of the plans.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...actions import NONE, PROCESS
from ...evaluation.rollout import begin, run_layers, with_plan
from ...plans import plan_table
from ...step import Step
from ..run import Run
from .closed_form import BATCH_WINDOWS, Moments, fill


NAME = "refit"
Path = tuple[int, ...]  # actions at the layers below


@dataclass(frozen=True)
class Batch:
    """Token ids int64 [B, T] and the step to run them in."""

    ids: Tensor
    step: Step


@torch.no_grad()
def run_stage(run: Run) -> dict:
    """Solve every bridge that the plans of the budgets use, from the bottom up."""
    settings, model = run.settings(NAME), run.model
    share = run.share(run.windows("train")[: settings.windows]).to(run.device)
    begun = [(ids, *begin(model, ids)) for ids in share.split(BATCH_WINDOWS)] if len(share) else []
    batches = [Batch(ids, step) for ids, _, step in begun]
    plans = chosen_plans(run, settings.budgets)
    # Hidden states that enter a layer, by the actions that led there: plans share what they have in common.
    states: dict[Path, list[Tensor]] = {(): [hidden for _, hidden, _ in begun]}
    for layer in run.track(model.config.num_layers, "closed form along plans"):
        reached = {plan[: layer + 1] for plan in plans}
        base = (PROCESS,) * (layer + 1)
        target = advance(run, batches, states, base)
        for action in sorted({path[-1] for path in reached} - {PROCESS}):
            entering = [states[path[:-1]] for path in reached if path[-1] == action]
            solve_bridge(run, layer, action, batches, entering, target, settings.ridge)
        states = {base: target} | {path: advance(run, batches, states, path) for path in sorted(reached - {base})}
    return {}


def chosen_plans(run: Run, budgets: list[float]) -> list[Path]:
    """The plan of each budget, as actions by layer, and that of the base."""
    table = plan_table(run.model.config, run.model.costs, strict=True)
    chosen = table.choose(torch.tensor(budgets, dtype=torch.float64), torch.zeros(len(budgets), dtype=torch.int64))
    return [tuple(plan) for plan in chosen.tolist()] + [(PROCESS,) * run.model.config.num_layers]


def advance(run: Run, batches: list[Batch], states: dict[Path, list[Tensor]], path: Path) -> list[Tensor]:
    """Hidden states [B, T, D] of every batch after the last layer of a path."""
    layer, plan = len(path) - 1, torch.tensor(path, dtype=torch.uint8)
    entering = states[path[:-1]]
    return [
        run_layers(run.model, hidden, batch.step, with_plan(run.model, batch.ids, plan), range(layer, layer + 1))
        for hidden, batch in zip(entering, batches, strict=True)
    ]


def solve_bridge(
    run: Run, layer: int, action: int, batches: list[Batch], entering: list[list[Tensor]], target: list[Tensor], ridge: float
) -> None:
    """Set the bridge of an action at a layer to the best map from what enters it to the base's states after the layer.

    Args:
        run: gives model and processes.
        layer: which layer.
        action: its place among the actions; one that leaves something out.
        batches: what runs.
        entering: hidden states [B, T, D] that enter the layer, by path and batch.
        target: the base's hidden states after the layer, by batch.
        ridge: penalty.
    """
    model = run.model
    row = model.config.table[action]
    bridge = model.bridges.stand_in(row, layer)
    if bridge is None:
        return
    kept = model.config.keep_first_tokens
    moments = Moments(model.config.text_config.hidden_size, run.device)
    for hiddens in entering:
        for hidden, batch, wanted in zip(hiddens, batches, target, strict=True):
            if row.attention != NONE:
                hidden = model.executor.layers.attend(layer, hidden, batch.step, row.attention)
            moments.add(hidden[:, kept:].flatten(0, 1), (wanted - hidden)[:, kept:].flatten(0, 1))
    moments.inputs, moments.outputs = run.sum(moments.inputs), run.sum(moments.outputs)
    fill(bridge, moments, ridge)
