"""`AneeForSequenceClassification`: a frozen base with small classifier heads at chosen layers, where rows leave.

A row stops at the first head that its exit rule is content with (`exit_rules.py`). The deeper layers are not run for it: the
batch shrinks, and so does its padding.

Shapes: B rows, T tokens, L layers, D hidden size, E heads, C classes, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from .actions import FULL
from .classifier_heads import ClassifierHeads, ExitCosts, pooled, read
from .configuration_anee import AneeConfig
from .exit_rules import Exits, exits_of
from .forward_arguments import loss_keywords
from .modeling_anee import AneeModel
from .positions import Mask
from .step import Step
from .trace import ExecutionTrace


@dataclass
class AneeClassifierOutput(SequenceClassifierOutput):
    """Output of a forward.

    Args:
        loss: where labels were given: cross entropy, in training mode of all heads, weighted by the layers before them.
        logits: of the head where each row left, calibrated, float32 [B, C].
        exits: number of layers that each row ran, int64 [B], on the CPU.
        execution: what was done with every token, and what it cost.
    """

    exits: Tensor | None = None
    execution: ExecutionTrace | None = None


class Answers(NamedTuple):
    """Logits [B, C] of rows, and the heads where they left, int64 [B] on the CPU."""

    logits: Tensor
    places: Tensor


class AneeForSequenceClassification(AneeModel):
    """A frozen base with classifier heads at chosen layers: a row leaves at the first that is sure enough.

    The base is a causal LM, or an encoder that transformers has with a language model head (`bert`, `roberta`).

    Build it with `from_base`, load it with `from_pretrained`.
    """

    _auto_class = "AutoModelForSequenceClassification"
    takes_encoders = True
    accepts_loss_kwargs = False  # the loss is a mean over the rows that were given

    @classmethod
    def from_base(
        cls,
        base: Any,
        *,
        labels: int | Sequence[str] = 2,
        layers: Sequence[int] | None = None,
        pooling: str = "mean",
        hidden_size: int = 0,
        precision: str = FULL,
        **kwargs: Any,
    ) -> Any:
        """Put untrained heads on a base.

        Args:
            base: Hub name or folder, or a loaded causal LM, which is held as it is.
            labels: names of the classes, or their number.
            layers: numbers of layers after which a head stands; one after the last is added. Default: evenly spread.
            pooling: what heads read of the tokens: their `"mean"`, the `"last"`, or the `"first"` (of an encoder).
            hidden_size: inner width of a head; 0: one linear map.
            precision: variant that the layers run in: `"full"`, `"int8"` or `"int4"`.
            kwargs: as for `AneeForCausalLM.from_base`; costs are counted in FLOPs unless `cost_unit` says otherwise.

        Raises:
            ValueError: as `AneeForCausalLM.from_base`, and labels that are not two or more different names.
        """
        names = [f"LABEL_{number}" for number in range(labels)] if isinstance(labels, int) else list(labels)
        if len(names) < 2 or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"labels={labels!r} is not allowed: it must be two or more different names, or their number")
        classifier: dict[str, Any] = {"pooling": pooling, "hidden_size": hidden_size, "precision": precision}
        if layers is not None:
            classifier["layers"] = list(layers)
        fields: dict[str, Any] = {"classifier": classifier, "id2label": dict(enumerate(names)), "cost_unit": "flops"}
        fields |= {"label2id": {name: number for number, name in enumerate(names)}}
        if precision != FULL:
            fields["precisions"] = [precision]
        return super().from_base(base, **(fields | kwargs))

    def make_heads(self) -> None:
        """Build the heads.

        Raises:
            ValueError: the configuration is not a classifier's.
        """
        if self.config.classifier is None:
            raise ValueError(
                "the configuration has no classifier: this is an artifact of a language model, or a new one; make a classifier "
                "with AneeForSequenceClassification.from_base, or with anee fit-classifier"
            )
        self.heads = ClassifierHeads(self.config)

    @property
    def _settings(self) -> dict[str, Any]:
        assert self.config.classifier is not None
        return self.config.classifier

    @torch.inference_mode(False)
    def _bind(self) -> None:
        super()._bind()
        settings, table = self._settings, self.config.table
        self._action = table.place_of(settings["precision"], settings["precision"])
        self._segments = [range(*ends) for ends in pairwise([0, *settings["layers"]])]
        prices = self.costs.layers[:, self._action] * self.costs.total
        self.exit_costs = ExitCosts.of(prices, settings["layers"], self.heads, self.costs.hardware)

    @torch.compiler.disable  # what is run depends on the data
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        energy_budget: float | Tensor | None = None,
        exit_rule: str | None = None,
        confidence_threshold: float | None = None,
        patience: int | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Classify B rows of T tokens. In training mode all heads are run, and nobody leaves.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 for padding, on either side; a ready mask as for `AneeModel`.
            position_ids: int64 [B or 1, T]; default: the number of real tokens before.
            inputs_embeds: token embeddings [B, T, D] instead of `input_ids`.
            labels: int64 [B].
            energy_budget: share of the work of all layers to spend on average, in [0, 1]: a number, or one per row; 1: the
                last head alone. Default: `config.energy_budget`.
            exit_rule: `"confidence"`, `"agreement"`, `"patience"` or `"fixed"`; default: `config.exit_rule`.
            confidence_threshold: instead of a budget: rows leave whose score is above it; from 1 on nobody does.
            patience: instead of a budget: heads before that must have said the same; rule `"patience"`.
            return_dict: return an output object (default) or a tuple.
            token_type_ids: which text of a pair each token belongs to, int64 [B, T], for bases that know pairs.
            kwargs: what transformers passes to every model; see `forward_arguments.py`.

        Raises:
            TypeError: a keyword that nobody knows.
            ValueError: a bad value, settings that exclude each other, or a budget that the rule was not calibrated for.
        """
        self.prepare()
        loss_keywords(kwargs, position_ids)
        hidden, step = self._entered(input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids)
        loss = None
        if self.training:
            answers, loss = self._trained(hidden, step, labels)
        else:
            given = {"energy_budget": energy_budget, "exit_rule": exit_rule}
            given |= {"confidence_threshold": confidence_threshold, "patience": patience}
            answers = self._run(hidden, step, exits_of(self.config, self.exit_costs.reached, len(hidden), given))
            if labels is not None:
                loss = cross_entropy(answers.logits, labels.to(answers.logits.device))
        layers = torch.tensor(self._settings["layers"], device="cpu")[answers.places]
        output = AneeClassifierOutput(
            loss=loss, logits=answers.logits, exits=layers, execution=self._trace(answers, layers, step.valid)
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @torch.no_grad()
    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What every head reads of rows of tokens int64 [B, T], float32 [B, E, F]; all layers are run."""
        self.prepare()
        hidden, step = self._entered(input_ids, attention_mask)
        return torch.stack(self._features(hidden, step), dim=1)

    def _entered(
        self,
        input_ids: Tensor | None,
        attention_mask: Mask,
        position_ids: Tensor | None = None,
        embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, Step]:
        """What enters the first layer; positions count real tokens, so that padding on the left changes nothing."""
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return self.begin(input_ids, embeds, attention_mask, position_ids, None, 1.0, token_type_ids=token_type_ids)

    def _through(self, layers: range, hidden: Tensor, step: Step) -> Tensor:
        """Hidden states [B, T, D] through layers in the classifier's precision."""
        for layer in layers:
            hidden = self.executor.layers.alike(layer, hidden, step, self._action)
        return hidden

    def _features(self, hidden: Tensor, step: Step) -> list[Tensor]:
        """What each head reads, [B, F], of hidden states that enter the first layer."""
        found: list[Tensor] = []
        total = torch.zeros((), device=hidden.device)
        for place, layers in enumerate(self._segments):
            hidden = self._through(layers, hidden, step)
            now = pooled(hidden, step.valid, self._settings["pooling"])
            total = now if place == 0 else total + now
            found.append(read(now, total, place + 1))
        return found

    def _trained(self, hidden: Tensor, step: Step, labels: Tensor | None) -> tuple[Answers, Tensor | None]:
        """Answers of the last head, and the loss of all, weighted by the layers before them as in PABEE."""
        logits = self.heads.all(torch.stack(self._features(hidden, step), dim=1)).unbind(dim=1)
        answers = Answers(logits[-1], torch.full((len(hidden),), len(logits) - 1, device="cpu"))
        if labels is None:
            return answers, None
        weights, labels = self._settings["layers"], labels.to(logits[-1].device)
        losses = [weight * cross_entropy(one, labels) for weight, one in zip(weights, logits, strict=True)]
        return answers, torch.stack(losses).sum() / sum(weights)

    def _run(self, hidden: Tensor, step: Step, exits: Exits) -> Answers:
        """Run layers segment by segment, with the rows that are still there."""
        heads, classes, device = len(self._segments), self.config.num_labels or 0, hidden.device
        rows = torch.arange(len(hidden), device="cpu")
        logits = torch.zeros(len(hidden), classes, device=device)
        places = torch.full((len(hidden),), heads - 1, device="cpu")
        seen, total = torch.zeros(len(hidden), 0, classes, device=device), torch.zeros((), device=device)
        before: Tensor | None = None
        for place, layers in enumerate(self._segments):
            hidden = self._through(layers, hidden, step)
            now, last = pooled(hidden, step.valid, self._settings["pooling"]), place == heads - 1
            total = now if place == 0 else total + now
            before = self.heads(place, read(now, total, place + 1), before)
            found = self.heads.calibrated(place, before)
            logits = logits.index_copy(0, rows.to(device), found)
            if last:
                break
            seen = torch.cat((seen, found.softmax(dim=-1).unsqueeze(1)), dim=1)
            leave = exits.leave(place, seen)
            places[rows[leave]] = place
            stay = (~leave).nonzero().squeeze(1)
            if len(stay) == 0:
                break
            if len(stay) < len(rows):
                hidden, step = _part(hidden, step, stay)
                rows, exits = rows[stay], exits.rows(stay)
                seen, total, before = (x[stay.to(device)] for x in (seen, total, before))
        return Answers(logits, places)

    def _trace(self, answers: Answers, layers: Tensor, valid: Tensor) -> ExecutionTrace:
        """What was done with tokens [B, T] of rows that ran so many layers [B]."""
        table, count = self.config.table, self.config.num_layers
        ran = torch.arange(count, device="cpu") < layers.unsqueeze(1)  # [B, L]
        actions = torch.where(ran, self._action, table.exit).to(torch.uint8)
        cost = self.exit_costs.of_rows(answers.places, valid.sum(dim=1))
        return ExecutionTrace(
            actions=actions.unsqueeze(1).expand(*valid.shape, count),
            cost=(cost.unsqueeze(1) * valid).float(),
            valid=valid,
            floor=float(self.exit_costs.reached[0]),
            unit=self.costs.unit,
            table=table,
            total=self.costs.total,
        )


def _part(hidden: Tensor, step: Step, rows: Tensor) -> tuple[Tensor, Step]:
    """Some of the rows, without the columns that are padding in all of them."""
    columns = step.valid[rows].any(dim=0).nonzero().squeeze(1)
    if len(columns) == 0:
        columns = torch.arange(1, device="cpu")
    return hidden[rows.to(hidden.device)][:, columns.to(hidden.device)], step.part(rows, columns)


def register_classifier() -> None:
    """Make `AutoModelForSequenceClassification` know the installed class."""
    AutoModelForSequenceClassification.register(AneeConfig, AneeForSequenceClassification, exist_ok=True)
