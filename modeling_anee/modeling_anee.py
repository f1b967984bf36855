"""The models: a frozen causal LM whose layers are processed, skipped or left early, token by token, under a budget.

`AneeModel` is the core that all heads share: what enters the stack, the executor, what leaves it. What runs is in
`executor.py`; building, loading and saving in `pretrained.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .budget import budget_tensor
from .cache import AneeCache
from .capacity import budgets_of, check_one
from .compatibility import BothCacheNames, cache_argument, cache_of, take_cache
from .configuration_anee import AneeConfig
from .dropping import check_ceiling, default_budget
from .execution_log import account_of, execution_log
from .forward_arguments import hidden_states_selected, loss_keywords
from .generation_anee import AneeGenerationMixin
from .generation_state import generation_of
from .positions import Mask, token_places
from .pretrained import AneePreTrainedModel
from .step import Step
from .trace import ExecutionTrace


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers


@dataclass
class AneeModelOutput(BothCacheNames, BaseModelOutputWithPast):
    """What leaves the final norm; `execution` says what was done with every token and what it cost.

    `logits`: of one token a row, [B, 1, V], where deciding what to do with it took them.
    """

    execution: ExecutionTrace | None = None
    logits: Tensor | None = None


@dataclass
class AneeCausalLMOutput(BothCacheNames, CausalLMOutputWithPast):
    """Output of a forward; `execution` says what was done with every token and what it cost."""

    execution: ExecutionTrace | None = None


class AneeModel(AneePreTrainedModel):
    """The stack of a frozen base under a budget, without a head."""

    @torch.compiler.disable  # what is run depends on the data
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        energy_budget: float | Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        actions: Tensor | None = None,
        capacity: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run B rows of T tokens through the stack and the final norm.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S], 0 for padding, S counting the cached tokens too; or a ready mask [B or 1, 1, T, S], or a
                dict of ready masks by layer type.
            position_ids: int64 [B or 1, T]; where they begin anew, without a mask and a cache, so does a sequence.
            past_key_values: any transformers cache; default: an `AneeCache`.
            inputs_embeds: token embeddings [B, T, D] instead of `input_ids`.
            use_cache: keep keys and values; default: the base's config.
            energy_budget: share of the whole model's work to spend, in [0, 1]: a number, one per row, or one per
                token [B, T]; default: that of the running `generate`, else `config.energy_budget`.
            output_hidden_states: return what enters each layer, and what the head reads; or those at one or some indices.
            output_attentions: refused, since skipped layers have none.
            return_dict: return an output object (default) or a tuple.
            cache: the same as `past_key_values`.
            actions: what to do with every token at every layer, uint8 [B, T, L], instead of what the controller decides.
            capacity: instead of `energy_budget`, with a `gated` controller: the share of the feed-forwards to run, in [0.1, 1].
            kwargs: what transformers passes to every model; see `forward_arguments.py`.

        Returns:
            hidden states [B, T, D] with `execution`, an `ExecutionTrace`.

        Raises:
            TypeError: a keyword that nobody knows.
            ValueError: a bad value.
        """
        self.prepare()
        loss_keywords(kwargs, position_ids)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_attentions:
            raise ValueError("output_attentions=True is not supported: skipped layers compute no attention")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = take_cache({"past_key_values": past_key_values, "cache": cache})
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and cache is None:
            cache = AneeCache(self.stack.blocks)
        check_one(capacity, energy_budget)
        hidden, step = self.begin(input_ids, inputs_embeds, attention_mask, position_ids, cache, energy_budget, capacity)
        kept: list[Tensor] | None = [] if output_hidden_states else None
        hidden, trace = self.executor.run(hidden, step, kept, actions)
        if cache is not None:
            execution_log(cache).append(trace, step.past)
        hidden = self.stack.final_norm(hidden)
        output = AneeModelOutput(
            last_hidden_state=hidden,
            hidden_states=None if kept is None else hidden_states_selected((*kept, hidden), output_hidden_states),
            execution=trace,
            logits=step.answers[0] if step.answers else None,
            **cache_argument(cache),
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def begin(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        energy_budget: float | Tensor | None = None,
        capacity: float | Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, Step]:
        """What enters the first layer [B, T, D], and the step to run it in; `forward` has the arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        stack = self.stack
        if isinstance(cache, AneeCache):
            cache.bind(stack.blocks)
        past = 0 if cache is None else int(cache.get_seq_length())
        embeddings = stack.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, tokens = embeddings.shape[:2]
        if capacity is not None:
            energy_budget = budgets_of(self.controller, self.config.controller, capacity, rows)
        places = token_places(attention_mask, position_ids, past, rows, tokens, has_cache=cache is not None)
        if position_ids is None:
            position_ids = stack.positions(attention_mask, past, tokens, embeddings.device)
        hidden = stack.add_positions(embeddings, position_ids, token_type_ids)
        budget = self._budgets(energy_budget, rows, tokens, past, cache).clamp(max=self.controller.ceiling)
        return hidden, Step(
            budget=(budget if budget.dim() == 2 else budget.unsqueeze(1)).expand(rows, tokens),
            places=places,
            rotations=stack.rotations(hidden, position_ids),
            masks=stack.masks(hidden, attention_mask, cache, position_ids),
            cache=cache,
            past=past,
            account=account_of(cache),
        )

    def _budgets(self, given: float | Tensor | None, rows: int, tokens: int, past: int, cache: Cache | None) -> Tensor:
        """Budgets float64 [B] or [B, T]: those given, of the running generation, or of the configuration."""
        state = generation_of(self)
        if given is None and state is not None and state.budget is not None:
            return state.budgets(rows, tokens, past, cache)
        if given is None:
            given = default_budget(self.config.energy_budget, self.controller.ceiling)
        budget = budget_tensor(given, rows)
        check_ceiling(budget, self.controller.ceiling)
        return budget


class AneeForCausalLM(AneeModel, AneeGenerationMixin):
    """A frozen base causal LM whose layers are processed, skipped or left early, token by token, under a budget.

    Build it with `from_base`, load it with `from_pretrained`.
    """

    _auto_class = "AutoModelForCausalLM"

    def make_heads(self) -> None:
        """Nothing is needed beside what all have.

        Raises:
            ValueError: the configuration is a classifier's.
        """
        if self.config.classifier is not None:
            raise ValueError(
                "the configuration has a classifier: load it with AneeForSequenceClassification or "
                "AutoModelForSequenceClassification; for its base as a language model, wrap that with AneeForCausalLM.from_base"
            )

    @torch.compiler.disable  # what is run depends on the data
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        energy_budget: float | Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        actions: Tensor | None = None,
        capacity: float | Tensor | None = None,
        **kwargs: Any,
    ) -> AneeCausalLMOutput | tuple:
        """Run B rows of T tokens, as the base's forward would, under a budget.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S], 0 for padding, S counting the cached tokens too; or a ready mask [B or 1, 1, T, S], or a
                dict of ready masks by layer type.
            position_ids: int64 [B or 1, T]; where they begin anew, without a mask and a cache, so does a sequence.
            past_key_values: any transformers cache; default: an `AneeCache`.
            inputs_embeds: token embeddings [B, T, D] instead of `input_ids`.
            labels: int64 [B, T], -100 where there is nothing to predict.
            use_cache: keep keys and values; default: the base's config.
            logits_to_keep: compute only the last so many logits (0: all), or those at these indices.
            energy_budget: share of the whole model's work to spend, in [0, 1]: a number, one per row, or one per
                token [B, T]; default: that of the running `generate`, else `config.energy_budget`.
            output_hidden_states: return what enters each layer, and what the head reads; or those at one or some indices.
            output_attentions: refused, since skipped layers have none.
            return_dict: return an output object (default) or a tuple.
            cache: the same as `past_key_values`.
            actions: what to do with every token at every layer, uint8 [B, T, L], instead of what the controller decides.
            capacity: instead of `energy_budget`, with a `gated` controller: the share of the feed-forwards to run, in [0.1, 1].
            kwargs: what the loss takes, and what transformers passes to every model; see `forward_arguments.py`.

        Returns:
            logits [B, T, V] with `execution`, an `ExecutionTrace`.

        Raises:
            TypeError: a keyword that nobody knows.
            ValueError: a bad value.
        """
        for_loss = loss_keywords(kwargs, position_ids)
        found: AneeModelOutput = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            energy_budget=energy_budget,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            cache=take_cache({"past_key_values": past_key_values, "cache": cache}),
            actions=actions,
            capacity=capacity,
        )
        hidden, trace = found.last_hidden_state, found.execution
        assert hidden is not None and trace is not None
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = last if isinstance(logits_to_keep, int) else logits_to_keep
        if found.logits is not None:
            logits = found.logits[:, kept]
        else:
            logits = self.head_logits(hidden[:, kept], None if trace.head is None else trace.head[:, kept])
        if self.training and torch.is_grad_enabled() and not logits.requires_grad:
            logits = self._with_gradient(logits, trace)
        loss = None
        if labels is not None:
            vocabulary = self.stack.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **for_loss)
        output = AneeCausalLMOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, execution=trace, **cache_argument(cache_of(found))
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def head_logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits [..., V] of what left the final norm [..., D], by heads in variants uint8 [...]; None: in full."""
        names = self.executor.table.heads
        places = [0] if head is None else head.unique().tolist() or [0]
        if head is None or len(places) == 1:
            return self.stack.head_of(names[places[0]])(hidden)
        which, flat = head.flatten().to(hidden.device), hidden.flatten(0, -2)
        groups = [(which == place).nonzero().squeeze(1) for place in places]
        parts = [self.stack.head_of(names[place])(flat[group]) for place, group in zip(places, groups, strict=True)]
        return torch.cat(parts)[torch.cat(groups).argsort()].view(*hidden.shape[:-1], -1)

    def _with_gradient(self, logits: Tensor, trace: ExecutionTrace) -> Tensor:
        """Logits that a backward may start from: a batch that teaches nothing must not end a training."""
        logger.warning_once(
            f"nothing that can be trained was run, at a mean cost of {trace.mean_cost:.3g}: train at an energy_budget that "
            "skips layers which have bridges (config.energy_budget, or a column energy_budget of the data)"
        )
        return logits + logits.new_zeros((), requires_grad=True)


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the installed classes, so no remote code is needed."""
    AutoConfig.register(AneeConfig.model_type, AneeConfig, exist_ok=True)
    AutoModelForCausalLM.register(AneeConfig, AneeForCausalLM, exist_ok=True)
