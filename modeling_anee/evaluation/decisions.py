"""What a model does with every token of windows under a budget, and how sure its controller is of that.

Shapes: N tokens, L layers, K choices of a decision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..actions import ActionTable
from ..controller import Controller, Decision, Observation
from ..data.windows import Window
from ..executor import Executor
from ..modeling_anee import AneeForCausalLM
from .entropy import entropy
from .perplexity import check_lengths
from .rollout import begin


@dataclass(frozen=True)
class Decisions:
    """What was done with N tokens, on the CPU.

    Args:
        actions: uint8 [N, L], places in `table`.
        heads: uint8 [N], variant that each token's head ran in, places in `table.heads`.
        cost: float32 [N], shares of the whole model.
        table: what the actions are.
        router_entropy: by layer, the mean entropy in bits of what the controller held for likely (`probabilities`), of the
            tokens that it was asked about; empty where its kind knows no probabilities.
    """

    actions: Tensor
    heads: Tensor
    cost: Tensor
    table: ActionTable
    router_entropy: dict[int, float]


def counted_from(model: AneeForCausalLM, windows: Sequence[Window]) -> int:
    """How many tokens of each window have nothing decided about them, or nothing known before them: those are not counted."""
    return max(model.controller.keep_first, max(window.context for window in windows))


def record(
    model: AneeForCausalLM, windows: Sequence[Window], budget: float, progress: Callable[[int], Any] | None = None
) -> Decisions:
    """Run windows one by one, without the head; the model stays as it is.

    Args:
        model: in whatever mode.
        windows: of one length; the tokens of each from `counted_from` on are counted.
        budget: of every token.
        progress: called with the number of windows that have just been run.

    Raises:
        ValueError: no windows, windows longer than the model's positions or without a token to count, or hidden states that
            are not finite.
    """
    check_lengths(model, windows)
    first = counted_from(model, windows)
    if min(len(window.ids) for window in windows) <= first:
        raise ValueError(f"windows of {len(windows[0].ids)} tokens have none to count: the first {first} never are")
    model.prepare()  # the base may have been changed since it was wrapped
    listener: Any = Listener(model.controller, first)
    executor = Executor(model.stack, listener, model.bridges, model.costs, model.config.table)
    parts = []
    for number, window in enumerate(windows):
        with torch.inference_mode():
            hidden, trace = executor.run(*begin(model, window.ids.to(model.device).unsqueeze(0), budget))
        if not hidden.isfinite().all():
            raise ValueError(
                f"window {number + 1} of {len(windows)} at budget {budget:g} has hidden states that are not finite; are the "
                "weights and the dtype right?"
            )
        head = torch.zeros_like(trace.actions[..., 0]) if trace.head is None else trace.head
        parts.append((trace.actions[0, first:], head[0, first:], trace.cost[0, first:]))
        if progress is not None:
            progress(1)
    actions, heads, cost = (torch.cat(column) for column in zip(*parts, strict=True))
    return Decisions(actions, heads, cost, model.config.table, listener.entropies())


@dataclass
class Listener:
    """Stands in an executor for a controller and decides as that does; it adds up how sure that is.

    Args:
        controller: who decides.
        first: index of the first token that counts.
        sums: by layer, the sum of entropies in bits, and their number.
    """

    controller: Controller
    first: int
    sums: dict[int, tuple[float, int]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """Whatever else an executor asks of a controller."""
        return getattr(self.controller, name)

    def decide(self, segment: int, seen: Observation) -> Decision:
        """What the controller decides."""
        likely = self.controller.probabilities(segment, seen)
        if likely is not None:
            counted = likely[(seen.index >= self.first).to(likely.device)]
            for offset, sum_of_layer in enumerate(entropy(counted.double()).sum(dim=0).tolist()):
                layer = self.controller.segments[segment][0] + offset
                total, count = self.sums.get(layer, (0.0, 0))
                self.sums[layer] = total + sum_of_layer, count + len(counted)
        return self.controller.decide(segment, seen)

    def entropies(self) -> dict[int, float]:
        """Their means by layer, in bits."""
        return {layer: total / count for layer, (total, count) in sorted(self.sums.items()) if count}
