"""`ExecutionTrace`: what was done with every token at every layer, and what it cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .actions import DEFAULT_TABLE, FULL, NONE, ActionTable
from .configuration_prices import PRICED
from .lossless_account import LosslessAccount


@dataclass(frozen=True)
class ExecutionTrace:
    """Actions and costs of B rows of T tokens at L layers, on the CPU.

    Args:
        actions: uint8 [B, T, L], places in `table`.
        cost: float32 [B, T], share of the whole model's work, head and controller included; 0 for padding.
        valid: bool [B, T], False for padding.
        floor: the lowest mean cost that the controller can reach.
        unit: unit of the costs.
        ran_anyway: int64 [B, T], layers that a token skipped but that were run for it and thrown away, because gathering
            the other tokens would have taken longer; not in `cost`. Default: none.
        account: float64 [B, T], what the row has spent above its budgets (or the floor) up to and with each token, from the
            start of the cache on; or [B, T, L], what each layer has run above its share; None where the controller keeps none.
        table: what the actions are.
        fed: as how much of a feed-forward each action counts, float64 [actions], for `capacity`; None where that is not
            dialled.
        head: uint8 [B, T], variant that each token's head ran in, places in `table.heads`; None: full for all.
        discarded: float64 [B], cost of what ran for tokens that are not among these: drafts, and what a crop of the cache took
            out; not in `cost`. None: nothing.
        lossless: what became of drafts, where `generate` was asked for them.
        refined: bool [B, T], tokens that ran their last layers again in a dearer plan (`refine`), whose actions these then are;
            both runs are in `cost`. None: no kind that does so.
        budget: float64 [B, T], what each token was asked to cost. A forward at these budgets runs the same; None: not known.
        total: what the whole model costs a token, in `unit`; None: not known.
    """

    actions: Tensor
    cost: Tensor
    valid: Tensor
    floor: float
    unit: str
    ran_anyway: Tensor | None = None
    account: Tensor | None = None
    table: ActionTable = DEFAULT_TABLE
    head: Tensor | None = None
    fed: Tensor | None = None
    discarded: Tensor | None = None
    lossless: LosslessAccount | None = None
    refined: Tensor | None = None
    budget: Tensor | None = None
    total: float | None = None

    @property
    def share_run_anyway(self) -> float:
        """Share of the (token, layer) pairs with something left out that were run anyway."""
        skipped = int((self.table.gaps | self.table.leaving)[self.actions[self.valid].long()].sum())
        return 0.0 if self.ran_anyway is None else int(self.ran_anyway[self.valid].sum()) / max(skipped, 1)

    @property
    def mean_cost(self) -> float:
        """Mean cost of a token, as a share of the whole model."""
        return float(self.cost.sum() / self.valid.sum().clamp(min=1))

    @property
    def capacity(self) -> float:
        """Mean of what the actions count as, 1 for a feed-forward in the dearest variant; without any, share of those run."""
        ran = self.table.where([action.feed_forward != NONE for action in self.table]) if self.fed is None else self.fed
        return float(ran[self.actions[self.valid].long()].double().mean()) if self.valid.any() else 1.0

    @property
    def row_cost(self) -> Tensor:
        """Mean cost of each row, float32 [B]."""
        return self.cost.sum(dim=1) / self.valid.sum(dim=1).clamp(min=1)

    @property
    def depth(self) -> Tensor:
        """Number of layers that ran for each token, wholly or in part, int64 [B, T]."""
        return self.ran.sum(dim=-1) * self.valid

    @property
    def ran(self) -> Tensor:
        """Where anything of a layer ran for a token, bool [B, T, L]."""
        return self.table.running[self.actions.long()]

    @property
    def layer_share(self) -> dict[str, Tensor]:
        """By the name of each action, the share of the tokens that took it at each layer, float32 [L]."""
        taken = self.actions[self.valid]
        return {action.name: (taken == place).float().mean(dim=0) for place, action in enumerate(self.table)}

    @property
    def head_share(self) -> dict[str, float]:
        """By the variant of the head, full first, the share of the tokens whose head ran in it."""
        return _shares(None if self.head is None else self.head[self.valid], self.table)

    @property
    def refined_share(self) -> float:
        """Share of the tokens that ran their last layers again."""
        return 0.0 if self.refined is None else float((self.refined & self.valid).sum() / self.valid.sum().clamp(min=1))

    @property
    def spent(self) -> float:
        """Cost of all that ran, what was discarded included."""
        return float(self.cost.sum(dtype=torch.float64)) + (0.0 if self.discarded is None else float(self.discarded.sum()))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.cost)

    def __getitem__(self, row: int) -> "ExecutionTrace":
        """One row, as pipelines take batches apart."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a trace of {len(self)} rows")
        return self.rows(torch.tensor([row], device="cpu"))

    def rows(self, index: Tensor) -> "ExecutionTrace":
        """The rows at `index`, in its order."""
        discarded = None if self.discarded is None else self.discarded[index]
        return replace(self._map(lambda x: x[index]), discarded=discarded)

    def tokens(self, start: int | None, stop: int | None) -> "ExecutionTrace":
        """The tokens `start:stop` of every row."""
        return self._map(lambda x: x[:, start:stop])

    def keep(self, kept: Tensor) -> "ExecutionTrace":
        """The same with everything but the tokens in `kept`, bool [B, T], as padding."""
        return replace(self, cost=self.cost * kept, valid=self.valid & kept)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "ExecutionTrace":
        optional = {name: getattr(self, name) for name in ("ran_anyway", "account", "head", "budget", "refined")}
        optional = {name: None if value is None else change(value) for name, value in optional.items()}
        return replace(self, actions=change(self.actions), cost=change(self.cost), valid=change(self.valid), **optional)

    @staticmethod
    def concatenate(traces: Sequence["ExecutionTrace"]) -> "ExecutionTrace":
        """Traces of the same rows, one after the other in time."""
        parts: dict[str, Any] = {
            name: torch.cat([getattr(t, name) for t in traces], dim=1) for name in ("actions", "cost", "valid")
        }
        ran = [torch.zeros_like(t.valid, dtype=torch.int64) if t.ran_anyway is None else t.ran_anyway for t in traces]
        any_ran = any(t.ran_anyway is not None for t in traces)
        for name in ("account", "budget"):
            known = [getattr(t, name) for t in traces if getattr(t, name) is not None]
            parts[name] = torch.cat(known, dim=1) if len(known) == len(traces) else None
        if any(t.head is not None for t in traces):
            heads = [torch.zeros_like(t.valid, dtype=torch.uint8) if t.head is None else t.head for t in traces]
            parts["head"] = torch.cat(heads, dim=1)
        if any(t.refined is not None for t in traces):
            parts["refined"] = torch.cat([t.valid & False if t.refined is None else t.refined for t in traces], dim=1)
        return replace(traces[-1], **parts, ran_anyway=torch.cat(ran, dim=1) if any_ran else None)

    def summary(self) -> str:
        """One line: tokens, mean cost, depth, heads that were not full, floor."""
        depth = self.depth[self.valid].float().mean() if self.valid.any() else 0.0
        share = self.share_run_anyway
        anyway = f"; {share:.0%} of the skipped layers were run anyway, since gathering would not have paid" if share else ""
        heads = heads_text(self.head_share)
        capacity = "" if self.fed is None else f", capacity {self.capacity:.2f}"
        thrown = 0.0 if self.discarded is None else float(self.discarded.sum()) / max(int(self.valid.sum()), 1)
        discarded = f"; {thrown:.3f} more a token was discarded" if thrown else ""
        again = "" if self.refined is None else f", {self.refined_share:.0%} of the tokens ran again"
        drafts = f"{discarded}\n{self.lossless.summary()}" if self.lossless else discarded
        return (
            f"{int(self.valid.sum())} tokens, mean cost {self.mean_cost:.3f} of the whole model "
            f"(unit {self.unit}{self._absolute}, floor {self.floor:.3f}), "
            f"mean depth {depth:.1f} of {self.actions.shape[-1]} layers{capacity}{heads and f', {heads}'}{again}"
            f"{anyway}{drafts}"
        )

    @property
    def _absolute(self) -> str:
        """What a token cost in a unit that people know, beside the whole model."""
        if self.total is None or self.unit not in PRICED:
            return ""
        return f": {self.mean_cost * self.total:.3g} of {self.total:.3g} a token"

    def render(self, row: int = 0, width: int = 100) -> str:
        """Draw one row for a terminal: layers downwards from the last to the first, the last `width` tokens across.

        The right margin has the share of the drawn tokens that each layer ran for, the bottom their depth, which of them ran
        again, their heads that were not full, and what the symbols mean, dearest first.
        """
        drawn = self.valid[row].nonzero().flatten()[-width:]
        actions = self.actions[row][drawn].long()  # [T, L]
        running = self.table.running[actions].float()
        lines = []
        for layer in range(actions.shape[1] - 1, -1, -1):
            symbols = "".join(self.table[place].symbol for place in actions[:, layer].tolist())
            lines.append(f"{layer:4d} |{symbols}| {running[:, layer].mean():4.0%}")
        depths = "".join(_tenth(int(count), actions.shape[1]) for count in running.sum(dim=1).tolist())
        taken = (self.table[place] for place in self.table.darkest_first(actions))
        legend = "  ".join(f"{action.symbol!r} {action.name}" for action in taken)
        heads = heads_text(_shares(None if self.head is None else self.head[row][drawn], self.table))
        again = "" if self.refined is None else "".join("*" if one else " " for one in self.refined[row][drawn].tolist())
        marks = again and f"again|{again}| ran their last layers twice"
        return "\n".join(filter(None, [*lines, f"depth|{depths}| tenths of the layers", marks, heads, legend]))


def _shares(heads: Tensor | None, table: ActionTable) -> dict[str, float]:
    """The share of each variant among heads [N]; None: all in full."""
    if heads is None or not len(heads):
        return {FULL: 1.0}
    shares = {name: float((heads == place).float().mean()) for place, name in enumerate(table.heads)}
    return {name: share for name, share in shares.items() if share}


def heads_text(shares: Mapping[str, float]) -> str:
    """Which heads were used, in words; nothing where all were full."""
    told = ", ".join(f"{name} for {share:.0%}" for name, share in shares.items() if name != FULL)
    return f"head {told} of the tokens" if told else ""


def _tenth(count: int, total: int) -> str:
    """A share as one digit: its tenths, 9 for all."""
    return str(min(10 * count // total, 9))
