"""Fields of the `refine` kind: the two plans, and the layer from which tokens run again."""

from collections.abc import Sequence
from typing import Any

from .actions import FULL, PROCESS, ActionTable
from .checks import whole


def refined_from(layers: int) -> int:
    """The first layer that runs again, where a configuration names none."""
    return layers // 2


def default_pair(precisions: Sequence[str], table: ActionTable, layers: int) -> list[tuple[list[int], int]]:
    """The first plan and the one again, of layers in precisions: all in the last, then in the first (in full, if it is one)."""
    first, again = precisions[-1], FULL if len(precisions) == 1 else precisions[0]
    found = [(first, table.heads.index(precisions[0]))], [(again, table.heads.index(again))]
    return [([table.find(variant, variant) or PROCESS] * layers, head) for pair in found for variant, head in pair]


def check_refinement(plans: Any, start: Any, table: ActionTable, layers: int) -> None:
    """Check `refine_plans` and `refine_from`.

    Raises:
        ValueError: not two plans that go through all layers, or no layer.
    """
    if start is not None:
        whole("refine_from", start, 0, layers)
    if plans is None:
        return
    try:
        if not isinstance(plans, list | tuple) or len(plans) != 2 or not all(isinstance(plan, str | list) for plan in plans):
            raise ValueError("these are not two plans")
        for plan in plans:
            table.head_of(plan)
            if any(table[action].leaves for action in table.plan(plan, layers)):
                raise ValueError(f"{plan!r} leaves the stack early")
    except ValueError as error:
        raise ValueError(
            f"refine_plans={plans!r} is not allowed: it must be a list of two plans, the one that every token runs first and "
            f"the one that it may run again ({error})"
        ) from error
