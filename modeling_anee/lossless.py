"""Lossless decoding: a cheap plan drafts tokens, one call of the full model verifies them.

What comes out are the tokens of budget 1.0, or draws from exactly its distribution (speculative decoding, arXiv:2211.17192).
Drafts and full model share one cache: what a draft has written there is forgotten before its tokens are verified, so only keys
and values of the full model stay. Tokens are settled one after the other, as in plain decoding: logits processors and stopping
criteria see what they would see there.

Shapes: B rows, T tokens, k tokens of a draft, V tokens of the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .compatibility import cache_argument
from .draft_plans import full_plan
from .draft_policy import EDGES, MOST, DraftPolicy
from .execution_log import execution_log
from .feed import Feed, StraightPlan
from .ledger import Ledger
from .lossless_account import LosslessAccount
from .positions import token_places
from .speculation import accept, is_near_tie, largest_two
from .step import Step


OF_TRANSFORMERS = "transformers.generation.logits_process"
REMEMBERING = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


@dataclass
class Request:
    """What `generate` hands to a decoding loop."""

    ids: Any  # int64 [B, T]
    processors: LogitsProcessorList
    criteria: Any
    config: Any
    streamer: Any = None


@dataclass
class Draft:
    """Tokens int64 [B] of a draft, the probabilities [B, V] they were drawn with, if any, and margins of each row."""

    tokens: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    margins: list[list[float]] = field(default_factory=list)

    def judged(self, row: int, count: int) -> list[float]:
        """Margins of the first tokens of a row."""
        return [margins[row] for margins in self.margins[:count]]


class LosslessDecoding:
    """One generation, after its prompt.

    Args:
        model: an `AneeForCausalLM`.
        feed: brings tokens into the model.
        policy: how many tokens are drafted, and in which plan.
        request: of `generate`.
        account: is kept up to date.
    """

    def __init__(self, model: Any, feed: Feed, policy: DraftPolicy, request: Request, account: LosslessAccount) -> None:
        self._model, self._feed, self._policy, self.account = model, feed, policy, account
        self._full: StraightPlan = full_plan(model)
        self._ids: Any = request.ids
        self._processors, self._criteria = request.processors, request.criteria
        self._streamer, config = request.streamer, request.config
        account.rows = rows = len(request.ids)
        self._draws, self._longest = config.do_sample, config.max_length
        wanted = config.return_dict_in_generate
        self._scores: tuple | None = () if wanted and config.output_scores else None
        self._logits: tuple | None = () if wanted and config.output_logits else None
        self._running = [True] * rows  # rows that have not ended
        self._pad = config._pad_token_tensor
        self._ends = [ids for one in request.criteria if isinstance(one, EosTokenCriteria) for ids in one.eos_token_id.tolist()]
        self._pads = any(hasattr(one, "eos_token_id") for one in request.criteria)
        # Where only the last token and the length end a row, several tokens can be looked at together.
        self._at_once = rows == 1 and all(isinstance(one, EosTokenCriteria | MaxLengthCriteria) for one in request.criteria)
        self._plainly = not (self._draws or request.processors or self._scores is not None or self._logits is not None)
        self._for_drafts = LogitsProcessorList(filter(_forgets, request.processors))
        self._on_cpu = request.ids.device.type == "cpu"
        self._again = False  # whether the next token is to be decoded alone
        self._discarded = 0.0  # cost of a row

    def run(self, logits: Tensor) -> GenerateDecoderOnlyOutput:
        """Decode to the end, from the logits [B, 1, V] that the prompt has left."""
        feed, begin, draft = self._feed, self._feed.past, Draft()
        while True:
            settled = self._settle(logits, draft) if self._plainly else self._settle_in_turn(logits, draft)
            rejected = len(draft.tokens) + 1 - settled
            feed.rewind(rejected)
            self._discarded += rejected * self._full.cost
            if not any(self._running):
                break
            draft = self._drafted()
            logits = feed.run(torch.cat([self._ids[:, -1:], *(one.unsqueeze(1) for one in draft.tokens)], dim=1), self._full)
            self.account.verifies += 1
            self.account.verified += logits.shape[0] * logits.shape[1]
        self._log(begin)
        return GenerateDecoderOnlyOutput(
            sequences=self._ids, scores=self._scores, logits=self._logits, **cache_argument(feed.cache)
        )

    @property
    def _followed(self) -> list[bool]:
        """Rows whose next token matters: those that have ended get padding, or go on where nothing is known to pad with."""
        return self._running if self._pads else [True] * len(self._running)

    def _drafted(self) -> Draft:
        """A draft of the next tokens; none where the next one is better decoded alone."""
        draft, policy, account = Draft(), self._policy, self.account
        if self._again or not policy.pays:
            if not self._again and not account.plain:
                account.plain = f"after {account.tokens // account.rows} new tokens drafts no longer seemed to be faster"
            self._again = False
            return draft
        ids, chance, most = self._ids, 1.0, self._longest - self._ids.shape[1] - 1
        plan, token = policy.current.plan, ids[:, -1:]
        while policy.goes_on(len(draft.tokens), chance, min(most, MOST)):
            scores = self._feed.run(token, plan)[:, -1]
            if self._for_drafts or self._draws:
                scores = self._for_drafts(ids, scores.to(torch.float32, copy=True))
            drafted, top, second = largest_two(scores)
            if self._draws:
                draft.probabilities.append(scores.softmax(dim=-1))
                drafted = torch.multinomial(draft.probabilities[-1], num_samples=1).squeeze(1)
            token = drafted.unsqueeze(1)
            if self._for_drafts:
                ids = torch.cat((ids, token), dim=1)
            # Elsewhere than on a CPU reading them would have to wait for the device.
            margins = (top - second).tolist() if self._on_cpu else [0.0] * len(ids)
            draft.tokens.append(drafted)
            draft.margins.append(margins)
            if self._at_once and self._on_cpu and int(drafted) in self._ends:
                break
            chance *= math.prod(policy.chance(one) for one, runs in zip(margins, self._followed, strict=True) if runs)
        count = len(draft.tokens)
        self._feed.rewind(count)
        self._discarded += count * plan.cost
        account.drafted += count * sum(self._followed)
        account.drafting += count * len(ids) * plan.cost
        account.drafting_read += count * len(ids) * plan.weights_read
        account.plan = plan.text if count else account.plan
        return draft

    def _settle(self, logits: Tensor, draft: Draft) -> int:
        """How many of the tokens [B, k + 1] that logits [B, k + 1, V] make likeliest are right; these are added."""
        rows, tokens = logits.shape[:2]
        followed = self._followed
        found, top, second = largest_two(logits.flatten(0, 1))
        near = is_near_tie(top, second).long()
        parts = [found.view(rows, -1), near.view(rows, -1), *(one.unsqueeze(1) for one in draft.tokens)]
        read = [row for row, runs in zip(torch.cat(parts, dim=1).tolist(), followed, strict=True) if runs]  # the one wait
        kept = [_agreeing(row[2 * tokens :], row) for row in read]
        settled = min(kept) + 1
        if tokens > 1:
            ties = min(_first(row[tokens : 2 * tokens]) for row in read)
            self._again = ties < settled
            settled = min(ties, settled)
        else:
            self.account.near_ties += sum(row[1] for row in read)
        added = self._add(found.view(rows, -1)[:, :settled], read[0][:settled])
        self.account.accepted += sum(min(count, added) for count in kept)
        own = [row for row, runs in enumerate(followed) if runs]
        self._learn(draft, {row: (min(count, settled), settled) for row, count in zip(own, kept, strict=True)})
        return added

    def _settle_in_turn(self, logits: Tensor, draft: Draft) -> int:
        """The same for any way to choose tokens, one position after the other."""
        count, looked = len(draft.tokens), {row: (0, 0) for row, runs in enumerate(self._followed) if runs}
        for place in range(count + 1):
            followed = self._followed
            raw = logits[:, place].to(torch.float32, copy=True)
            scores = self._processors(self._ids, raw)
            tokens, same = self._choose(scores, draft, place)
            if self._scores is not None:
                self._scores += (scores,)
            if self._logits is not None:
                self._logits += (raw,)
            agreed = [a and b for a, b in zip(same.tolist(), followed, strict=True)]
            looked |= {row: (kept + agreed[row], seen + 1) for row, (kept, seen) in looked.items() if followed[row]}
            self._add_one(tokens)
            if agreed != followed or not any(self._running):
                break
        self.account.accepted += sum(kept for kept, _ in looked.values())
        self._learn(draft, looked)
        return place + 1

    def _choose(self, scores: Tensor, draft: Draft, place: int) -> tuple[Tensor, Tensor]:
        """The next tokens int64 [B] by scores [B, V], and where they are those of the draft at a place, bool [B]."""
        drafted = draft.tokens[place] if place < len(draft.tokens) else None
        if not self._draws:
            tokens, top, second = largest_two(scores)
            self.account.near_ties += int(is_near_tie(top, second).sum())
            return tokens, torch.zeros_like(tokens, dtype=torch.bool) if drafted is None else tokens == drafted
        probabilities = scores.softmax(dim=-1)
        if drafted is not None:
            return accept(drafted, draft.probabilities[place], probabilities)
        tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)

    def _learn(self, draft: Draft, looked: dict[int, tuple[int, int]]) -> None:
        """Note what became of a draft: by row, how many of its tokens were kept, and how many were looked at."""
        if draft.tokens:
            drafted, kept = self.account.by_margin.setdefault(self.account.plan, [[0] * (len(EDGES) + 1) for _ in range(2)])
            self._policy.note([(draft.judged(row, seen), good) for row, (good, seen) in looked.items()], drafted, kept)

    def _add(self, found: Tensor, first: list[int]) -> int:
        """Add tokens [B, n], of which those of the first row are known, up to where all rows have ended; how many."""
        if not self._at_once:
            for place, tokens in enumerate(found.unbind(dim=1)):
                self._add_one(tokens)
                if not any(self._running):
                    return place + 1
            return found.shape[1]
        added = first[: self._longest - self._ids.shape[1]]
        added = added[: next((place + 1 for place, token in enumerate(added) if token in self._ends), None)]
        if added:
            self._ids = torch.cat((self._ids, found[:, : len(added)]), dim=1)
            self.account.tokens += len(added)
            self._stream(found[:, : len(added)])
            self._running = [not bool(self._criteria(self._ids, self._scores))]
        return len(added)

    def _add_one(self, tokens: Tensor) -> None:
        """Add a token int64 [B] to each row, as plain decoding does."""
        if self._pads and not all(self._running):
            tokens = torch.where(torch.tensor(self._running, device=tokens.device), tokens, self._pad.to(tokens.device))
        self._ids = torch.cat((self._ids, tokens.unsqueeze(1)), dim=1)
        self.account.tokens += sum(self._followed)
        ended = self._criteria(self._ids, self._scores).tolist()
        self._running = [runs and not end for runs, end in zip(self._running, ended, strict=True)]
        self._stream(tokens.unsqueeze(1))

    def _stream(self, tokens: Tensor) -> None:
        """Hand tokens [B, n] to a streamer one by one."""
        if self._streamer is not None:
            for own in tokens.cpu().unbind(dim=1):
                self._streamer.put(own)

    def _log(self, begin: int) -> None:
        """Note the tokens in the cache from the one at `begin` on, and what else was spent."""
        model, feed = self._model, self._feed
        log, rows, tokens = execution_log(feed.cache), len(self._ids), feed.past - begin
        log.spend(self._discarded)
        if tokens:
            shape = rows, tokens, model.config.num_layers
            ledger = Ledger.begin(shape, model.costs, model.controller.dearest)
            ledger.spent += model.costs.of_actions(ledger.actions)
            step = Step(
                budget=torch.ones(rows, tokens, dtype=torch.float64, device="cpu"),
                places=token_places(feed.mask_of(feed.past), None, begin, rows, tokens, has_cache=True),
                rotations=[],
                masks=[],
                cache=feed.cache,
                past=begin,
                account=log.account,
            )
            log.append(model.executor.trace_of(step, ledger), begin)


def _agreeing(drafted: Sequence[int], likeliest: Sequence[int]) -> int:
    """How many of the drafted tokens are the likeliest ones, up to the first that is not."""
    return next((place for place, token in enumerate(drafted) if token != likeliest[place]), len(drafted))


def _first(flags: Sequence[int]) -> int:
    """The place of the first that is set; their number where none is."""
    return next((place for place, flag in enumerate(flags) if flag), len(flags))


def _forgets(processor: Any) -> bool:
    """Whether a logits processor can be asked about drafts as well: what others keep in mind must be what is settled."""
    kind = type(processor)
    return kind.__module__ == OF_TRANSFORMERS and kind.__name__ not in REMEMBERING
