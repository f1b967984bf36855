"""The stages of a default recipe, listed once: what each needs, how its time grows, and what its section says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .recipe import STAGE_NAMES
from .speed import Speed


PLANS = "plans"  # the stage that finds plans
BATCH_WINDOWS = 2  # of a step
EPOCHS = 4  # how often a stage of steps sees its text at most
PLAN_RUNS = 4  # runs of half the stack for each layer, by the greedy search: 2 at first, the others as its queue asks
STATES = 2**32  # bytes of hidden states that `refit` keeps at most
# What is spent on the layers; the head comes on top of it.
ROUTED = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
CALIBRATED = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45)
LOWEST = 0.38  # plans are sought a little below the lowest budget, so that it has one


@dataclass(frozen=True)
class Shape:
    """What a default recipe follows from, of a base.

    Args:
        layers: how many.
        hidden_size: width of the hidden states.
        context: tokens that the base takes; None if it does not say.
        head: cost of the head, as a share of the whole model.
    """

    layers: int
    hidden_size: int
    context: int | None
    head: float

    def budgets(self, shares: Sequence[float]) -> list[float]:
        """Budgets of the whole model that spend these shares on its layers."""
        return [round(self.head + (1.0 - self.head) * share, 4) for share in shares]


@dataclass(frozen=True)
class DefaultStage:
    """A stage whose windows or steps are to be counted.

    Args:
        text: the part that it reads.
        share: of the time.
        least: windows or steps below which it is of no use.
        most: windows or steps above which more add little.
        seconds: of the whole stage besides them, and of each.
        section: of the recipe, for a number of them.
        needs: the stages that must come before.
        steps: whether they are steps.
    """

    text: str
    share: float
    least: Callable[[Shape, Speed], int]
    most: Callable[[Shape, Speed], int]
    seconds: Callable[[Shape, Speed], tuple[float, float]]
    section: Callable[[int, Shape], dict[str, Any]]
    needs: tuple[str, ...] = ()
    steps: bool = False


def _regressed(shape: Shape, speed: Speed) -> int:
    """Windows that have eight tokens for each input of a bridge; with two, bridges fit little else than these tokens."""
    return -(-8 * shape.hidden_size // speed.length)


def _kept(shape: Shape, speed: Speed) -> int:
    """Windows whose hidden states along every plan fit beside each other."""
    each = (len(ROUTED) + 1) * speed.length * shape.hidden_size * 4
    return max(_regressed(shape, speed), min(256, STATES // each))


def _measured_plans(shape: Shape, speed: Speed) -> tuple[float, float]:
    # Each of a layer's two actions alone, then some of them again for every layer that is given up; from that layer on.
    half = (0.5 * (1.0 - shape.head) + shape.head) * speed.forward
    return 0.0, shape.layers * (PLAN_RUNS * half + (1.0 - shape.head) * speed.forward)


def _tuning(cost: float, rate: float) -> DefaultStage:
    """A stage of steps along plans, each of which costs so many measured ones a window."""
    return DefaultStage(
        text="train",
        share=0.25,
        least=lambda shape, speed: 10,
        most=lambda shape, speed: 10_000,
        seconds=lambda shape, speed: (0.0, BATCH_WINDOWS * cost * speed.step),
        section=lambda steps, shape: _steps(steps, rate) | {"budgets": shape.budgets((ROUTED[-1], ROUTED[0]))},
        needs=(PLANS,),
        steps=True,
    )


def _steps(steps: int, rate: float) -> dict[str, Any]:
    return {"steps": steps, "batch_windows": BATCH_WINDOWS, "learning_rate": rate}


# Learning rates are those of the shipped artifact's recipe. Of a few minutes, those that solve for bridges are spent best: with
# four times their windows and half the steps, a fit of SmolLM2-135M in 5 minutes lost 15 to 34 % less (nats, at three budgets).
DEFAULT_STAGES: dict[str, DefaultStage] = {
    "closed_form": DefaultStage(
        text="train",
        share=0.10,
        least=_regressed,
        most=lambda shape, speed: max(256, _regressed(shape, speed)),
        seconds=lambda shape, speed: (2 * shape.layers * speed.solve, 1.5 * speed.forward),
        section=lambda windows, shape: {"windows": windows, "ridge": 0.001},
    ),
    PLANS: DefaultStage(
        text="choose",
        share=0.12,
        least=lambda shape, speed: 1,
        most=lambda shape, speed: 8,
        seconds=_measured_plans,
        section=lambda windows, shape: {"windows": windows, "lowest_budget": shape.budgets((LOWEST,))[0]},
    ),
    "refit": DefaultStage(
        text="train",
        share=0.20,
        least=_regressed,
        most=_kept,
        seconds=lambda shape, speed: (shape.layers * speed.solve, 4.5 * speed.forward),
        section=lambda windows, shape: {"windows": windows, "ridge": 0.001, "budgets": shape.budgets(ROUTED[1:])},
        needs=(PLANS,),
    ),
    "bridges": _tuning(1.0, 0.0012),
    "routing": _tuning(1.2, 0.001),
    "exits": DefaultStage(
        text="train",
        share=0.03,
        least=lambda shape, speed: 5,
        most=lambda shape, speed: 200,
        seconds=lambda shape, speed: (0.0, BATCH_WINDOWS * (1.0 + 3.0 * shape.head) * speed.forward),
        section=lambda steps, shape: _steps(steps, 0.002),
        steps=True,
    ),
    "calibration": DefaultStage(
        text="calibrate",
        share=0.05,
        least=lambda shape, speed: 2,
        most=lambda shape, speed: 64,
        seconds=lambda shape, speed: (0.0, len(CALIBRATED) * speed.forward),
        section=lambda windows, shape: {"windows": windows, "budgets": sorted(shape.budgets(CALIBRATED))},
        needs=(PLANS,),
    ),
}
BRIDGED = ("closed_form", "refit", "bridges", "routing")  # what a base without bridges has no use for


def chosen_stages(names: Sequence[str] | None) -> list[str]:
    """The named stages of the default recipe in their order; all of them for None.

    Raises:
        ValueError: one is not a stage of it, or needs another that is not named.
    """
    if names is None:
        return [name for name in STAGE_NAMES if name in DEFAULT_STAGES]
    for name in names:
        if name not in DEFAULT_STAGES:
            allowed = ", ".join(name for name in STAGE_NAMES if name in DEFAULT_STAGES)
            raise ValueError(f"--stages has {name!r}, which is not allowed: the stages of the default recipe are {allowed}")
        missing = [need for need in DEFAULT_STAGES[name].needs if need not in names]
        if missing:
            raise ValueError(f"--stages has {name!r}, which is not allowed without {', '.join(missing)}: add it")
    if not names:
        raise ValueError("--stages is empty: name at least one stage")
    return [name for name in STAGE_NAMES if name in names]


def anee_fields(stages: Sequence[str], shape: Shape) -> dict[str, Any]:
    """Fields of `AneeConfig` for these stages, in proportion to those of the shipped artifact."""
    layers, size = shape.layers, shape.hidden_size
    fields: dict[str, Any] = {"controller": "plan", "min_layers": max(1, round(layers / 10))}
    if "routing" in stages:
        fields |= {"controller": "routed", "controller_hidden_sizes": [64], "router_budgets": shape.budgets(ROUTED)}
    if any(name in BRIDGED for name in stages):
        fields |= {"bridge_rank": max(1, size // 6), "ffn_bridge_rank": max(1, size // 9)}
    if "exits" in stages:
        fields |= {"exit_translator_rank": max(1, size // 9), "exit_layers": sorted({layers // 2, 3 * layers // 4})}
    return fields
