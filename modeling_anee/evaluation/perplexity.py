"""Perplexity of a text under any causal LM, weighted by tokens, with its standard error.

`score` keeps sums per window of the text, so that two models, or two budgets, can be compared window by window: the
difference is known far better than either perplexity.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ..data.windows import Window, digest_of, windows
from .processes import ALONE, Processes


HIGHEST = 500.0  # nats of a token: the exponential of a little more is no float


@dataclass(frozen=True)
class Scores:
    """Sums over each of W windows, on the CPU; means and errors follow from them.

    Args:
        nll: float64 [W], negative log likelihood of the scored tokens, in nats.
        tokens: int64 [W], number of scored tokens.
        digest: SHA-256 of the windows, so that only scores of the same text are compared.
        cost: float64 [W], cost of all tokens that were run, context included, as shares of the whole model; None
            for a plain model.
        cost_tokens: int64 [W], number of tokens that were run; None for a plain model.
    """

    nll: Tensor
    tokens: Tensor
    digest: str
    cost: Tensor | None = None
    cost_tokens: Tensor | None = None

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log likelihood of a token."""
        return _exponential(self.nll, self.tokens)[0]

    @property
    def perplexities(self) -> Tensor:
        """Perplexity of each window by itself, float64 [W]."""
        return (self.nll / self.tokens).exp()

    @property
    def standard_error(self) -> float | None:
        """Standard error of the perplexity, windows taken as independent clusters; None for a single window."""
        return _exponential(self.nll, self.tokens)[1]

    @property
    def mean_cost(self) -> float | None:
        """Mean cost of a token, as a share of the whole model; None for a plain model."""
        if self.cost is None or self.cost_tokens is None:
            return None
        return float(self.cost.sum() / self.cost_tokens.sum())


class NotFiniteError(ValueError):
    """A window whose score is no number; `window` is its place among those that were scored."""

    def __init__(self, window: int, message: str) -> None:
        super().__init__(message)
        self.window = window


def ratio(scores: Scores, base: Scores) -> tuple[float, float | None]:
    """Perplexity as a multiple of the base's, and the standard error of that, None for a single window.

    Differences are taken window by window, so what is hard or easy about a window drops out of the error.

    Raises:
        ValueError: the two are not scores of the same windows.
    """
    if scores.digest != base.digest or not torch.equal(scores.tokens, base.tokens):
        raise ValueError(
            f"the two scores are of different windows: {len(scores.tokens)} with {int(scores.tokens.sum())} scored tokens, "
            f"and {len(base.tokens)} with {int(base.tokens.sum())}; a ratio needs the same ids, length, stride and limit"
        )
    return _exponential(scores.nll - base.nll, scores.tokens)


def _exponential(sums: Tensor, tokens: Tensor) -> tuple[float, float | None]:
    """Exponential of sums / tokens over all windows, and its standard error; None for a single window.

    The mean is a ratio of two totals, and windows are drawn whole: its error comes from what each window's sum is off
    the mean (linearised ratio estimator), that of the exponential from the delta method.
    """
    count, total = len(tokens), tokens.sum()
    mean = sums.sum() / total
    value = float(mean.exp())
    if count < 2:
        return value, None
    off = (sums - mean * tokens).square().sum()
    return value, value * float((off * count / (count - 1)).sqrt() / total)


TokenLoss = Callable[[Tensor, Tensor], Tensor]


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood float32 [T] of each of the targets int64 [T], from logits [T, V]."""
    return cross_entropy(logits.float(), targets, reduction="none")


def score(
    model: Any,
    windows: Sequence[Window],
    energy_budget: float | None = None,
    batch_size: int = 4,
    progress: Callable[[int], Any] | None = None,
    processes: Processes = ALONE,
    loss: TokenLoss = token_nll,
) -> Scores:
    """Score windows, in the mode (eval or training) that the model is in.

    Args:
        model: an `AneeForCausalLM`, or any causal LM of transformers.
        windows: what to score, of `windows`.
        energy_budget: of every token; default: the model's own. Not for a plain model.
        batch_size: windows that are run together; their logits float [B, T, V] are all in memory.
        progress: called with the number of windows that have just been scored.
        processes: those that share the work, each with the same arguments; all get the same scores.
        loss: of each token, from logits [T, V] and targets int64 [T].

    Raises:
        ValueError: no windows, windows longer than the model's positions, a batch size below 1, a budget out of [0, 1],
            or one for a plain model.
        NotFiniteError: a score is not a finite number.
    """
    is_anee = getattr(model.config, "model_type", None) == "anee"
    if energy_budget is not None and not is_anee:
        raise ValueError(f"energy_budget={energy_budget!r} is not allowed: {type(model).__name__} is a plain model without one")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not allowed: it must be at least 1")
    check_lengths(model, windows)
    budget = {} if energy_budget is None else {"energy_budget": energy_budget}

    def run(ids: Tensor) -> tuple[Tensor, Tensor | None]:
        output = model(input_ids=ids.to(model.device), use_cache=False, **budget)
        return output.logits, output.execution.cost if is_anee else None

    own = model.config.energy_budget if is_anee and energy_budget is None else energy_budget
    where = f"budget {own:g}" if is_anee else "full budget"
    return score_with(run, windows, is_anee, where, batch_size, progress, processes, loss)


def score_with(
    run: Callable[[Tensor], tuple[Iterable[Tensor], Tensor | None]],
    windows: Sequence[Window],
    has_cost: bool,
    where: str,
    batch_size: int = 4,
    progress: Callable[[int], Any] | None = None,
    processes: Processes = ALONE,
    loss: TokenLoss = token_nll,
) -> Scores:
    """Score windows under anything that gives logits.

    Args:
        run: token ids int64 [B, T] -> the logits [T, V] of each row, and the cost [B, T] of every token, if there is one.
            Shorter windows are filled up at their end, which can't change what comes before.
        windows: what to score.
        has_cost: whether `run` gives costs.
        where: which scores these are, for errors: "budget 0.6", for example.
        batch_size: windows that are run together.
        progress: called with the number of windows that have just been scored.
        processes: those that share the batches. The batches are the same for any number of them, and so are the sums.
        loss: of each token, from logits [T, V] and targets int64 [T].

    Raises:
        NotFiniteError: a score is not a finite number.
    """
    nll, cost = torch.zeros(2, len(windows), dtype=torch.float64)
    places = [range(start, min(start + batch_size, len(windows))) for start in range(0, len(windows), batch_size)]
    for first in range(0, len(places), processes.count):
        turn = places[first : first + processes.count]  # one batch for each process
        if processes.index < len(turn):
            own = turn[processes.index]
            batch = slice(own.start, own.stop)
            nll[batch], cost[batch] = _batch_sums(run, windows[batch], loss)
            if not (nll[batch].isfinite().all() and cost[batch].isfinite().all()):
                break  # all processes meet at the sum, and raise the same error
        if progress is not None:
            progress(sum(map(len, turn)))
    nll, cost = processes.sum(nll), processes.sum(cost)
    tokens = torch.tensor([len(window.ids) - window.context for window in windows])
    _check_finite(nll / tokens, cost, where)
    return Scores(
        nll=nll,
        tokens=tokens,
        digest=digest_of(windows),
        cost=cost if has_cost else None,
        cost_tokens=None if not has_cost else torch.tensor([len(window.ids) for window in windows]),
    )


def corpus_perplexity(
    model: Any,
    ids: Tensor,
    length: int = 512,
    stride: int | None = None,
    energy_budget: float | None = None,
    batch_size: int = 4,
    limit: int | None = None,
    start: Sequence[int] = (),
) -> Scores:
    """Score a text, integers [N]: `windows`, then `score`, which say what the arguments are."""
    return score(model, windows(ids, length, stride, start, limit), energy_budget, batch_size)


def _batch_sums(run: Callable, batch: Sequence[Window], loss: TokenLoss) -> Tensor:
    """Negative log likelihood and cost of each of B windows, float64 [2, B]; the cost is 0 if there is none."""
    with torch.inference_mode():
        rows, cost = run(pad_sequence([window.ids for window in batch], batch_first=True))
        nll = [_window_nll(logits[: len(window.ids)], *window, loss) for logits, window in zip(rows, batch, strict=True)]
    spent = [0.0 if cost is None else float(cost[i, : len(w.ids)].double().sum()) for i, w in enumerate(batch)]
    return torch.tensor([nll, spent], dtype=torch.float64)


def _window_nll(logits: Tensor, ids: Tensor, context: int, loss: TokenLoss) -> float:
    """Sum of the negative log likelihoods of a window's scored tokens, from its logits [T, V]."""
    return float(loss(logits[context - 1 : -1], ids[context:].to(logits.device)).double().sum())


def _check_finite(means: Tensor, cost: Tensor, where: str) -> None:
    """Notice windows [W] whose mean negative log likelihood or cost gives no finite figure."""
    wrong = ~((means <= HIGHEST) & cost.isfinite())  # true for nan too
    if wrong.any():
        window = int(wrong.nonzero()[0])
        mean, spent = float(means[window]), float(cost[window])
        what = f"the loss of a token is {mean:g} nats" if math.isfinite(spent) else f"the cost is {spent}"
        message = f"window {window + 1} of {len(means)} at {where} has no score: {what}; are the weights and the dtype right?"
        raise NotFiniteError(window, message)


def check_lengths(model: Any, windows: Sequence[Window]) -> None:
    """Notice windows that a model can't run.

    Raises:
        ValueError: there are none, or one has more tokens than the model has positions.
    """
    if not windows:
        raise ValueError("windows is empty: there is nothing to score")
    longest, positions = max(len(window.ids) for window in windows), positions_of(model)
    if positions is not None and longest > positions:
        raise ValueError(f"length={longest} is not allowed: the model has {positions} positions (max_position_embeddings)")


def positions_of(model: Any) -> int | None:
    """How many tokens a model can run together; None if its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
