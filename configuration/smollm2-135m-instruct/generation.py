"""`generate` with an energy budget: how the budget reaches each forward, and how the trace comes back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput, logging

from .cache import AneeCache
from .configuration_anee import check_budget
from .controller import TOLERANCE
from .execution_log import ExecutionLog, execution_log
from .trace import ExecutionTrace


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

BUDGETS = ("energy_budget", "prompt_energy_budget", "budget_feedback")
OWN_KWARGS = (*BUDGETS, "prompt_length", "log")


@dataclass
class AneeGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`; `execution` covers prompt and new tokens but the last."""

    execution: ExecutionTrace | None = None


@dataclass
class AneeGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """The same for beam search; `execution` is that of the returned sequences."""

    execution: ExecutionTrace | None = None


def budget_tensor(value: float | Tensor | list, rows: int, name: str = "energy_budget") -> Tensor:
    """Budgets as a float64 tensor [B] or [B, T] on the CPU, from one number, one per row or one per token.

    Raises:
        ValueError: out of [0, 1], or not one per row.
    """
    if isinstance(value, bool | int | float):
        return torch.full((rows,), check_budget(value, name), dtype=torch.float64)
    try:
        budget = torch.as_tensor(value, dtype=torch.float64, device="cpu")  # a list in float32 would not be its numbers
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} is not allowed: it must be one number, or one for each row") from error
    if budget.dim() == 0:
        budget = budget.expand(rows)
    if budget.dim() > 2 or budget.shape[0] != rows:
        raise ValueError(
            f"{name} of shape {tuple(budget.shape)} is not allowed: it must be one number, or one for each of the {rows} rows"
        )
    if not bool(((budget >= 0) & (budget <= 1)).all()):
        raise ValueError(f"{name}={value!r} is not allowed: every value must be between 0 and 1")
    return budget


def moved_budget(budget: Tensor, feedback: Tensor, cost: Tensor, tokens: int) -> Tensor:
    """Budgets of the next token, float64 [B]; a budget of 1 stays what it is.

    Args:
        budget: what every token is asked to cost, float64 [B].
        feedback: by how much of what was under- or overspent so far the budget is moved, float64 [B].
        cost: what the tokens so far cost, float64 [B].
        tokens: how many they are.
    """
    moved = (budget + feedback * (tokens * budget - cost)).clamp(0.0, 1.0)
    return torch.where(budget < 1.0, moved, budget)


class AneeGenerationMixin(GenerationMixin):
    """Carries budgets through `generate` and collects execution traces."""

    def generate(self, *args: Any, **kwargs: Any) -> Tensor | ModelOutput:
        """As `GenerationMixin.generate`, with three keyword arguments more.

        `energy_budget` is the share of the decoder stack's work to spend, in [0, 1]: a number, or one per row.
        `prompt_energy_budget` is the same for the tokens of the prompt; default: as `energy_budget`. `budget_feedback`, in
        [0, 1], is by how much of the sum that the new tokens have under- or overspent so far the next token's budget is moved.

        Each of the three is taken from the first place that has it: the argument, the entry of that name in the
        `generation_config` argument, in `model.generation_config` (which is saved and loaded with the model), in
        `model.config`.

        Returns:
            token ids, or an output with `.execution` (an `ExecutionTrace`) if `return_dict_in_generate=True`.

        Raises:
            ValueError: a budget or feedback out of [0, 1], or not one per row; feedback without a cache, which keeps the costs,
                or in strict mode.
        """
        log = ExecutionLog()
        output = super().generate(*args, log=log, **kwargs)
        return self._with_execution(output, log) if isinstance(output, ModelOutput) else output

    def _with_execution(self, output: ModelOutput, log: ExecutionLog) -> ModelOutput:
        cache = output.past_key_values
        fields = {name: output[name] for name in output}
        if isinstance(output, GenerateBeamDecoderOnlyOutput):
            steps = (log if cache is None else execution_log(cache)).steps
            return AneeGenerateBeamOutput(**fields, execution=beam_trace(steps, output.beam_indices))
        # Without a cache every step runs the whole sequence again: the last one has all tokens.
        trace = log.steps[-1] if cache is None else execution_log(cache).trace
        return AneeGenerateOutput(**fields, execution=trace)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching packs rows into one and would ignore their budgets."""
        raise NotImplementedError(
            "continuous batching (generate_batch, cache_implementation='paged') is not supported: it packs all rows into one "
            "sequence and would ignore energy_budget; use generate with a padded batch"
        )

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name, None) for name in BUDGETS}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in given.items():
            if value is None:
                value = getattr(generation_config, name, None)
            model_kwargs[name] = getattr(self.config, name) if value is None else value
        return generation_config, model_kwargs

    def _prepare_model_inputs(self, inputs: Tensor | None, bos_token_id: Tensor | None, model_kwargs: dict[str, Any]) -> Any:
        budgets = {name: model_kwargs.pop(name, None) for name in BUDGETS}
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        own: dict[str, Any] = {"prompt_length": inputs.shape[1]}
        for name, value in budgets.items():
            if value is not None:
                own[name] = budget_tensor(value, inputs.shape[0], name)
        self._warn_below_floor(own["energy_budget"])
        if not own["budget_feedback"].any():
            del own["budget_feedback"]
        elif self.config.budget_mode == "strict":
            raise ValueError("budget_feedback is not possible with budget_mode='strict': no token may make up for another")
        return inputs, input_name, model_kwargs | own

    def _warn_below_floor(self, budget: Tensor) -> None:
        floor = self.controller.floor
        if float(budget.min()) < floor - TOLERANCE:
            logger.warning_once(
                f"energy_budget={float(budget.min()):.3g} is below what this {self.config.controller!r} controller can reach: "
                f"generation will cost about {floor:.3g}"
            )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        dynamic = generation_config.cache_implementation in (None, "dynamic")
        if model_kwargs.get("past_key_values") is None and dynamic and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = AneeCache(self.stack.blocks)
            return None
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.layer_class_to_replicate is None:
            execution_log(cache)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        energy_budget: Tensor | None = None,
        prompt_energy_budget: Tensor | None = None,
        budget_feedback: Tensor | None = None,
        prompt_length: int = 0,
        log: ExecutionLog | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one forward; tokens of the prompt get the prompt's budget, however often they are run."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if budget_feedback is not None and energy_budget is not None:
            if past_key_values is None:
                raise ValueError("budget_feedback is not possible with use_cache=False: the cache has the costs of the tokens")
            if past >= prompt_length:
                cost = execution_log(past_key_values).cost_since(prompt_length)
                energy_budget = moved_budget(energy_budget, budget_feedback, cost, past - prompt_length)
        inputs["energy_budget"] = energy_budget
        if prompt_energy_budget is not None and energy_budget is not None and past < prompt_length:
            tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            in_prompt = torch.arange(past, past + tokens.shape[1]) < prompt_length
            inputs["energy_budget"] = torch.where(in_prompt, prompt_energy_budget[:, None], energy_budget[:, None])
        return inputs

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False  # control flow depends on the data

    def create_masks_for_generate(self, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Keep the 2D mask: the forward makes its own, and needs to know which tokens are padding."""
        return attention_mask

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: dict, *args: Any, **kwargs: Any) -> dict:
        if outputs.past_key_values is None and model_kwargs.get("log") is not None:
            model_kwargs["log"].append(outputs.execution)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict, **kwargs: Any) -> Any:
        # An assistant runs at its own budget, and a plain one knows none.
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OWN_KWARGS}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)


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
