"""The controller of a model, as the kind that a stage is for."""

from typing import TypeVar

from ..controller import Controller
from ..modeling_anee import AneeForCausalLM


Kind = TypeVar("Kind", bound=Controller)


def controller_as(model: AneeForCausalLM, kind: type[Kind], name: str, lacks: str) -> Kind:
    """The model's controller.

    Args:
        model: whose.
        kind: its class.
        name: what recipes call that.
        lacks: what others have not, for the message.

    Raises:
        ValueError: it is of another kind.
    """
    if not isinstance(model.controller, kind):
        raise ValueError(f"controller={model.config.controller!r} has {lacks}: the recipe must say controller: {name}")
    return model.controller
