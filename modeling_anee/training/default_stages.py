"""The stages of a default recipe, listed once: what each needs, how its time grows, and what its section says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.uniform import PRECISIONS
from .shape import Shape
from .speed import Speed
from .stages.routers import MEASURED as MEASURED_CAPACITIES
from .stages.routers import WINDOWS as MEASURED_WINDOWS


PLANS = "plans"  # the stage that finds plans
WITHOUT_DATA = ("corrections", PLANS)  # stages for which a little text that the base samples is enough
# The stages of each kind of controller, in their order.
STAGES_OF = {
    "routed": ("corrections", "closed_form", PLANS, "refit", "bridges", "routing", "calibration"),
    "gated": ("closed_form", "flips", "routers", "gates", "calibration"),
}
# What plans are sought over: few, since each costs a look at every layer.
ACTIONS = ("INT8", "INT4")
BRIDGED_ACTIONS = (*ACTIONS, "INT4_SKIP_FFN", "SKIP_INT4")
BATCH_WINDOWS = 2  # of a step
CAPACITIES = (0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97)
LOOKS = 2  # for each of them, about as many as were counted
FLIPPED_LAYERS = 1  # of each window
ROUTER_WIDTH = 64  # of its hidden layer
EPOCHS = 4  # how often a stage of steps sees its text at most
# Runs of half the stack for each layer after the first look at its actions, by the greedy search, about as many as were counted
# on SmolLM2-135M: where layers are left out, others are looked at again and again.
LATER_RUNS, LATER_RUNS_BRIDGED = 2, 5
STATES = 2**32  # bytes of hidden states that `refit` keeps at most
# What bridges leave of the layers in 4 bits; the head, in 4 too, comes on top of it.
SHARES = (1.0, 0.92, 0.85, 0.78, 0.7)
LOWEST = 0.68  # plans are sought a little below the lowest budget, so that it has one


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
        measures: windows of the part to choose on that it measures on too.
    """

    text: str
    share: float
    least: Callable[[Shape, Speed], int]
    most: Callable[[Shape, Speed], int]
    seconds: Callable[[Shape, Speed], tuple[float, float]]
    section: Callable[[int, Shape], dict[str, Any]]
    needs: tuple[str, ...] = ()
    steps: bool = False
    measures: int = 0


def _regressed(shape: Shape, speed: Speed) -> int:
    """Windows that have eight tokens for each input of a bridge; with two, bridges fit little else than these tokens."""
    return -(-8 * shape.hidden_size // speed.length)


def _kept(shape: Shape, speed: Speed) -> int:
    """Windows whose hidden states along every plan fit beside each other."""
    each = (len(SHARES) + 1) * speed.length * shape.hidden_size * 4
    return max(_regressed(shape, speed), min(256, STATES // each))


def _measured_plans(shape: Shape, speed: Speed) -> tuple[float, float]:
    # Each action of each layer alone, from that layer on; then some again, when most layers are in fewer bits.
    full, cheap = (0.5 * (1.0 + shape.head) * forward for forward in (speed.forward, speed.cheap))
    later = LATER_RUNS_BRIDGED if shape.bridged else LATER_RUNS
    return 2 * speed.prepare, shape.layers * (shape.actions * full + later * cheap) + speed.length * speed.sample


def _read(speed: Speed) -> float:
    """Seconds of one window that the base reads, and samples first where there is no text."""
    return speed.forward + speed.length * speed.sample


def _flipped(shape: Shape, speed: Speed) -> int:
    """Windows that have four tokens for each input of a router, and in which every layer is flipped once."""
    return max(-(-shape.layers // FLIPPED_LAYERS), -(-4 * shape.hidden_size // speed.length))


def _measured_routers(speed: Speed) -> float:
    """Seconds to measure what routers lose, before their steps and after: the base, then each capacity."""
    return 2 * MEASURED_WINDOWS * (1 + 2 * len(MEASURED_CAPACITIES)) * speed.forward


def _step_of_gates(shape: Shape, speed: Speed) -> float:
    """Seconds of a window: the base, twice by the routers; then the head at each exit, with gradients, for some tokens."""
    return (3.0 + 4.0 * shape.head) * speed.forward


def _sought(windows: int, shape: Shape) -> dict[str, Any]:
    """Without bridges there is a cheapest plan soon, which all steps lead to."""
    return {"windows": windows, "lowest_budget": shape.budgets((LOWEST,))[0] if shape.bridged else 0.0}


def _calibrated(shape: Shape) -> list[float]:
    """Budgets of bits alone, from the base down to where bridges begin, and those of bridges."""
    bits = [(1.0 + shape.in_8_bits) / 2, shape.in_8_bits, (shape.in_8_bits + shape.in_4_bits) / 2, shape.in_4_bits]
    return sorted({*(round(budget, 4) for budget in bits), *shape.budgets(SHARES if shape.bridged else ())})


def _calibrated_at(shape: Shape) -> dict[str, Any]:
    return {"capacities": [*CAPACITIES]} if shape.gated else {"budgets": _calibrated(shape)}


def _seconds_calibrated(shape: Shape, speed: Speed) -> float:
    """Of a window: the base and the curve; for capacities, which are looked for, some runs more each."""
    if shape.gated:
        return (1.0 + (LOOKS + 1) * len(CAPACITIES)) * speed.forward
    return speed.forward + len(_calibrated(shape)) * speed.cheap


# Learning rates are those of the shipped artifact's recipe. Of a few minutes, those that solve for bridges are spent best: with
# four times their windows and half the steps, a fit of SmolLM2-135M in 5 minutes lost 15 to 34 % less (nats, at three budgets).
DEFAULT_STAGES: dict[str, DefaultStage] = {
    "corrections": DefaultStage(
        text="train",
        share=0.03,
        least=lambda shape, speed: 2,
        most=lambda shape, speed: 8,
        # Weights in fewer bits are made again at the end.
        seconds=lambda shape, speed: (2 * speed.prepare + 4 * shape.layers * speed.solve, _read(speed)),
        section=lambda windows, shape: {"windows": windows},
    ),
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
        most=lambda shape, speed: 8 if shape.bridged else 2,
        seconds=_measured_plans,
        section=_sought,
    ),
    "refit": DefaultStage(
        text="train",
        share=0.20,
        least=_regressed,
        most=_kept,
        seconds=lambda shape, speed: (shape.layers * speed.solve, 1.5 * speed.forward + 3.0 * speed.cheap),
        section=lambda windows, shape: {"windows": windows, "ridge": 0.001, "budgets": shape.budgets(SHARES[1:])},
        needs=(PLANS,),
    ),
    "bridges": DefaultStage(
        text="train",
        share=0.15,
        least=lambda shape, speed: 10,
        most=lambda shape, speed: 10_000,
        seconds=lambda shape, speed: (0.0, BATCH_WINDOWS * speed.step),
        section=lambda steps, shape: {
            "steps": steps,
            "batch_windows": BATCH_WINDOWS,
            "learning_rate": 0.0012,
            "budgets": shape.budgets((SHARES[-1], SHARES[0])),
        },
        needs=(PLANS,),
        steps=True,
    ),
    "routing": DefaultStage(
        text="train",
        share=0.20,
        least=lambda shape, speed: 10,
        most=lambda shape, speed: 10_000,
        # Each of some plans at first; then the layers before the router twice.
        seconds=lambda shape, speed: (2.0 * speed.forward + 24.0 * speed.cheap, 1.1 * BATCH_WINDOWS * speed.step),
        section=lambda steps, shape: {"steps": steps, "batch_windows": BATCH_WINDOWS, "learning_rate": 0.001},
        needs=(PLANS,),
        steps=True,
    ),
    "flips": DefaultStage(
        text="train",
        share=0.25,
        least=_flipped,
        most=lambda shape, speed: 16 * _flipped(shape, speed),
        # The base and its backward; then half of the stack and the head for each layer.
        seconds=lambda shape, speed: (
            shape.layers * speed.solve,
            (2.5 + FLIPPED_LAYERS * 0.5 * (1.0 + shape.head)) * speed.forward,
        ),
        section=lambda windows, shape: {"windows": windows, "layers": FLIPPED_LAYERS},
    ),
    "routers": DefaultStage(
        text="train",
        share=0.35,
        least=lambda shape, speed: 10,
        most=lambda shape, speed: 10_000,
        seconds=lambda shape, speed: (_measured_routers(speed), BATCH_WINDOWS * speed.step),
        section=lambda steps, shape: {"steps": steps, "batch_windows": BATCH_WINDOWS, "learning_rate": 0.0006},
        needs=("flips",),
        steps=True,
        measures=MEASURED_WINDOWS,
    ),
    "gates": DefaultStage(
        text="train",
        share=0.20,
        least=lambda shape, speed: 10,
        most=lambda shape, speed: 10_000,
        seconds=lambda shape, speed: (_measured_routers(speed), BATCH_WINDOWS * _step_of_gates(shape, speed)),
        section=lambda steps, shape: {"steps": steps, "batch_windows": BATCH_WINDOWS, "learning_rate": 0.002},
        needs=("flips",),
        steps=True,
        measures=MEASURED_WINDOWS,
    ),
    "calibration": DefaultStage(
        text="calibrate",
        share=0.05,
        least=lambda shape, speed: 2,
        most=lambda shape, speed: 64,
        seconds=lambda shape, speed: (speed.prepare, _seconds_calibrated(shape, speed)),
        section=lambda windows, shape: {"windows": windows} | _calibrated_at(shape),
        needs=(PLANS, "flips"),
    ),
}
BRIDGED = (
    "closed_form",
    "refit",
    "bridges",
    "routing",
    "flips",
    "routers",
    "gates",
)  # what a base without bridges has no use for


def chosen_stages(names: Sequence[str] | None, controller: str = "routed") -> list[str]:
    """The named stages of the default recipe for a kind of controller in their order; all of them for None.

    Raises:
        ValueError: one is not a stage of it, or needs another that is not named.
    """
    known = STAGES_OF[controller]
    if names is None:
        return [*known]
    for name in names:
        if name not in known:
            raise ValueError(
                f"--stages has {name!r}, which is not allowed: the stages of the default recipe are {', '.join(known)}"
            )
        missing = [need for need in DEFAULT_STAGES[name].needs if need in known and need not in names]
        if missing:
            raise ValueError(f"--stages has {name!r}, which is not allowed without {', '.join(missing)}: add it")
    if not names:
        raise ValueError("--stages is empty: name at least one stage")
    return [name for name in known if name in names]


def anee_fields(stages: Sequence[str], layers: int, hidden_size: int) -> dict[str, Any]:
    """Fields of `AneeConfig` for these stages, over a base of so many layers and such a size."""
    if "flips" in stages:
        return _gated_fields(hidden_size)
    routed = (
        {"controller": "routed", "controller_hidden_sizes": [ROUTER_WIDTH]} if "routing" in stages else {"controller": "plan"}
    )
    fields: dict[str, Any] = {**routed, "min_layers": max(1, round(layers / 10)), "precisions": [*PRECISIONS]}
    if not any(name in BRIDGED for name in stages):
        return fields | {"controller_actions": [*ACTIONS]}
    ranks = {"bridge_rank": max(1, hidden_size // 6), "ffn_bridge_rank": max(1, hidden_size // 9)}
    return fields | {"controller_actions": [*BRIDGED_ACTIONS]} | ranks


def _gated_fields(hidden_size: int) -> dict[str, Any]:
    rank = max(1, hidden_size // 9)
    return {
        "controller": "gated",
        "min_layers": 0,
        "keep_last_layers": 0,
        "precisions": [*PRECISIONS],
        "ffn_bridge_rank": rank,
        "exit_translator_rank": rank,
    }
