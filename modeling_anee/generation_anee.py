"""`generate` with an energy budget: how the budget reaches each forward, and how the trace comes back."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from .budget import TOLERANCE, budget_tensor
from .budget_following import Following
from .cache import AneeCache
from .capacity import CAPACITY, budgets_of, first_given
from .checks import one_of
from .compatibility import CACHE, BothCacheNames, cache_argument, cache_of, rename_cache
from .draft_policy import DraftPolicy
from .dropping import check_ceiling, default_budget
from .execution_log import execution_log
from .feed import Feed
from .generation_state import NEVER, GenerationState, NotingCriteria, generation_of, running
from .lossless import LosslessDecoding, Request
from .lossless_account import LosslessAccount
from .lossless_choice import policy_of, why_plain
from .speed_search import FoundSpeedup
from .target_speedup import Prompts, set_target_speedup
from .thread_choice import begin_choice
from .trace import ExecutionTrace


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

BUDGETS = ("energy_budget", "prompt_energy_budget", "budget_feedback")
LOSSLESS = "lossless"


@dataclass
class AneeGenerateOutput(BothCacheNames, GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`; `execution` covers prompt and new tokens but the last."""

    execution: ExecutionTrace | None = None


@dataclass
class AneeGenerateBeamOutput(BothCacheNames, GenerateBeamDecoderOnlyOutput):
    """The same for beam search; `execution` is that of the returned sequences."""

    execution: ExecutionTrace | None = None


class AneeGenerationMixin(GenerationMixin):
    """Carries budgets through `generate` and collects execution traces."""

    def generate(self, *args: Any, **kwargs: Any) -> Tensor | ModelOutput:
        """As `GenerationMixin.generate`, with five keyword arguments more.

        `energy_budget` is the share of the whole model's work to spend, in [0, 1]: a number, or one per row; or a
        `BudgetSource`, or any function of a `Progress` (`budget_sources.py`), that is asked before each token. With a `gated`
        controller `capacity` can be given instead: the share of the feed-forwards to run, in [0.1, 1].
        `prompt_energy_budget` is the same for the tokens of the prompt; default: as `energy_budget`. `budget_feedback`, in
        [0, 1], is by how much of the sum that the new tokens have under- or overspent so far the next token's budget is moved.

        `lossless=True` gives the tokens of budget 1.0, or draws from exactly its distribution, faster: a cheap plan drafts
        them, one call of the full model verifies several (`lossless.py`). Whatever budgets are set as defaults don't hold then.
        Where that can't be, or is expected to be slower, tokens are decoded one by one at budget 1.0, a warning says why, and
        so does `execution.lossless`.

        Each of them is taken from the first place that has it: the argument, the entry of that name in the
        `generation_config` argument, in `model.generation_config` (which is saved and loaded with the model), in
        `model.config`. They hold for every forward of this model inside, also for one by a logits processor.

        A cache goes by the name `cache` or `past_key_values`, on every supported release of transformers.

        Returns:
            token ids, or an output with `.execution` (an `ExecutionTrace`) if `return_dict_in_generate=True`; what ran for a
            row after its last token is not in it.

        Raises:
            ValueError: a budget or feedback out of [0, 1], or not one per row; a capacity of another kind of controller, or
                beside a budget; a budget that needs weights which were dropped; feedback or a source without a cache, which
                keeps the costs; feedback in strict mode, or beside a source; `lossless` beside a budget, or an assistant; a
                keyword that nobody knows; `compile_config` and `assistant_early_exit`.
        """
        state = GenerationState(self)
        with running(state):
            output = super().generate(*args, **rename_cache(kwargs))
        if state.lossless is not None and not (state.lossless.plain or state.lossless.tokens):
            self._decode_plainly(state, "this way of decoding has no drafts (beams, an assistant or prompt lookup)")
        return self._with_execution(output, state) if isinstance(output, ModelOutput) else output

    def _with_execution(self, output: ModelOutput, state: GenerationState) -> ModelOutput:
        cache = cache_of(output)
        fields = {name: output[name] for name in output}
        if isinstance(output, GenerateBeamDecoderOnlyOutput):
            steps = state.steps if cache is None else execution_log(cache).steps
            trace = beam_trace(steps, output.beam_indices)
            return AneeGenerateBeamOutput(**fields, execution=replace(trace, lossless=state.lossless))
        if cache is None:  # every step ran the whole sequence again: the last one has all tokens
            trace, places = state.steps[-1], torch.arange(state.steps[-1].cost.shape[1], device="cpu")
        else:
            trace, places = execution_log(cache).whole, execution_log(cache).places
        trace = replace(state.without_ended(trace, places), lossless=state.lossless)
        return AneeGenerateOutput(**fields, execution=trace)

    def set_target_speedup(
        self,
        target: float,
        prompts: Prompts | None = None,
        new_tokens: int = 32,
        rounds: int = 3,
        reference: str = "dense",
    ) -> FoundSpeedup:
        """Find the highest budget that decodes so many times faster on this machine, and make it the default.

        Every budget that is tried decodes greedily in turn with the reference; what counts is the median of the rounds' ratios,
        after one uncounted round, the prompt's own time left out. The budget becomes `config.energy_budget`, and that of
        `generation_config` where this has one; both are saved with the model. Random numbers to come stay what they were.

        Args:
            target: how many times faster than the reference, at least 1.
            prompts: what to decode from: token ids int64 [B, T], or what a tokenizer returns; default: one row of 16 random
                tokens. What `learned`, `routed` and `confidence` run depends on the text: give them some of yours.
            new_tokens: tokens to decode in each run, at least 2.
            rounds: runs that count, of each budget and of the reference beside it.
            reference: `"dense"`, this model at budget 1.0, or `"base"`, the plain base.

        Returns:
            the budget, its measured speed, and all that was tried.

        Raises:
            TargetNotReached: a ValueError that names the best speed measured, and its budget; the model stays as it was.
            ValueError: a bad argument, or full weights that were dropped.
        """
        return set_target_speedup(self, target, prompts, new_tokens, rounds, reference)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching packs rows into one and would ignore their budgets."""
        raise NotImplementedError(
            "continuous batching (generate_batch, cache_implementation='paged') is not supported: it packs all rows into one "
            "sequence and would ignore energy_budget; use generate with a padded batch"
        )

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name, None) for name in (*BUDGETS, CAPACITY, LOSSLESS)}
        own: Any = generation_config
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if generation_config.compile_config is not None:
            raise ValueError("compile_config is not supported: what is run depends on the data; leave it out")
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit={generation_config.assistant_early_exit} is not supported: give an assistant_model"
            )
        if (state := generation_of(self)) is not None:
            configs = (partial(getattr_or_none, config) for config in (own, generation_config))
            state.capacity = first_given([given.get, *configs])
            state.source = first_source(given["energy_budget"], getattr_or_none(generation_config, "energy_budget"))
            for name in BUDGETS:
                values = (given[name], getattr_or_none(generation_config, name))
                value = next((value for value in values if value is not None and value is not state.source), None)
                state.given[name] = self._default(name) if value is None else value
            told = any(given[name] is not None for name in (*BUDGETS, CAPACITY))  # by the call itself, which defaults yield to
            default = None if told else getattr(generation_config, LOSSLESS, None)
            lossless = default if given[LOSSLESS] is None else given[LOSSLESS]
            one_of(LOSSLESS, False if lossless is None else lossless, (True, False))
            if lossless and not generation_config.is_assistant:
                self._run_in_full(state, given)
        return generation_config, model_kwargs

    @staticmethod
    def _run_in_full(state: GenerationState, given: dict[str, Any]) -> None:
        """Draft, and let no budget hold but 1.0.

        Raises:
            ValueError: the call itself has another.
        """
        for name in (*BUDGETS, CAPACITY):
            if given[name] is not None and not (name == BUDGETS[0] and given[name] == 1.0):
                raise ValueError(f"lossless=True gives the tokens of budget 1.0: leave {name}={given[name]!r} out")
        state.given, state.capacity, state.lossless = {BUDGETS[0]: 1.0, BUDGETS[2]: 0.0}, None, LosslessAccount()
        state.source = None

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling: with drafts where they were asked for and are expected to pay."""
        state = generation_of(self)
        if state is not None and state.lossless is not None:
            cache, account = model_kwargs.get(CACHE), state.lossless
            if reason := why_plain(self, cache, generation_config, synced_gpus):
                self._decode_plainly(state, reason)
            elif (policy := self._policy(state, len(input_ids), generation_config.do_sample)) is not None:
                request = Request(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
                outputs = self._prefill(input_ids, generation_config, model_kwargs)
                model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
                feed = Feed(self.stack, cache, model_kwargs["position_ids"][:, -1:], model_kwargs.get("attention_mask"))
                output = LosslessDecoding(self, feed, policy, request, account).run(outputs.logits[:, -1:])
                if streamer is not None:
                    streamer.end()
                return output if generation_config.return_dict_in_generate else output.sequences
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )

    def _policy(self, state: GenerationState, rows: int, draws: bool) -> DraftPolicy | None:
        """How to draft; None where that is not possible, or not expected to pay, which is said."""
        self.prepare()
        try:
            policy = policy_of(self, rows, draws)
        except ValueError as error:
            self._decode_plainly(state, f"the base can't be run in a plan that drafts: {error}")
            return None
        if policy.pays:
            return policy
        at_once = f" for {rows} rows at once" if rows > 1 else ""
        said = f"drafts in {policy.current.plan.text} are expected to be {policy.speed:.2f} times as fast{at_once}"
        self._decode_plainly(state, said)
        return None

    @staticmethod
    def _decode_plainly(state: GenerationState, reason: str) -> None:
        """Say why nothing is drafted."""
        assert state.lossless is not None
        state.lossless.plain = reason
        logger.warning_once(f"lossless=True decodes token by token at budget 1.0 here: {reason}")

    def _default(self, name: str) -> Any:
        """What holds where neither the call nor a generation config says anything."""
        value = getattr(self.config, name)
        is_budget = name != "budget_feedback" and value is not None
        return default_budget(value, self.controller.ceiling) if is_budget else value

    def _prepare_model_inputs(self, inputs: Tensor | None, bos_token_id: Tensor | None, model_kwargs: dict[str, Any]) -> Any:
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if (state := generation_of(self)) is not None:
            rows, state.prompt_length = inputs.shape[:2]
            if input_name == "inputs_embeds":
                state.embedded = state.prompt_length - model_kwargs["input_ids"].shape[1]
            self._set_budgets(state, rows)
        return inputs, input_name, model_kwargs

    def _set_budgets(self, state: GenerationState, rows: int) -> None:
        """Turn what was asked for into one number a row."""
        if state.capacity is not None:
            state.given["energy_budget"] = budgets_of(self.controller, self.config.controller, state.capacity, rows)
        given = {name: value for name, value in state.given.items() if value is not None}
        values = {name: budget_tensor(value, rows, name) for name, value in given.items()}
        for name in set(values) - {"budget_feedback"}:
            check_ceiling(values[name], self.controller.ceiling, name)
        if state.source is not None:
            begin = getattr(state.source, "begin", None)
            ask = state.source if begin is None else begin(self)
            budget = float(values["energy_budget"].mean())
            choice = begin_choice() if getattr(state.source, "change_threads", False) and self.device.type == "cpu" else None
            state.following = Following(ask, state.begun, budget, state.prompt_length, self.controller.floor, choice)
        state.budget, state.prompt_budget = values["energy_budget"], values.get("prompt_energy_budget")
        if values["budget_feedback"].any():
            state.feedback = values["budget_feedback"]
            if state.source is not None:
                raise ValueError(f"budget_feedback is not possible with energy_budget={state.source!r}, which knows the costs")
            if self.config.budget_mode == "strict":
                raise ValueError("budget_feedback is not possible with budget_mode='strict': no token may make up for another")
        floor, lowest = self.controller.floor, float(state.budget.min())
        if lowest < floor - TOLERANCE:
            logger.warning_once(
                f"energy_budget={lowest:.3g} is below what this {self.config.controller!r} controller can reach: "
                f"generation will cost about {floor:.3g}"
            )

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        if (state := generation_of(self)) is not None:
            state.expand(expand_size)
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria, state = super()._get_stopping_criteria(*args, **kwargs), generation_of(self)
        if state is None:
            return criteria
        if state.following is not None:
            state.following.limit = (criteria.max_length or NEVER) - state.prompt_ids
        return NotingCriteria(criteria, state)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        dynamic = generation_config.cache_implementation in (None, "dynamic")
        if model_kwargs.get(CACHE) is None and dynamic and generation_config.use_cache is not False:
            model_kwargs |= cache_argument(AneeCache(self.stack.blocks))
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False  # control flow depends on the data

    def create_masks_for_generate(self, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Keep the 2D mask: the forward makes its own, and needs to know which tokens are padding."""
        return attention_mask

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: dict, *args: Any, **kwargs: Any) -> dict:
        if cache_of(outputs) is None and (state := generation_of(self)) is not None:
            state.steps.append(outputs.execution)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


def first_source(*values: Any) -> Any:
    """The first value that was given, if it is a source of budgets."""
    first = next((value for value in values if value is not None), None)
    return first if callable(first) else None


def getattr_or_none(config: Any, name: str) -> Any:
    """What a generation config says, if anything."""
    return getattr(config, name, None)


def beam_trace(steps: list[ExecutionTrace], beam_indices: Tensor) -> ExecutionTrace:
    """Trace of returned beams, by following each through the steps.

    Args:
        steps: traces of the forwards, rows as they were then: [beams, T_0, L] for the prompt, then one or more tokens.
        beam_indices: row that each new token was chosen from, int [sequences, new tokens]; -1 after the end.
    """
    used = (beam_indices >= 0).cpu()
    rows = beam_indices.clamp(min=0).cpu().long()
    parts = [steps[0].rows(rows[:, 0])]
    for token in range(1, rows.shape[1]):
        part = steps[token].tokens(-1, None).rows(rows[:, token])
        parts.append(part.keep(used[:, token : token + 1]))
    return ExecutionTrace.concatenate(parts)
