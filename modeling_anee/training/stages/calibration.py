"""Calibration: the dial's setting for every budget, on held-out text, and the curve that results.

Each setting is found by root finding on the mean realised cost; the curve (cost, perplexity ratio, standard error) is
measured on the same windows and kept in the artifact's config.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...budget import Dial
from ...controller_confidence import ConfidenceController
from ...controller_gated import GatedController
from ...controller_learned import LearnedController
from ...controller_refine import RefineController
from ...controller_routed import RoutedController
from ...data.encoding import start_tokens
from ...data.windows import Window
from ...evaluation.perplexity import Scores, ratio, score
from ...evaluation.rollout import begin, logits_of, with_plan
from ...evaluation.rollout import run as run_tokens
from ...executor import Executor
from ...modeling_anee import AneeForCausalLM
from ..gate_calibration import calibrate_gates
from ..run import Run
from . import routing


NAME = "calibration"
# Between these the dial is turned: a price that forbids, or forces, every action; the logarithm of one; a threshold of
# confidence; a doubt in nats.
SETTINGS = {"learned": (-200.0, 200.0), "routed": (-12.0, 12.0), "confidence": (0.0, 1.0), "refine": (-30.0, 12.0)}
ROUNDS = 12  # evaluations at most
HALVINGS = 2
TOLERANCE = 0.003  # of the mean cost, as a share of the highest that the dial decides about
NEAR_TOP = 0.98  # of that, where it comes to a stand: the price at which no token leaves anything out is far off
BATCH_WINDOWS = 4


def run_stage(run: Run) -> dict:
    """Find the settings, then measure the curve; returns the calibration."""
    settings, model = run.settings(NAME), run.model
    windows = run.windows("calibrate")[: settings.windows].to(run.device)
    gated = isinstance(model.controller, GatedController)
    if gated != bool(settings.capacities):
        asked = "capacities" if settings.capacities else "budgets"
        raise ValueError(f"controller={model.config.controller!r} is not calibrated at {asked}: a 'gated' one is at capacities")
    if isinstance(model.controller, GatedController):
        table = calibrate_gates(run, windows, settings.capacities, NAME)
        model.controller.with_dial_in_place(model.controller.dial_of(table))
    else:
        table = dial_table(run, windows, settings.budgets)
    return {"calibration": table | curve(run, windows, table["budgets"])}


def dial_table(run: Run, windows: Tensor, budgets: list[float]) -> dict[str, list]:
    """Settings of all budgets, for kinds that have some, on windows int64 [W, T]; the model's dial becomes theirs."""
    model, saved = run.model, run.load(NAME)
    found: dict[str, float] = {} if saved is None else saved[2]["found"]
    budgets = with_top(model, sorted(budgets))
    if model.config.controller in SETTINGS:
        at_once = {"routed": mean_costs_of_router, "refine": mean_costs_of_refinement}.get(model.config.controller)
        cost_of = partial(mean_cost, run, windows) if at_once is None else at_once(run, windows)
        for number in run.track(len(budgets), "calibrating", len(found)):
            found[str(budgets[number])] = find_setting(model, cost_of, budgets[number])
            run.save(NAME, number + 1, {}, {"found": found})
    table: dict[str, list[float]] = {"budgets": budgets}
    if found:
        table["settings"] = monotone([found[str(budget)] for budget in budgets], rising_of(model))
        controller_of(model).dial = Dial(table, neutral=0.0)  # as the artifact will have it, for the curve
    return table


def with_top(model: AneeForCausalLM, budgets: list[float]) -> list[float]:
    """Ascending budgets with the one from which on plans are fixed, if some are above it: there the dial comes to a stand."""
    top = top_of(model)
    known = budgets[-1] <= top or any(abs(budget - top) < TOLERANCE * top for budget in budgets)
    return budgets if known else sorted([*budgets, top])


def top_of(model: AneeForCausalLM) -> float:
    """The budget from which on nothing is decided by the dial."""
    return round(model.controller.top, 4) if isinstance(model.controller, RoutedController | RefineController) else 1.0


def controller_of(model: AneeForCausalLM) -> LearnedController | RoutedController | ConfidenceController | RefineController:
    """The model's controller, which has a dial.

    Raises:
        ValueError: it is of a kind without one.
    """
    if not isinstance(model.controller, LearnedController | RoutedController | ConfidenceController | RefineController):
        raise ValueError(f"controller={model.config.controller!r} has no dial to set; {', '.join(SETTINGS)} have one")
    return model.controller


def rising_of(model: AneeForCausalLM) -> bool:
    """Whether a higher setting costs more."""
    return model.config.controller == "confidence" and model.config.confidence_metric == "max_probability"


def find_setting(model: AneeForCausalLM, cost_of: Callable[[float, float], float], budget: float) -> float:
    """Setting at which the mean cost of a token, a function of budget and setting, is the budget, or the nearest one.

    Where the dial stands still it is that of a cost a little below.

    Raises:
        ValueError: a cost is not a finite number.
    """
    low, high = SETTINGS[model.config.controller]
    sign, top = 1.0 if rising_of(model) else -1.0, top_of(model)
    budget = budget if budget < top or top == 1.0 else NEAR_TOP * top

    def excess(setting: float) -> float:
        cost = cost_of(budget, setting)
        if not math.isfinite(cost):
            raise ValueError(f"budget {budget:g} can't be calibrated: at the setting {setting:g} the mean cost is {cost}")
        return sign * (cost - budget) / top

    return root(excess, low, high)


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is within `TOLERANCE` of 0, or the better end of the range if it has no root there.

    A few halvings, since the function is flat far out, then regula falsi with halved weights (Illinois).
    """
    at_low, at_high = -1.0, 1.0  # only the signs matter while halving
    for halving in range(ROUNDS):
        known = halving >= HALVINGS and abs(at_low) < 1.0 and abs(at_high) < 1.0
        middle = (low * at_high - high * at_low) / (at_high - at_low) if known else (low + high) / 2
        value = function(middle)
        if abs(value) <= TOLERANCE:
            return middle
        if value > 0:
            high, at_high, at_low = middle, value, at_low / 2 if known else at_low
        else:
            low, at_low, at_high = middle, value, at_high / 2 if known else at_high
    return middle


@torch.no_grad()
def mean_cost(run: Run, windows: Tensor, budget: float, setting: float) -> float:
    """Mean realised cost of a token of windows int64 [W, T] with the dial at a setting; the head is not run."""
    model, executor = run.model, executor_at(run.model, setting)
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for batch in run.share(windows).split(BATCH_WINDOWS):
        _, trace = executor.run(*begin(model, batch, budget))
        sums += torch.tensor([float(trace.cost.double().sum()), float(trace.valid.sum())], device=run.device)
    cost, tokens = run.sum(sums).tolist()
    return cost / tokens


def executor_at(model: AneeForCausalLM, setting: float) -> Executor:
    """An executor over the model's parts, whose controller has its dial at a setting; the model stays as it is."""
    model.prepare()  # the base may have been changed since it was wrapped
    controller = controller_of(model).with_dial(Dial({"budgets": [0.0], "settings": [setting]}, neutral=setting))
    return Executor(model.stack, controller, model.bridges, model.costs, model.config.table)


@torch.no_grad()
def mean_costs_of_router(run: Run, windows: Tensor) -> Callable[[float, float], float]:
    """The same of a `routed` controller without feedback, as a function: its losses don't depend on the setting."""
    model, controller = run.model, routing.controller_of(run.model)
    parts = [controller.losses(routing.entering(model, ids.unsqueeze(0))) for ids in run.share(windows)]
    if any(part.isnan().any() for part in parts):
        raise ValueError("no budget can be calibrated: what the router predicts of the text is not a number")
    losses = torch.cat([part.flatten(0, 1) for part in parts]) if parts else torch.zeros(0, len(controller.plans))
    kept = model.config.keep_first_tokens * len(windows) * float(controller.plan_costs[0])

    def cost_of(budget: float, setting: float) -> float:
        chosen = controller.choose(losses, torch.full((len(losses),), setting, dtype=torch.float64))
        return float(run.sum(controller.charges[chosen].sum().to(run.device)) + kept) / windows.numel()

    return cost_of


@torch.no_grad()
def mean_costs_of_refinement(run: Run, windows: Tensor) -> Callable[[float, float], float]:
    """The same of a `refine` controller, as if nobody saw who ran again: doubts don't depend on the setting then."""
    model, controller, kept = run.model, controller_of(run.model), run.model.config.keep_first_tokens
    assert isinstance(controller, RefineController)
    parts = []
    for ids in run.share(windows):
        hidden = run_tokens(model, ids.unsqueeze(0), with_plan(model, ids.unsqueeze(0), controller.first))[0, kept:]
        parts.append(controller.doubt(logits_of(model, hidden, controller.first_head.expand(len(hidden)))))
    doubts = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    if doubts.isnan().any():
        raise ValueError("no budget can be calibrated: the first plan predicts what is not a number")
    whole = controller.first_costs(kept) * len(windows)

    def cost_of(budget: float, setting: float) -> float:
        spent = controller.cost * len(doubts) + controller.charge * int((doubts > setting).sum())
        return (float(run.sum(torch.tensor(spent, dtype=torch.float64, device=run.device))) + whole) / windows.numel()

    return cost_of


def monotone(values: list[float], rising: bool) -> list[float]:
    """Values made monotone along the budgets by averaging neighbours that are out of order (isotonic regression)."""
    sign = 1.0 if rising else -1.0
    blocks: list[list[float]] = []  # [mean, count]
    for value in values:
        blocks.append([sign * value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * count) / (blocks[-1][1] + count), blocks[-1][1] + count]
    return [sign * mean for mean, count in blocks for _ in range(int(count))]


def curve(run: Run, windows: Tensor, budgets: list[float]) -> dict[str, list[float]]:
    """Cost, perplexity ratio to the base and, of several windows, its standard error at every budget.

    Processes share the budgets.
    """
    scored = [Window(ids.cpu(), max(len(start_tokens(run.tokenizer)), 1)) for ids in windows]
    base = score(run.model, scored, 1.0)
    names = ("cost", "perplexity_ratio", "standard_error")[: 2 if len(windows) == 1 else 3]
    rows = torch.zeros(len(budgets), len(names), dtype=torch.float64, device=run.device)
    own = run.share(torch.arange(len(budgets))).tolist()
    for number in run.track(len(own), "measuring the curve"):
        measured = point(score(run.model, scored, budgets[own[number]]), base)
        rows[own[number]] = rows.new_tensor(measured[: len(names)])
    table = run.sum(rows).tolist()
    return {name: [round(row[i], 5) for row in table] for i, name in enumerate(names)}


def point(scores: Scores, base: Scores) -> tuple[float, float, float | None]:
    """Cost, perplexity ratio, and its standard error, which a single window has not."""
    return (float(scores.mean_cost or 0.0), *ratio(scores, base))
