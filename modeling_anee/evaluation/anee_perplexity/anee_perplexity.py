"""The metric `anee_perplexity` for `evaluate`: perplexity of texts under a causal LM, beside what each budget costs.

The file works in the package and, copied elsewhere (a Space, the cache of `evaluate`), with the package installed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


try:  # indented, so that `evaluate` leaves it to us to say what is missing
    from modeling_anee.checks import check_budget
    from modeling_anee.data.encoding import encode_texts
    from modeling_anee.data.text import check_string
    from modeling_anee.data.windows import Window
    from modeling_anee.evaluation.perplexity import NotFiniteError, Scores, positions_of, score
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "modeling_anee":
        raise
    raise ImportError("the metric anee_perplexity needs the package modeling_anee: pip install modeling-anee") from error


_DESCRIPTION = """
Perplexity of texts under a causal language model at several energy budgets, and what each budget really cost.

`mean_perplexity` is what the metric `perplexity` of `evaluate` gives: the mean over the texts. `corpus_perplexity` weights
them by their tokens. Models of modeling-anee take any budget between 0 and 1, other causal LMs only 1.0.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): texts to score.
    model_id (str): folder or Hub name of an artifact or of any causal LM; its remote code, if it has any, is trusted.
    model: a loaded model instead; it needs `tokenizer`.
    tokenizer: a tokenizer; default: the one that comes with `model_id`.
    energy_budget (float or list of float): share of the whole model's work to spend. Default: 1.0, 0.8 and 0.6.
    batch_size (int): texts that are run together. Default: 16.
    add_start_token (bool): begin each text with the BOS token, so that its first token is scored too. Default: True.
    max_length (int): cut texts to so many tokens, the BOS token included. Default: no limit but the model's, an error.
    device (str): cpu, cuda, ... Default: with `model_id` cuda where there is one, else cpu; with `model` where it is.
Returns:
    for a single energy_budget:
        perplexities: perplexity of each text.
        mean_perplexity: their mean.
        corpus_perplexity: exponential of the mean negative log likelihood of a token.
        standard_error: its standard error, texts taken as independent; None for a single text.
        mean_cost: mean cost of a token, as a share of the whole model's work; 1.0 for a plain model.
        tokens: number of scored tokens.
    for a list of them: a dictionary of that for each, with keys like "0.8".
Examples:
    >>> metric = evaluate.load("modeling_anee/evaluation/anee_perplexity")
    >>> texts = ["The lighthouse keeper lit the lamp.", "Rain fell all night."]
    >>> results = metric.compute(predictions=texts, model_id="my-artifact", energy_budget=[1.0, 0.8])
    >>> sorted(results)
    ['0.8', '1.0']
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AneePerplexity(evaluate.Metric):
    """`evaluate.load` gives one of these; `compute` is documented in `_KWARGS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        model_id: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        energy_budget: float | Sequence[float] = (1.0, 0.8, 0.6),
        batch_size: int = 16,
        add_start_token: bool = True,
        max_length: int | None = None,
        device: str | None = None,
    ) -> dict[str, Any]:
        budgets = _budgets(energy_budget)
        model, tokenizer = _load(model_id, model, tokenizer, device)
        _check_plain(model, budgets)
        texts = _encode(tokenizer, predictions, add_start_token, max_length, positions_of(model))
        # Longest first: texts of a batch are of like length, and one that needs too much memory says so at once.
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number].ids))
        results, training = {}, model.training
        model.eval()
        try:
            with evaluate.logging.tqdm(total=len(texts) * len(budgets)) as bar:
                for budget in budgets:
                    own = budget if _is_anee(model) else None
                    windows = [texts[number] for number in order]
                    scores = _score(model, windows, own, batch_size, bar.update, order)
                    results[str(budget)] = _figures(scores, order)
        finally:
            model.train(training)
        return results if isinstance(energy_budget, Iterable) else results[str(budgets[0])]


def _budgets(energy_budget: float | Sequence[float]) -> list[float]:
    values = list(energy_budget) if isinstance(energy_budget, Iterable) else [energy_budget]
    if not values or isinstance(energy_budget, str):
        raise ValueError(
            f"energy_budget={energy_budget!r} is not allowed: it must be a number between 0 and 1, or a list of them"
        )
    return list(dict.fromkeys(map(check_budget, values)))


def _load(model_id: str | None, model: Any, tokenizer: Any, device: str | None) -> tuple[Any, Any]:
    """The model, where it is to run, and its tokenizer."""
    if (model_id is None) == (model is None):
        given = None if model is None else type(model).__name__
        raise ValueError(f"model_id={model_id!r} with model={given} is not allowed: give exactly one of the two")
    if model is not None and tokenizer is None:
        raise ValueError("tokenizer=None is not allowed with model=...: give the tokenizer too, or model_id=... instead")
    where = None if device is None and model is not None else _device(device)
    if model_id is not None:
        model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
    return model if where is None else model.to(where), tokenizer


def _device(name: str | None) -> torch.device:
    """A device by its name; "gpu" is what the metric `perplexity` calls cuda."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is not allowed: it must be cpu, cuda or another device of torch") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} is not allowed: this machine has no CUDA device; use 'cpu'")
    return found


def _is_anee(model: Any) -> bool:
    return getattr(model.config, "model_type", None) == "anee"


def _check_plain(model: Any, budgets: list[float]) -> None:
    if not _is_anee(model) and budgets != [1.0]:
        asked = ", ".join(map(str, budgets))
        raise ValueError(f"energy_budget={asked} is not allowed: {type(model).__name__} is a plain model and takes only 1.0")


def _encode(
    tokenizer: Any, texts: Sequence[str], add_start_token: bool, max_length: int | None, positions: int | None
) -> list[Window]:
    """Every text as one window, all of whose tokens but the first are scored.

    Raises:
        ValueError: no BOS token to begin with, a `max_length` below 2, or a text that is too short or too long.
    """
    if not texts:
        raise ValueError("predictions=[] is not allowed: there is nothing to score")
    if add_start_token and tokenizer.bos_token_id is None:
        raise ValueError("add_start_token=True is not allowed: the tokenizer has no BOS token; use add_start_token=False")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} is not allowed: it must be at least 2, a token and one before it")
    start = [tokenizer.bos_token_id] if add_start_token else []
    checked = (check_string(text, f"predictions[{number}]") for number, text in enumerate(texts))
    windows = []
    for number, own in enumerate(encode_texts(tokenizer, checked)):
        ids = start + _cut(own, max_length and max_length - len(start), tokenizer.truncation_side)
        if len(ids) < 2:
            least = "1 token" if add_start_token else "2 tokens with add_start_token=False"
            raise ValueError(f"predictions[{number}]={texts[number]!r} is not allowed: a text needs at least {least}")
        if positions is not None and len(ids) > positions:
            raise ValueError(
                f"predictions[{number}] of {len(ids)} tokens is not allowed: the model has {positions} positions; "
                f"set max_length to at most that"
            )
        windows.append(Window(torch.tensor(ids), 1))
    return windows


def _cut(ids: list[int], length: int | None, side: str) -> list[int]:
    """At most `length` of the ids, less those at a side."""
    return ids if length is None else ids[:length] if side == "right" else ids[max(len(ids) - length, 0) :]


def _score(model: Any, windows: list[Window], budget: float | None, batch_size: int, progress: Any, order: list[int]) -> Scores:
    """Scores of windows, which are those of texts in that order."""
    try:
        return score(model, windows, budget, batch_size, progress, loss=_official_nll)
    except NotFiniteError as error:
        raise ValueError(f"predictions[{order[error.window]}]: {error}") from error


def _official_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood [T] of targets [T] from logits [T, V], rounded as the metric `perplexity` rounds it.

    It sums over a dimension that is not the last, which torch does less exactly on a CPU: perplexities come out lower, by
    1e-4 of themselves at 49,000 tokens in the vocabulary.
    """
    return cross_entropy(logits.float().T.unsqueeze(0), targets.unsqueeze(0), reduction="none")[0]


def _figures(scores: Scores, order: list[int]) -> dict[str, Any]:
    """What is returned for one budget; text `order[i]` is window i of the scores."""
    perplexities = torch.empty_like(scores.nll)
    perplexities[order] = scores.perplexities
    return {
        "perplexities": perplexities.tolist(),
        "mean_perplexity": float(perplexities.mean()),
        "corpus_perplexity": scores.perplexity,
        "standard_error": scores.standard_error if len(order) > 1 else None,
        "mean_cost": 1.0 if scores.mean_cost is None else scores.mean_cost,
        "tokens": int(scores.tokens.sum()),
    }
