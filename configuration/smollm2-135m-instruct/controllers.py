"""Every kind of controller, by the name that a configuration gives it."""

from .confidence import ConfidenceController
from .configuration_anee import AneeConfig
from .controller import Controller
from .learned import LearnedController
from .plans import BudgetController, PlanController
from .routed import RoutedController


CONTROLLER_CLASSES: dict[str, type[Controller]] = {
    "budget": BudgetController,
    "confidence": ConfidenceController,
    "learned": LearnedController,
    "plan": PlanController,
    "routed": RoutedController,
}


def build_controller(config: AneeConfig) -> Controller:
    """The controller that a configuration names."""
    return CONTROLLER_CLASSES[config.controller](config)
