"""What plans cost on machines: milliseconds of a token and of a prompt by part, and joules, each with how it is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..plans import plan_table
from .analytic import Analytic, kv_bytes
from .description import Description
from .energy import EnergyModel
from .fitted import described, fitted
from .prediction import Predicted, Times
from .profile import Profile
from .workload import Counter, Workload


LEVELS = ("analytic", "fitted", "measured")


class Predictor(Protocol):
    """What tells times of plans."""

    def decode(self, load: Workload, batch: int, context: int) -> Times:
        """One token of every row."""

    def prefill(self, load: Workload, batch: int, tokens: int) -> Times:
        """Prompts of so many tokens each."""


@dataclass(frozen=True)
class Machine:
    """A machine that plans are simulated on.

    Args:
        description: of it.
        levels: what tells times, by how they are known.
        dtype: of the base.
    """

    description: Description
    levels: dict[str, Predictor]
    dtype: str

    @classmethod
    def described(cls, description: Description, dtype: str) -> "Machine":
        """One that is not here."""
        return cls(description, {"analytic": Analytic(description, dtype)}, dtype)

    @classmethod
    def profiled(cls, profile: Profile, energy: Description, description: Description | None = None) -> "Machine":
        """One that was measured.

        Args:
            profile: what was measured.
            energy: whose energy it is taken to need.
            description: of it; default: its roofline is what was measured.
        """
        known = described(profile, energy) if description is None else description
        dtype = profile.base.rpartition(" ")[2]
        levels: dict[str, Predictor] = {"analytic": Analytic(known, dtype)}
        levels |= {"fitted": fitted(profile, known), "measured": Predicted.measured(profile)}
        return cls(known, levels, dtype)


@dataclass(frozen=True)
class Case:
    """What is simulated.

    Args:
        batch: rows.
        context: tokens before the one that is decoded.
        prompt: tokens of a prompt.
    """

    batch: int
    context: int
    prompt: int


def plans_at(model: Any, budgets: Sequence[float]) -> dict[float, str]:
    """The dearest plan within each budget, in short; plans are the model's own, or those that any base has."""
    table = plan_table(model.config, model.costs)
    places = table.within(torch.tensor(list(budgets), dtype=torch.float64)).tolist()
    text = model.config.table.text
    return {
        budget: text(table.actions[place].tolist(), int(table.heads[place]))
        for budget, place in zip(budgets, places, strict=True)
    }


def simulate(counter: Counter, plans: dict[float, str], machines: Sequence[Machine], case: Case) -> list[dict[str, Any]]:
    """A row for every machine, budget and level, ready for JSON."""
    loads = {budget: counter.workload(plan) for budget, plan in plans.items()}
    cases = [(machine, budget, load) for machine in machines for budget, load in loads.items()]
    return [_row(machine, level, budget, load, case) for machine, budget, load in cases for level in machine.levels]


def _row(machine: Machine, level: str, budget: float, load: Workload, case: Case) -> dict[str, Any]:
    by, energy = machine.levels[level], EnergyModel(machine.description, machine.dtype)
    decode, prefill = by.decode(load, case.batch, case.context), by.prefill(load, case.batch, case.prompt)
    joules = energy.of_call(load, decode.total, case.batch, case.batch, case.batch * case.context)
    rows = case.batch * case.prompt
    prompt_joules = energy.of_call(load, prefill.total, rows, case.batch, rows)
    held = load.weight_bytes + case.batch * case.context * kv_bytes(load)
    return {
        "hardware": machine.description.name,
        "level": level,
        "budget": budget,
        "plan": load.plan,
        "decode_ms": decode.total,
        "tokens_per_second": 1e3 * case.batch / decode.total,
        "prefill_ms": prefill.total,
        "joules_per_token": joules / case.batch,
        "joules_per_prompt": prompt_joules / case.batch,
        "read_mb": held / 1e6,
        "fits": held <= machine.description.memory_gb.value * 1e9,
        "decode_parts_ms": decode.parts,
        "prefill_parts_ms": prefill.parts,
    }


def roofline(loads: Sequence[Workload], machine: Machine, rows: Sequence[int], profile: Profile | None) -> list[dict[str, Any]]:
    """The linear maps of plans on a machine's roofline, ready for JSON: operations a byte, and 1e9 operations a second."""
    roof, points = Analytic(machine.description, machine.dtype), []
    for kernel in {(one.name, one.variant): one for load in loads for one in load.kernels}.values():
        measured = None if profile is None else profile.map_of(kernel)
        for count in rows:
            moved = roof.memory_ms(kernel, count) * machine.description.bytes_per_ms
            known = {"analytic": roof.map_ms(kernel, count)}
            known |= {} if measured is None or count > measured.rows[-1] else {"measured": measured.at(count)}
            points += [
                {
                    "kernel": kernel.name,
                    "variant": kernel.variant,
                    "rows": count,
                    "level": level,
                    "operations_per_byte": count * kernel.flops / moved,
                    "gops": count * kernel.flops / ms / 1e6,
                }
                for level, ms in known.items()
            ]
    return points
