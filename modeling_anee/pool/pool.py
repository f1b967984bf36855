"""`AneePool`: several models, each at a plan or a budget of its own, of which a policy lets one serve each request.

Rungs are loaded when they are first needed. One that can't be loaded, or has no memory left, is reported, and the next serves.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..checks import check_budget
from ..data.out_of_memory import is_out_of_memory
from ..trace import ExecutionTrace
from .config import PoolConfig, find_config, read_config
from .features import Glance
from .loading import AnyRung, Loader
from .policies import Case, Choice, EnergyPolicy, Policy, policy_of
from .rungs import Answer, NoChatTemplate, Request


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers


class NoRungError(ValueError):
    """No rung can serve: the budget affords none, or all that it affords have failed."""


@dataclass(frozen=True)
class Decision:
    """Which rung served a request, and why.

    Args:
        rung: its name.
        policy: the name of the policy.
        reason: in one line.
        energy_budget: that of the call, as a share of the dearest rung's bytes per token; None: no limit.
        bytes_per_token: weights read for all that was run, by the tokens that the serving rung ran, the prompt's included.
        share: the same, as a share of the dearest rung's.
        passes: rungs that were run before the one that served: to look at the prompt, or as the cascade's first.
        failures: rungs that could not serve, and why.
        figures: what the policy saw, by what it is: features, rules that fired, a gate's shares.
    """

    rung: str
    policy: str
    reason: str
    energy_budget: float | None
    bytes_per_token: float
    share: float
    passes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """The decision in one line, and one more for every failure."""
        cost = f"{self.bytes_per_token / 1e6:.1f} MB a token, {self.share:.3f} of the dearest rung's"
        before = f" after {', '.join(self.passes)}" if self.passes else ""
        return "\n".join([f"{self.rung}{before}, by {self.policy}: {self.reason}; {cost}", *self.failures])


@dataclass(frozen=True)
class PoolOutput:
    """Of each request the new text, which rung served and why, what it ran, and how many tokens its prompt had."""

    texts: list[str]
    decisions: list[Decision]
    executions: list[ExecutionTrace]
    prompts: list[int]


class AneePool:
    """Rungs and policies.

    Args:
        config: what the pool is.
        folder: what folders in it are relative to.
        device: where rungs run.

    Raises:
        ValueError: a rung whose cost was not measured.
    """

    def __init__(self, config: PoolConfig, folder: str | os.PathLike = ".", device: str | torch.device = "cpu") -> None:
        if unknown := [rung.name for rung in config.rungs if rung.name not in config.measured]:
            raise ValueError(
                f"rung {unknown[0]!r} has no entry in measured, which anee pool make writes: nobody knows its cost"
            )
        self.config = config
        self.failed: dict[str, str] = {}  # rungs that could not be loaded, and why
        self._loader = Loader(Path(folder), device)
        self._names = sorted(config.measured, key=lambda name: config.measured[name].bytes_per_token)

    @classmethod
    def from_pretrained(cls, place: str | os.PathLike, device: str | torch.device = "cpu", **kwargs: Any) -> "AneePool":
        """A pool from its file, its folder or a repository of the Hub (`revision=`, `token=`, ... say more of that).

        Raises:
            OSError: there is no such pool.
            ValueError: something in it is not allowed.
        """
        path = find_config(place, **kwargs)
        return cls(read_config(path), path.parent, device)

    @property
    def dearest(self) -> float:
        """Bytes per token of the dearest rung, of which budgets are shares."""
        return max(measured.most_bytes_per_token for measured in self.config.measured.values())

    def affordable(self, energy_budget: float | None, policy: Policy) -> list[str]:
        """Rungs of which no token can cost more than a budget, with what the policy runs before; the cheapest first."""
        most = {name: self.config.measured[name].most_bytes_per_token for name in self._names}
        if energy_budget is None:
            return list(self._names)
        before = most[self.config.glance] if policy.looks and self.config.glance else 0.0
        if policy.asks_confidence and self.config.cascade:
            cheap = self.config.cascade.cheap
            extra = {name: before if name == cheap else before + most[cheap] for name in self._names}
        else:
            extra = dict.fromkeys(self._names, before)
        return [name for name in self._names if most[name] + extra[name] <= energy_budget * self.dearest * (1 + 1e-9)]

    def generate(
        self,
        requests: Request | Sequence[Request],
        energy_budget: float | None = None,
        policy: str | None = None,
        price: float | None = None,
        **kwargs: Any,
    ) -> PoolOutput:
        """Serve requests, one after the other.

        Args:
            requests: a text to go on from, or messages of a chat; or several of these.
            energy_budget: bytes of weights that a token may cost, as a share of those of the dearest rung, in [0, 1]. What
                runs before the serving rung counts, at that rung's tokens; under `energy` nothing does, and the budget is
                never exceeded. Default: no limit.
            policy: one of `POLICIES`; default: the pool's.
            price: which fit of `learned` and `mixture`; default: the pool's.
            kwargs: those of `generate` of transformers, for every rung.

        Raises:
            NoRungError: a ValueError: the budget affords no rung, or all that it affords have failed; says which costs what.
            ValueError: an unknown policy, or one without settings; a budget out of [0, 1].
        """
        if energy_budget is not None:
            check_budget(energy_budget)
        name = policy or self.config.policy
        chosen = policy_of(self.config, name, price)
        served = [_Serving(self, name, chosen, energy_budget, request).serve(kwargs) for request in _as_list(requests)]
        return PoolOutput(
            [answer.text for answer, _ in served],
            [decision for _, decision in served],
            [answer.trace for answer, _ in served],
            [answer.prompt for answer, _ in served],
        )

    def __call__(self, requests: Request | Sequence[Request], **kwargs: Any) -> list[dict[str, Any]]:
        """As a pipeline: for each request `generated_text`, prompt included, with `rung` and `reason`."""
        output, listed = self.generate(requests, **kwargs), _as_list(requests)
        return [
            {"generated_text": _joined(request, text), "rung": decision.rung, "reason": decision.reason}
            for request, text, decision in zip(listed, output.texts, output.decisions, strict=True)
        ]

    def rung(self, name: str) -> AnyRung:
        """A rung, loaded if it is not yet; one that could not be loaded is not tried again.

        Raises:
            RungFailure: it can't be loaded.
        """
        if name in self.failed:
            raise RungFailure(self.failed[name])
        try:
            return self._loader.load(self.config.rung(name))
        except Exception as error:
            if not (isinstance(error, OSError | ValueError | ImportError) or is_out_of_memory(error)):
                raise
            self.failed[name] = f"rung {name} can't be loaded: {error}"
            logger.warning(self.failed[name])
            raise RungFailure(self.failed[name]) from error


class RungFailure(Exception):
    """A rung that can't serve, and why."""


class _Serving:
    """One request on its way."""

    def __init__(self, pool: AneePool, name: str, policy: Policy, energy_budget: float | None, request: Request) -> None:
        self._pool, self._name, self._policy = pool, name, policy
        self._budget, self._request = energy_budget, request
        self._failures: dict[str, str] = {}  # by rung
        self._passes: list[str] = []
        self._work = 0.0
        self._glance: Glance | None = None

    def serve(self, kwargs: dict[str, Any]) -> tuple[Answer, Decision]:
        """The answer of the first rung that the policy wants and that can give one."""
        policy = self._policy
        while True:
            case = Case(text_of(self._request), self._left(policy), self._pool.config.measured, self._take_look)
            try:
                choice = policy.choose(case)
                answer = self._run(choice.rung, policy.asks_confidence, kwargs)
            except LookFailure:  # without features, what is known of the rungs is left to go by
                policy = EnergyPolicy()
                continue
            except RungFailure:
                continue
            second = None if answer.confidence is None else policy.reconsider(case, answer.confidence)
            if second is not None and second.rung != choice.rung:
                answer, choice = self._second(choice, second, answer, kwargs)
            return answer, self._decision(choice, answer)

    def _left(self, policy: Policy) -> list[str]:
        affordable = self._pool.affordable(self._budget, policy)
        left = [name for name in affordable if name not in self._failures]
        if left:
            return left
        measured = self._pool.config.measured
        costs = (f"{name} {one.most_bytes_per_token / self._pool.dearest:.3f}" for name, one in measured.items())
        known = f"energy_budget={self._budget} affords no rung under {self._name}: of the dearest rung, a token costs at most "
        message = "; ".join(self._failures.values()) if affordable else known + ", ".join(costs)
        raise NoRungError(message if affordable else f"{message}, and what runs before counts")

    def _take_look(self) -> Glance:
        if self._glance is not None:
            return self._glance
        name = self._pool.config.glance
        if name is None:
            raise ValueError(f"policy {self._name!r} looks at features, and the pool names no rung that looks (glance)")
        try:
            self._glance = self._try(name, lambda rung: rung.glance(text_of(self._request)))
        except RungFailure as error:
            raise LookFailure from error
        self._passes.append(name)
        self._work += self._glance.work
        return self._glance

    def _run(self, name: str, with_confidence: bool, kwargs: dict[str, Any]) -> Answer:
        return self._try(name, lambda rung: rung.generate(self._request, with_confidence, **kwargs))

    def _second(self, first: Choice, second: Choice, answer: Answer, kwargs: dict[str, Any]) -> tuple[Answer, Choice]:
        """The answer of the second rung of a cascade, or the first one's if that fails."""
        try:
            other = self._run(second.rung, False, kwargs)
        except RungFailure:
            return answer, Choice(first.rung, f"{second.reason}, and {second.rung} has failed")
        self._passes.append(first.rung)
        self._work += answer.work
        return other, second

    def _try(self, name: str, use: Callable[[AnyRung], Any]) -> Any:
        """What a rung gives; an error of its own is noted, one of the user's is not caught."""
        try:
            return use(self._pool.rung(name))
        except RungFailure as error:
            self._failures[name] = str(error)
            raise
        except Exception as error:
            if not (isinstance(error, NoChatTemplate) or is_out_of_memory(error)):
                raise
            self._failures[name] = f"rung {name} failed: {error or type(error).__name__}"
            logger.warning(self._failures[name])
            raise RungFailure(self._failures[name]) from error

    def _decision(self, choice: Choice, answer: Answer) -> Decision:
        cost = (self._work + answer.work) / answer.tokens
        return Decision(
            rung=choice.rung,
            policy=self._name,
            reason=choice.reason,
            energy_budget=self._budget,
            bytes_per_token=cost,
            share=cost / self._pool.dearest,
            passes=list(self._passes),
            failures=list(self._failures.values()),
            figures=dict(choice.figures),
        )


class LookFailure(Exception):
    """The rung that looks at requests can't."""


def text_of(request: Request) -> str:
    """The text that features are of: of messages, what they say, a line each."""
    return request if isinstance(request, str) else "\n".join(str(message["content"]) for message in request)


def _as_list(requests: Request | Sequence[Request]) -> list[Request]:
    if isinstance(requests, str):
        return [requests]
    listed: list[Any] = list(requests)
    return [listed] if listed and isinstance(listed[0], dict) else listed


def _joined(request: Request, text: str) -> Any:
    if isinstance(request, str):
        return request + text
    return [*request, {"role": "assistant", "content": text}]
