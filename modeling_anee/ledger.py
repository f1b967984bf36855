"""What is decided and spent in the course of a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .actions import FULL
from .costs import CostTable


@dataclass
class Ledger:
    """What is decided and spent in the course of a step; on the CPU.

    Args:
        actions: uint8 [B, T, L]; PROCESS until something else is decided.
        head: uint8 [B, T], the variant that the head runs in; None for full.
        spent: cost of the head, of the layers run so far and of deciding, float64 [B, T].
        ran_anyway: layers with something left out that were run because gathering would not pay, int64 [B, T], None for none.
        account: where somebody has counted already, what is spent above the budgets with this step, float64 [B, T], or what
            each layer has run above its share, [B, T, L].
        refined: tokens that ran again in a dearer plan, bool [B, T]; None: no kind that does so.
        decided: False before the first decision, when everything is still PROCESS.
    """

    actions: Tensor
    spent: Tensor
    head: Tensor | None = None
    ran_anyway: Tensor | None = None
    account: Tensor | None = None
    refined: Tensor | None = None
    decided: bool = True

    @classmethod
    def begin(
        cls, shape: tuple[int, ...], costs: CostTable, dearest: tuple[list[int], int] | None, given: Tensor | None = None
    ) -> "Ledger":
        """What is known before the first decision.

        Args:
            shape: of the actions, (B, T, L).
            costs: what the head costs.
            dearest: actions and head of what is dearest, where the full head is gone.
            given: actions that are decided already.
        """
        head, spent = None, costs.head
        if FULL in costs.gone_heads:
            assert dearest is not None
            head = torch.full(shape[:2], dearest[1], dtype=torch.uint8, device="cpu")
            spent = costs.heads[dearest[1]]
        return cls(
            actions=torch.zeros(shape, dtype=torch.uint8, device="cpu") if given is None else given,
            spent=torch.full(shape[:2], spent, dtype=torch.float64, device="cpu"),
            head=head,
            decided=given is not None,
        )
