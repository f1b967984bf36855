"""The fields `corrections` and `orders`: shapes of what an artifact has of the base's linear maps, neurons and heads."""

from typing import Any

from .checks import is_whole
from .narrow import HEADS, NEURONS


def check_corrections(shapes: Any, layers: int) -> None:
    """Check the shapes of the directions along which what fewer bits lose is added again.

    Raises:
        ValueError: no dict of shapes by linear map.
    """
    if shapes is None:
        return
    if not isinstance(shapes, dict) or not all(_of_directions(name, shape, layers) for name, shape in shapes.items()):
        raise ValueError(
            f"corrections={shapes!r} is not allowed: it must be a dict of lists, [{layers}, rank, inputs] by linear map, and "
            "[rank, inputs] for 'head'"
        )


def check_orders(shapes: Any, layers: int) -> None:
    """Check the shapes of the orders of neurons and heads.

    Raises:
        ValueError: no dict of shapes by what is ordered.
    """
    if shapes is None:
        return
    known = isinstance(shapes, dict) and all(name in (NEURONS, HEADS) for name in shapes)
    if not known or not all(_is_shape(shape, 2) and shape[0] == layers for shape in shapes.values()):
        raise ValueError(
            f"orders={shapes!r} is not allowed: it must be a dict of lists, [{layers}, how many] of {NEURONS!r} and {HEADS!r}"
        )


def _of_directions(name: Any, shape: Any, layers: int) -> bool:
    return _is_shape(shape, 2) if name == "head" else _is_shape(shape, 3) and shape[0] == layers


def _is_shape(shape: Any, dimensions: int) -> bool:
    known = isinstance(shape, list | tuple) and len(shape) == dimensions
    return known and all(is_whole(size) and size > 0 for size in shape)
