"""Where a model spends its budget: use of every layer, work by class of token, entropy of decisions; as figures for JSON.

Shapes: N tokens, L layers, A actions, C classes of tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..actions import NONE
from ..data.windows import Window, digest_of
from ..modeling_anee import AneeForCausalLM
from .decisions import Decisions, counted_from, record
from .entropy import entropy, information
from .token_classes import CLASSES, token_classes
from .tokens import token_texts


WAYS_SHOWN = 8
SHOWN = ("name", "attention", "feed_forward", "leaves", "colour", "meaning")  # of an action


def analyse(
    model: AneeForCausalLM,
    tokenizer: Any,
    windows: Sequence[Window],
    budgets: Sequence[float],
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Run windows at budgets and describe what was done with their tokens.

    Args:
        model: with any kind of controller.
        tokenizer: of its base.
        windows: of one length.
        budgets: each has a row.
        progress: called with the number of windows that have just been run.

    Raises:
        ValueError: as `record`.
    """
    rows = []
    classes = None
    for budget in budgets:
        decisions = record(model, windows, budget, progress)
        if classes is None:
            classes = classes_of(tokenizer, windows, counted_from(model, windows))
        rows.append({"budget": budget, **describe(decisions, classes)})
    return {
        "controller": model.config.controller,
        "cost_unit": model.config.cost_unit,
        "dtype": str(model.dtype).removeprefix("torch."),
        "length": len(windows[0].ids),
        "windows": len(windows),
        "windows_sha256": digest_of(windows),
        "actions": [{name: getattr(action, name) for name in SHOWN} for action in model.config.table],
        "rows": rows,
    }


def classes_of(tokenizer: Any, windows: Sequence[Window], first: int) -> Tensor:
    """Places in `CLASSES` of the tokens of windows, those of each from `first` on, int64 [N]."""
    listed = [token_classes(token_texts(tokenizer, window.ids.tolist()))[first:] for window in windows]
    return torch.tensor([CLASSES.index(one) for tokens in listed for one in tokens])


def describe(decisions: Decisions, classes: Tensor) -> dict[str, Any]:
    """Figures of what was done with N tokens of classes int64 [N]; shares are of the tokens, entropies in bits."""
    table, actions = decisions.table, decisions.actions
    heads = {name: float(mean(decisions.heads == place)) for place, name in enumerate(table.heads)}
    layers = layer_rows(decisions, classes)
    decided = sum(layer["entropy"] for layer in layers)
    return {
        "tokens": len(actions),
        "mean_cost": float(mean(decisions.cost)),
        "mean_depth": float(mean(table.running[actions.long()].sum(dim=1))),
        "heads": {name: share for name, share in heads.items() if share},
        "explained_by_class": sum(layer["information"] for layer in layers) / decided if decided else 0.0,
        "ways": ways_of(decisions),
        "layers": layers,
        "classes": class_rows(decisions, classes),
    }


def layer_rows(decisions: Decisions, classes: Tensor) -> list[dict[str, Any]]:
    """Of every layer: shares of attention and feed-forward by variant, of tokens that leave before it, of actions; entropies.

    `entropy` is that of the actions over the tokens, `information` what the class of a token tells of it (mutual information),
    `router_entropy` the mean of what the controller's own distribution has, None where there is none.
    """
    table, actions = decisions.table, decisions.actions
    attention, feed_forward = sublayer_shares(decisions)
    leaving = leaves_at(decisions)
    rows = []
    for layer in range(actions.shape[1]):
        counts = joint_counts(actions[:, layer], classes, len(table))
        shares = counts.sum(dim=0).double() / len(actions)
        rows.append(
            {
                "layer": layer,
                "attention": {name: share[layer] for name, share in attention.items()},
                "feed_forward": {name: share[layer] for name, share in feed_forward.items()},
                "leaves": float(mean(leaving == layer)),
                "actions": {name: share for name, share in zip(table.names, shares.tolist(), strict=True) if share},
                "entropy": float(entropy(shares)),
                "information": information(counts),
                "router_entropy": decisions.router_entropy.get(layer),
            }
        )
    return rows


def class_rows(decisions: Decisions, classes: Tensor) -> list[dict[str, Any]]:
    """Of every class that occurs: its share of the tokens and of the work, cost, depth, where it leaves, what was done with it.

    `exit_depth` is the mean number of layers before a token leaves: all of them for one that doesn't. `attention` and
    `feed_forward` are shares of the layers, `actions` those of the tokens at each layer, [L].
    """
    table, actions = decisions.table, decisions.actions.long()
    depth, leaving = table.running[actions].sum(dim=1), leaves_at(decisions)
    attends = table.where([action.attention != NONE for action in table])[actions]
    feeds = table.where([action.feed_forward != NONE for action in table])[actions]
    rows = []
    for place in classes.unique().tolist():
        own = classes == place
        taken = {name: mean(actions[own] == action, dim=0) for action, name in enumerate(table.names)}
        rows.append(
            {
                "class": CLASSES[place],
                "tokens": int(own.sum()),
                "share": float(mean(own)),
                "work": float(decisions.cost[own].sum() / decisions.cost.sum()),
                "mean_cost": float(mean(decisions.cost[own])),
                "mean_depth": float(mean(depth[own])),
                "leaves": float(mean(leaving[own] < actions.shape[1])),
                "exit_depth": float(mean(leaving[own])),
                "attention": float(mean(attends[own])),
                "feed_forward": float(mean(feeds[own])),
                "actions": {name: share.tolist() for name, share in taken.items() if share.any()},
            }
        )
    return rows


def ways_of(decisions: Decisions) -> dict[str, Any]:
    """How many ways through the whole model were taken, their entropy, and the commonest as plans with their shares."""
    whole = torch.cat([decisions.actions, decisions.heads.unsqueeze(1)], dim=1)
    ways, counts = whole.unique(dim=0, return_counts=True)
    shares = counts.double() / counts.sum()
    commonest = shares.argsort(descending=True, stable=True)[:WAYS_SHOWN].tolist()
    return {
        "distinct": len(ways),
        "entropy": float(entropy(shares)),
        "commonest": [
            {"plan": decisions.table.text(ways[way, :-1].tolist(), int(ways[way, -1])), "share": float(shares[way])}
            for way in commonest
        ],
    }


def sublayer_shares(decisions: Decisions) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Of attention and of feed-forward: by variant that occurs, in the table's order, the share of the tokens at each layer."""
    table, actions = decisions.table, decisions.actions.long()
    taken = [table[place] for place in actions.unique().tolist()]
    known = dict.fromkeys(name for one in taken for name in (one.attention, one.feed_forward))
    attention, feed_forward = (
        {name: mean(table.where([getattr(one, sublayer) == name for one in table])[actions], dim=0).tolist() for name in known}
        for sublayer in ("attention", "feed_forward")
    )
    return attention, feed_forward


def leaves_at(decisions: Decisions) -> Tensor:
    """The layer before which each token leaves, int64 [N]; L where it doesn't."""
    leaves = decisions.table.leaving[decisions.actions.long()]
    return torch.where(leaves.any(dim=1), leaves.int().argmax(dim=1), leaves.shape[1])


def joint_counts(actions: Tensor, classes: Tensor, count: int) -> Tensor:
    """How many tokens have each class and action, int64 [C, A], for actions uint8 [N] and classes int64 [N]."""
    return torch.bincount(classes * count + actions.long(), minlength=len(CLASSES) * count).view(len(CLASSES), count)


def mean(values: Tensor, dim: int | None = None) -> Tensor:
    """Mean in float64 of truths, numbers of layers or costs, over all or a dimension."""
    return values.double().mean(dim=dim)
