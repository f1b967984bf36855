"""The fields `plans` and `router_plans`: what each layer does, and the plans that a router chooses from."""

from typing import Any

from .actions import ActionTable
from .checks import is_whole


def checked_plans(plans: Any, table: ActionTable, layers: int) -> list[str]:
    """Plans in short.

    Raises:
        ValueError: no list, an empty one, or a plan that does not name an action for each layer.
    """
    if not isinstance(plans, list | tuple) or not plans:
        raise ValueError(f"plans={plans!r} is not allowed: it must be a list of at least one plan")
    return [_in_short(plan, table, layers) for plan in plans]


def _in_short(plan: Any, table: ActionTable, layers: int) -> str:
    try:
        if not isinstance(plan, str | list | tuple):
            raise ValueError("neither")
        return table.text(table.plan(plan, layers), table.head_of(plan))
    except ValueError as error:
        raise ValueError(
            f"plans has {plan!r}, which is not allowed: it must be a list of {layers} names, one per layer, or a string of "
            f"them ({error})"
        ) from error


def check_router_plans(places: Any, count: int) -> None:
    """Check `router_plans`, beside so many plans.

    Raises:
        ValueError: no list of places among them.
    """
    if places is None:
        return
    if not isinstance(places, list | tuple) or not places or not all(is_whole(p) and 0 <= p < count for p in places):
        raise ValueError(f"router_plans={places!r} is not allowed: it must be a list of places in plans, which has {count}")
