"""The `confidence` controller: exit where the base is sure of the next token."""

import math

import torch
from torch import Tensor

from .actions import PROCESS
from .budget import TOLERANCE, Dial
from .configuration_anee import AneeConfig
from .controller import Controller, Decision, Observation
from .costs import CostTable


class ConfidenceController(Controller):
    """Exit where the base, asked through its final norm and head, is sure of the next token (CALM, arXiv:2207.07061).

    Uncalibrated or strict, the budget is a cap: a token also exits, without asking, where it cannot afford to go on to the
    next decision. Calibrated, the threshold follows the budget. Each question costs a head
    call, and a call of the exit translator if there is one; both are charged.
    """

    def __init__(self, config: AneeConfig) -> None:
        super().__init__(config)
        default = {max(config.min_layers, self.num_layers * quarters // 4) for quarters in (2, 3)}
        layers = default if config.exit_layers is None else config.exit_layers
        starts = sorted(layer for layer in layers if layer < self.num_layers)
        self.segments = list(zip(starts, [*starts, self.num_layers][1:], strict=True))
        self.metric = config.confidence_metric
        self._exit = config.table.exit
        self._config = config

    @property
    def _caps(self) -> bool:
        """Whether the budget is a cap for every token."""
        return self.strict or not self.dial.calibrated

    def bind(self, costs: CostTable) -> None:
        """Cost of going on from each decision to the next, everything later skipped, and of exiting there."""
        self.dial = Dial(self._config.calibration, neutral=self._config.confidence_threshold or 0.0)
        process, leave = costs.layers[:, PROCESS], costs.layers[:, self._exit]
        self._question = costs.head + costs.translator
        self._go_on = [float(process[a:b].sum() + leave[b:].sum()) + self._question for a, b in self.segments]
        first = self.segments[0][0] if self.segments else self.num_layers
        asked = bool(self.segments) and not self._caps  # every token asks at least once
        self.floor = costs.head + float(process[:first].sum() + leave[first:].sum()) + asked * self._question

    def decide(self, segment: int, seen: Observation) -> Decision:
        """PROCESS up to the next decision, or EXIT."""
        start, stop = self.segments[segment]
        affords = torch.ones_like(seen.budget, dtype=torch.bool)
        if self._caps:
            affords = seen.spent + self._go_on[segment] <= seen.budget + TOLERANCE
        leaves = torch.ones_like(affords)
        if affords.any():
            logits = seen.logits(seen.hidden[affords.to(seen.hidden.device)])
            leaves[affords] = self._is_sure(logits.float(), self.dial.setting(seen.budget[affords]))
        action = torch.where(leaves, self._exit, PROCESS).to(torch.uint8)
        return Decision(action.unsqueeze(-1).expand(-1, stop - start), affords.double() * self._question)

    def _is_sure(self, logits: Tensor, threshold: Tensor) -> Tensor:
        """Logits [n, V], thresholds [n] on the CPU -> bool [n] on the CPU."""
        log_probabilities = logits.log_softmax(dim=-1)
        if self.metric == "max_probability":
            return log_probabilities.amax(dim=-1).exp().cpu() > threshold
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
        return (entropy / math.log(logits.shape[-1])).cpu() < threshold
