"""Fitting the heads of an early-exit classifier to the features of a frozen base.

With the base frozen, the joint loss of all heads (BranchyNet, PABEE) falls apart into one for each head: they are fitted one
after the other, by a logistic regression with L-BFGS, or by AdamW where heads have an inner layer.

Shapes: N rows, F features, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


DECAYS = (1.0, 0.3, 0.1, 0.03)  # of weights of standardised features, tried in turn
ITERATIONS = 50
EPOCHS, BATCH, RATE = 20, 64, 1e-3


def fit_head(head: Any, features: Tensor, labels: Tensor, held: tuple[Tensor, Tensor], generator: torch.Generator) -> float:
    """Fit a head in place, with the weight decay that is best on held-out rows; returns their cross entropy.

    Args:
        head: a linear map, or several with something between them.
        features: float32 [N, F].
        labels: int64 [N].
        held: features and labels of held-out rows.
        generator: for the order of the rows and the start of an inner layer.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-4)
    standard, others = (features - mean) / scale, (held[0] - mean) / scale
    best: tuple[float, dict[str, Tensor]] | None = None
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    for decay in DECAYS:
        if isinstance(head, nn.Linear):
            _regress(head, standard, labels, decay)
        else:
            _descend(head, standard, labels, decay, generator)
        with torch.no_grad():
            loss = float(cross_entropy(head(others), held[1]))
        if best is None or loss < best[0]:
            best = loss, {name: value.clone() for name, value in head.state_dict().items()}
    assert best is not None
    head.load_state_dict(best[1])
    _fold(head if isinstance(head, nn.Linear) else head[0], mean, scale)
    return best[0]


def _regress(head: nn.Linear, features: Tensor, labels: Tensor, decay: float) -> None:
    """Logistic regression, from where the head is: cross entropy + decay / 2 times the squared weights."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(head(features), labels) + decay / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


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
