"""Every kind of controller, by the name that a configuration gives it."""

from .configuration_anee import AneeConfig
from .controller import Controller
from .controller_budget import BudgetController
from .controller_confidence import ConfidenceController
from .controller_gated import GatedController
from .controller_learned import LearnedController
from .controller_plan import PlanController
from .controller_refine import RefineController
from .controller_routed import RoutedController


CONTROLLER_CLASSES: dict[str, type[Controller]] = {
    "budget": BudgetController,
    "confidence": ConfidenceController,
    "gated": GatedController,
    "learned": LearnedController,
    "plan": PlanController,
    "refine": RefineController,
    "routed": RoutedController,
}


def build_controller(config: AneeConfig) -> Controller:
    """The controller that a configuration names."""
    return CONTROLLER_CLASSES[config.controller](config)
