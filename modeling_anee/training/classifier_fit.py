"""Fitting the heads of an early-exit classifier to the features of a frozen base.

With the base frozen, the joint loss of all heads (BranchyNet, PABEE) falls apart into one for each head: they are fitted one
after the other, by a logistic regression with L-BFGS, or by AdamW where heads have an inner layer. What comes after (weight
decay, mixing, temperatures, dials) is chosen on answers to rows that a head was not fitted on: the rows are cut into folds, and
each is answered by heads fitted on the others (stacking, Wolpert 1992).

Shapes: N rows, E heads, F features, C classes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..classifier_heads import mixed


DECAYS = (1.0, 0.3, 0.1, 0.03)  # of weights of standardised features, tried in turn
MIXING_DECAY = 1e-3  # of the difference to a head alone
ITERATIONS = 50
EPOCHS, BATCH, RATE = 20, 64, 1e-3


def fit_head(head: Any, features: Tensor, labels: Tensor, folds: Tensor, generator: torch.Generator) -> Tensor:
    """Fit a head in place; returns logits float32 [N, C] of every row by a head that was fitted without the row's fold.

    The weight decay is the one by which those logits are likeliest; the head is fitted on all rows with it.

    Args:
        head: a linear map, or several with something between them.
        features: float32 [N, F].
        labels: int64 [N].
        folds: the fold of each row, int64 [N], from 0.
        generator: for the order of the rows and the start of an inner layer.
    """
    classes = (head if isinstance(head, nn.Linear) else head[-1]).out_features
    outside = torch.zeros(len(DECAYS), len(features), classes)
    for fold in range(int(folds.max()) + 1):
        own, trial = folds == fold, copy.deepcopy(head)
        (mean, scale), others = _statistics(features[~own]), features[own]
        for place, _ in enumerate(_path(trial, (features[~own] - mean) / scale, labels[~own], DECAYS, generator)):
            with torch.no_grad():
                outside[place, own] = trial((others - mean) / scale)
    losses = [float(cross_entropy(logits, labels)) for logits in outside]
    best = losses.index(min(losses))
    mean, scale = _statistics(features)
    for _ in _path(head, (features - mean) / scale, labels, DECAYS[: best + 1], generator):
        pass
    _fold(head if isinstance(head, nn.Linear) else head[0], mean, scale)
    return outside[best]


def fit_mixing(own: Tensor, labels: Tensor) -> Tensor:
    """The two numbers by which each head's logits are mixed with those of the head before it, float32 [E, 2].

    Args:
        own: logits of every head by itself, float32 [N, E, C], of rows that it was not fitted on.
        labels: int64 [N].
    """
    found, before = torch.tensor([1.0, 0.0]).repeat(own.shape[1], 1), own[:, 0]
    for head in range(1, own.shape[1]):
        numbers = found[head].clone().requires_grad_()

        def loss(numbers: Tensor = numbers, head: int = head, before: Tensor = before) -> Tensor:
            rest = (numbers - found[head]).square().sum()
            return cross_entropy(mixed(numbers, own[:, head], before), labels) + MIXING_DECAY * rest

        _minimise([numbers], loss)
        found[head] = numbers.detach()
        before = mixed(found[head], own[:, head], before)
    return found


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of features [N, F], [F] each."""
    return features.mean(dim=0), features.std(dim=0).clamp(min=1e-4)


def _path(head: Any, features: Tensor, labels: Tensor, decays: Sequence[float], generator: torch.Generator) -> Iterator[float]:
    """Fit a head on standardised features with one decay after the other, each from where the one before ended."""
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    for decay in decays:
        if isinstance(head, nn.Linear):
            _regress(head, features, labels, decay)
        else:
            _descend(head, features, labels, decay, generator)
        yield decay


def _regress(head: nn.Linear, features: Tensor, labels: Tensor, decay: float) -> None:
    """Logistic regression, from where the head is: cross entropy + decay / 2 times the squared weights."""
    _minimise(list(head.parameters()), lambda: cross_entropy(head(features), labels) + decay / 2 * head.weight.square().sum())


def _minimise(parameters: list[Tensor], loss: Callable[[], Tensor]) -> None:
    """L-BFGS from where the parameters are."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]


def _descend(head: nn.Sequential, features: Tensor, labels: Tensor, decay: float, generator: torch.Generator) -> None:
    """AdamW over batches, with a rate that falls to nothing."""
    for module in head:
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                bound = module.in_features**-0.5
                module.weight.copy_((torch.rand(module.weight.shape, generator=generator) * 2 - 1) * bound)
                module.bias.zero_()
    steps = EPOCHS * -(-len(features) // BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(features), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _fold(linear: Any, mean: Tensor, scale: Tensor) -> None:
    """Make a map of standardised features one of features as they are."""
    linear.weight.div_(scale)
    linear.bias.sub_(linear.weight @ mean)
