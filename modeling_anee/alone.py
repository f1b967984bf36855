"""Who runs a token that is alone in its step, which is how text is generated: kinds that decide in plain numbers."""

from typing import Protocol

from torch import Tensor

from .bridges import Bridges
from .controller import Controller
from .controller_gated import GatedController
from .controller_plan import PlanController
from .controller_routed import RoutedController
from .gated_runner import GatedRunner
from .layer_runner import LayerRunner
from .ledger import Ledger
from .routed_runner import RoutedRunner
from .static_runner import StaticRunner
from .step import Step


class AloneRunner(Protocol):
    """Runs one token through all layers as its controller decides."""

    def takes(self, step: Step) -> bool:
        """Whether it can decide about the one token of a step."""

    def run(self, hidden: Tensor, step: Step, ledger: Ledger) -> Tensor:
        """Hidden states [1, 1, D] that enter the first layer -> those that leave the last; written down in the ledger."""


def alone_runner(controller: Controller, layers: LayerRunner, bridges: Bridges) -> AloneRunner | None:
    """The runner of a controller's kind, None where there is none."""
    if isinstance(controller, GatedController):
        return GatedRunner(controller, layers, bridges)
    if isinstance(controller, RoutedController):
        return RoutedRunner(controller, layers)
    return StaticRunner(controller, layers) if isinstance(controller, PlanController) else None
