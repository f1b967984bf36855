"""Perplexity of a text under any causal LM, weighted by tokens, with its standard error.

A text is one row of token ids, cut into windows. `score` keeps sums per window, so that two models, or two budgets, can
be compared window by window: the difference is known far better than either perplexity.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from .processes import ALONE, Processes


class Window(NamedTuple):
    """Token ids int64 [T] that are run together; the first `context` of them are not scored."""

    ids: Tensor
    context: int


def windows(ids: Tensor, length: int = 512, stride: int | None = None) -> list[Window]:
    """Cut a text into windows that begin every `stride` tokens.

    Without a stride they do not overlap, and the first token of each, which has no context, is not scored. With a smaller
    stride every token but the very first of the text is scored, once, in the first window that has it.

    Args:
        ids: int64 [N].
        length: tokens of a window; the last one may be shorter.
        stride: tokens from the beginning of a window to that of the next, 1 to `length`; default: `length`.

    Raises:
        ValueError: a length or stride that is not allowed, or fewer than two tokens.
    """
    stride = length if stride is None else stride
    if length < 2:
        raise ValueError(f"length={length} is not allowed: a window needs at least 2 tokens")
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} is not allowed: it must be between 1 and the length of a window, {length}")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"ids of shape {tuple(ids.shape)} is not allowed: it must be one row of at least 2 tokens")
    cut, scored = [], 1  # tokens before `scored` are done
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        context = max(scored - begin, 1)
        if context < end - begin:
            cut.append(Window(ids[begin:end], context))
        scored = end
        if end == len(ids):
            break
    return cut


def spread(windows: Sequence[Window], limit: int | None) -> list[Window]:
    """At most `limit` of the windows, evenly spread over the text; all of them if it is None.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not allowed: at least one window must be scored")
    if limit is None or limit >= len(windows):
        return list(windows)
    return [windows[(2 * i + 1) * len(windows) // (2 * limit)] for i in range(limit)]


@dataclass(frozen=True)
class Scores:
    """Sums over each of W windows, on the CPU; means and errors follow from them.

    Args:
        nll: float64 [W], negative log likelihood of the scored tokens, in nats.
        tokens: int64 [W], number of scored tokens.
        digest: SHA-256 of the windows, so that only scores of the same text are compared.
        cost: float64 [W], cost of all tokens that were run, context included, as shares of the decoder stack; None
            for a plain model.
        cost_tokens: int64 [W], number of tokens that were run; None for a plain model.
        stack_share: share of the whole model's work that the stack is; None for a plain model.
    """

    nll: Tensor
    tokens: Tensor
    digest: str
    cost: Tensor | None = None
    cost_tokens: Tensor | None = None
    stack_share: float | None = None

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log likelihood of a token."""
        return _exponential(self.nll, self.tokens)[0]

    @property
    def perplexities(self) -> Tensor:
        """Perplexity of each window by itself, float64 [W]."""
        return (self.nll / self.tokens).exp()

    @property
    def standard_error(self) -> float:
        """Standard error of the perplexity, windows taken as independent clusters; nan for a single window."""
        return _exponential(self.nll, self.tokens)[1]

    @property
    def mean_cost(self) -> float | None:
        """Mean cost of a token, as a share of the decoder stack; None for a plain model."""
        if self.cost is None or self.cost_tokens is None:
            return None
        return float(self.cost.sum() / self.cost_tokens.sum())

    @property
    def mean_cost_of_whole_model(self) -> float | None:
        """The same as a share of the whole model, the head included; None for a plain model."""
        if self.mean_cost is None or self.stack_share is None:
            return None
        return self.mean_cost * self.stack_share + 1.0 - self.stack_share


def ratio(scores: Scores, base: Scores) -> tuple[float, float]:
    """Perplexity as a multiple of the base's, and the standard error of that.

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


def _exponential(sums: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Exponential of sums / tokens over all windows, and its standard error.

    The mean is a ratio of two totals, and windows are drawn whole: its error comes from what each window's sum is off
    the mean (linearised ratio estimator), that of the exponential from the delta method.
    """
    count, total = len(tokens), tokens.sum()
    mean = sums.sum() / total
    value = float(mean.exp())
    if count < 2:
        return value, float("nan")
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
    """
    is_anee = getattr(model.config, "model_type", None) == "anee"
    if energy_budget is not None and not is_anee:
        raise ValueError(f"energy_budget={energy_budget!r} is not allowed: {type(model).__name__} is a plain model without one")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not allowed: it must be at least 1")
    _check_lengths(model, windows)
    budget = {} if energy_budget is None else {"energy_budget": energy_budget}

    def run(ids: Tensor) -> tuple[Tensor, Tensor | None]:
        output = model(input_ids=ids.to(model.device), use_cache=False, **budget)
        return output.logits, output.execution.cost if is_anee else None

    stack_share = model.executor.costs.stack_share if is_anee else None
    return score_with(run, windows, stack_share, batch_size, progress, processes, loss)


def score_with(
    run: Callable[[Tensor], tuple[Iterable[Tensor], Tensor | None]],
    windows: Sequence[Window],
    stack_share: float | None,
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
        stack_share: share of the whole model's work that the stack is, if costs are given.
        batch_size: windows that are run together.
        progress: called with the number of windows that have just been scored.
        processes: those that share the batches. The batches are the same for any number of them, and so are the sums.
        loss: of each token, from logits [T, V] and targets int64 [T].
    """
    nll, cost = torch.zeros(2, len(windows), dtype=torch.float64)
    places = [range(start, min(start + batch_size, len(windows))) for start in range(0, len(windows), batch_size)]
    for first in range(0, len(places), processes.count):
        turn = places[first : first + processes.count]  # one batch for each process
        if processes.index < len(turn):
            own = turn[processes.index]
            batch = slice(own.start, own.stop)
            nll[batch], cost[batch] = _batch_sums(run, windows[batch], loss)
        if progress is not None:
            progress(sum(map(len, turn)))
    return Scores(
        nll=processes.sum(nll),
        tokens=torch.tensor([len(window.ids) - window.context for window in windows]),
        digest=digest_of(windows),
        cost=None if stack_share is None else processes.sum(cost),
        cost_tokens=None if stack_share is None else torch.tensor([len(window.ids) for window in windows]),
        stack_share=stack_share,
    )


def corpus_perplexity(
    model: Any,
    ids: Tensor,
    length: int = 512,
    stride: int | None = None,
    energy_budget: float | None = None,
    batch_size: int = 4,
    limit: int | None = None,
) -> Scores:
    """Score a text, int64 [N]: `windows`, then `spread`, then `score`, which say what the arguments are."""
    return score(model, spread(windows(ids, length, stride), limit), energy_budget, batch_size)


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, line ends as they are.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not UTF-8, or there is nothing in it.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not a UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{os.fspath(path)} is empty: there is nothing to score")
    return text


def encode_text(tokenizer: Any, text: str) -> Tensor:
    """Token ids int64 [N] of a whole text, without special tokens."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


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


def _check_lengths(model: Any, windows: Sequence[Window]) -> None:
    if not windows:
        raise ValueError("windows is empty: there is nothing to score")
    longest, positions = max(len(window.ids) for window in windows), positions_of(model)
    if positions is not None and longest > positions:
        raise ValueError(f"length={longest} is not allowed: the model has {positions} positions (max_position_embeddings)")


def positions_of(model: Any) -> int | None:
    """How many tokens a model can run together; None if its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def digest_of(windows: Sequence[Window]) -> str:
    """SHA-256 of windows."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{len(window.ids)} {window.context} ".encode())
        digest.update(window.ids.cpu().to(torch.int64).numpy().tobytes())
    return digest.hexdigest()
