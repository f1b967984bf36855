"""`AneeConfig`: everything that an artifact says about itself, checked in one place.

Leaves out what belongs to the base model: that is its own config, kept whole in `text_config`.
"""

import difflib
from typing import Any, ClassVar

# First: it says clearly that a release of transformers is too old for what is imported next.
from .compatibility import CACHE_NAMES


# isort: split
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .actions import ActionTable
from .base_fields import OfBase
from .checks import check_budget, is_number, is_whole, nearest, one_of, plain, refuse_unknown, whole
from .configuration_calibration import check_calibration, check_columns
from .configuration_classifier import EXIT_RULES, check_rule, completed
from .configuration_drafts import check_drafts, draft_table
from .configuration_gated import check_head, check_variants, default_variants, strategic_layers, with_gated_rows
from .configuration_plans import check_router_plans, checked_plans
from .configuration_prices import check_prices
from .configuration_refine import check_refinement
from .configuration_shapes import check_corrections, check_orders
from .narrow import check_narrow


logger = logging.get_logger("transformers.anee")  # follows the verbosity of transformers

FORMAT_VERSION = 2  # 1: costs and budgets were shares of the decoder stack, see `upgrade.py`
BASE_DTYPES = ("float32", "bfloat16", "float16", "float64")
BUDGET_MODES = ("average", "strict")
ROUTER_BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
CONFIDENCE_THRESHOLD = 0.3
CONFIDENCE_METRICS = ("entropy", "max_probability")
DOUBT_METRICS = (*CONFIDENCE_METRICS, "margin")  # of a `refine` controller
# What transformers passes to a configuration or writes into its file beside declared fields, in 5.23 and 5.24.
OF_TRANSFORMERS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "tie_word_embeddings",
        "torch_dtype",
    }
)


class AneeConfig(PreTrainedConfig):
    """Configuration of an `AneeForCausalLM`.

    What scripts look for at the top of a configuration (`vocab_size`, `hidden_size`, `max_position_embeddings`,
    `eos_token_id`, ...) is read through from the base's own config, and never saved twice.

    Args:
        text_config (`dict` or `PreTrainedConfig`): the base model's own config.
        base_model_name_or_path (`str`): Hub name or folder of the base. A name that begins with "." is relative
            to the artifact.
        base_model_revision (`str`, *optional*): commit, tag or branch of the base on the Hub.
        base_gguf_file (`str`, *optional*): the GGUF file in the base's repository, when it has no safetensors.
        base_fingerprint (`str`, *optional*): what `fingerprint.fingerprint` said of the base that the
            controllers were made for; empty means unknown.
        base_dtype (`str`, *optional*): dtype of that base, of whose bytes budgets in the `calibration` are shares;
            default: that of whatever base is attached.
        strict_base (`bool`): a base with another fingerprint is an error rather than a warning.
        energy_budget (`float`): default budget in [0, 1], the share of the whole model's work to spend.
        prompt_energy_budget (`float`, *optional*): budget of the prompt in `generate`; default: the same.
        controller (`str`): `"budget"`, `"confidence"`, `"gated"`, `"learned"`, `"plan"`, `"refine"` or `"routed"`.
        cost_unit (`str`): unit of costs and budgets: `"flops"`, `"bytes"` (of weights read); at `prices`: `"ms"`, `"joules"`.
        prices (`dict`, *optional*): what work costs on a machine, for `"ms"` and `"joules"`; `anee profile` measures it.
        decision_interval (`int`): layers that one decision of a `learned` controller covers, or of a `budget` controller with
            `precisions`; 1 decides at every layer.
        budget_mode (`str`): `"average"` keeps the mean cost of a text at the budget; `"strict"` keeps every single token
            at or under it (down to the floor).
        keep_first_tokens (`int`): first tokens of a sequence that leave nothing out, except in strict mode: attention sinks
            with massive activations, which nothing small stands in for (arXiv:2402.17762). With `precisions` they run in
            those that are decided, else in full.
        min_layers (`int`): first layers that are always run whole; a `routed` controller decides after them.
        keep_last_layers (`int`): last layers that are always processed by tokens that have not exited.
        exit_budget_threshold (`float`): `budget` controller: tokens whose budget is at or below it EXIT when
            their budget is used up (the last layers are then not kept); above it they SKIP. 0: never EXIT.
        skip_order (`list[int]`, *optional*): `plan` controller: layers in the order in which they are given up
            as the budget falls, instead of the default (middle layers first).
        actions (`list[dict]`, *optional*): what can be done with a token at a layer: rows with a `name`, the variants of
            `attention` and `feed_forward`, and whether the token `leaves`; default: PROCESS, SKIP, EXIT and SKIP_FFN.
        precisions (`list[str]`, *optional*): cheaper variants of the base's weights, dearest first, `["int8", "int4"]` for
            example: rows for them are added to `actions`, and `plan` and `budget` use them before they skip anything.
        narrow (`list[str]`, *optional*): variants with the most important part of the heads and neurons of a sublayer,
            `["int4_half", "int4_quarter"]` for example: rows for them are added to `actions`; see `narrow.py`.
        plans (`list`, *optional*): `plan` controller: one action per layer for each plan: a list of names, in short
            `"2*PROCESS, SKIP"`, or one letter a layer; with a head in a variant, `"30*INT8 / int8"`; see `actions.py`. A budget
            uses the two plans whose costs are nearest to it. Replaces `skip_order`.
        bridge_rank (`int`): inner width of the bridges that stand for skipped layers; 0: no bridges.
        bridge_layers (`list[int]`, *optional*): layers that have one; default: every layer.
        ffn_bridge_rank (`int`): the same for skipped feed-forwards.
        ffn_bridge_layers (`list[int]`, *optional*): layers that have one; default: every layer.
        exit_translator_rank (`int`): inner width of the exit translators, at the `exit_layers`; 0: none.
        exit_layers (`list[int]`, *optional*): `confidence` controller: layers before which the head is asked;
            default: at 1/2 and 3/4 of the depth. `gated` controller: layers before which a gate lets tokens leave; default:
            4, 8, 12, 16, 19 of 22, in proportion. Exit translators stand before the same layers; default: every layer.
        confidence_metric (`str`, *optional*): `"entropy"` (EXIT below the threshold; entropy / log(vocabulary), in [0, 1])
            or `"max_probability"` (EXIT above it); default: `"entropy"`. `refine` controller: by what it tells how unsure a
            prediction is, also `"margin"`, by how much the two likeliest tokens differ, which is its default.
        confidence_threshold (`float`, *optional*): in [0, 1]; default: 0.3. Of a classifier: rows leave at the first head whose
            score is above it; default: the threshold that is calibrated for the `energy_budget`.
        classifier (`dict`, *optional*): of an `AneeForSequenceClassification`: `layers` (numbers of layers after which a head
            stands, the last after all), `pooling` (of the tokens: `"mean"` or `"last"`), `hidden_size` (inner width of a head;
            0: one linear map), `precision` (variant that the layers run in, `"full"` or one of the `precisions`), `dials` (by
            exit rule: `budgets` and `settings`).
        exit_rule (`str`): when a row leaves a classifier: `"confidence"`, `"agreement"`, `"patience"` or `"fixed"`; see
            `exit_rules.py`.
        patience (`int`, *optional*): `exit_rule="patience"`: heads before that must have said the same; default: as many as
            are calibrated for the `energy_budget`.
        controller_actions (`list[str]`, *optional*): actions that a `learned` controller may choose beside PROCESS, each
            at the layers that have its bridge or translator, if any layer has, and of those that leave only the last;
            default: all.
        corrections (`dict[str, list[int]]`, *optional*): shapes of the directions along which what 4 bits lose is added again,
            by linear map: `[layers, rank, inputs]`, of the `head` `[rank, inputs]`. The stage `corrections` sets it.
        router_budgets (`list[float]`, *optional*): a `routed` controller sends each token through the cheapest plan that
            leaves nothing out (all layers in full, without `precisions`), or through the dearest of the `plans` within one of
            these budgets; default: 0.9, 0.8, 0.7, 0.6, 0.5 and 0.4; with `precisions`, as many, spread evenly from the cheapest
            plan up to that one.
        router_plans (`list[int]`, *optional*): places of these in `plans`, as they were when the router was trained, whatever
            they cost over a base in another dtype; the stage `routing` sets it.
        gated_variants (`list[str]`, *optional*): `gated` controller: variants that the feed-forward of a token may run in,
            dearest first, `["int8", "int4", "none"]` for example; its attention runs in the same, beside none in the last
            before it. Default: the first of the `precisions`, or full, and none.
        gated_head (`str`, *optional*): `gated` controller: variant of the head of tokens that routers decide about; default:
            the first of the `gated_variants`.
        refine_plans (`list[str]`, *optional*): `refine` controller: the plan that every token runs first, and the one that it
            runs again where its prediction is unsure; default: all in the last of the `precisions`, and in the first (in full,
            if there is one only); without any, the cheapest of the `plans`, and everything in full.
        refine_from (`int`, *optional*): `refine` controller: the first layer that runs again, the number of layers for the head
            alone; default: half of them do.
        orders (`dict[str, list[int]]`, *optional*): shapes of what narrow variants keep first, `[layers, neurons]` of
            `"neurons"`, `[layers, groups]` of `"heads"`. The stage `importance` sets it.
        calibration (`dict`, *optional*): the measured dial: lists of numbers of equal length: `budgets` (ascending) and, for
            kinds that need one, `settings` (price of a `learned` controller, logarithm of that of a `routed` one, threshold
            of `confidence`, doubt in nats of `refine`, capacity of a `gated` one; monotone); for `gated` ones `thresholds`
            ([rows][variants but the first][layers]), `exit_thresholds` ([rows][exit layers]) and `shares` that layers run
            ([rows][layers]); and what was measured there: `cost`, `perplexity_ratio`, `standard_error`.
        drafts (`dict`, *optional*): what lossless generation drafts with, as it was measured: lists of equal length: `plans`,
            in short, `drafted` and `kept`: for each plan how many tokens it drafted whose logit was above all others by less
            than 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2 and by more, and how many of those were kept. Default: all layers in one of
            the `precisions` or, without any, in 8 bits, and nothing is known of how many are kept.
        budget_feedback (`float`): in `generate`, by how much of the sum that the new tokens have under- or overspent so far
            the next token's budget is moved; 0: not at all. With it, decoding is no longer the same as scoring. Not in
            strict mode, where no token may make up for another.
        controller_hidden_sizes (`list[int]`, *optional*): widths of the hidden layers of the MLP of a `learned` or `routed`
            controller; default [32].
        format_version (`int`): version of this format; a newer one than this code knows is refused.

    Raises:
        ValueError: a bad value, with the field and what is allowed; or an unknown field, with the nearest known one.
    """

    model_type = "anee"
    sub_configs_defaults = {"text_config": SubConfigSpec(AutoConfig, model_type="llama")}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [*CACHE_NAMES, "execution", "exits"]
    _auto_class: ClassVar[str | None] = "AutoConfig"

    text_config: Any = None
    base_model_name_or_path: str = ""
    base_model_revision: str | None = None
    base_gguf_file: str | None = None
    base_fingerprint: str = ""
    base_dtype: str | None = None
    strict_base: bool = False
    energy_budget: float = 1.0
    prompt_energy_budget: float | None = None
    controller: str = "budget"
    cost_unit: str = "bytes"
    prices: dict | None = None
    decision_interval: int = 8
    budget_mode: str = "average"
    keep_first_tokens: int = 1
    min_layers: int = 1
    keep_last_layers: int = 1
    exit_budget_threshold: float = 0.0
    skip_order: list[int] | None = None
    actions: list[dict] | None = None
    precisions: list[str] | None = None
    narrow: list[str] | None = None
    plans: list[str] | None = None
    bridge_rank: int = 0
    bridge_layers: list[int] | None = None
    ffn_bridge_rank: int = 0
    ffn_bridge_layers: list[int] | None = None
    exit_translator_rank: int = 0
    exit_layers: list[int] | None = None
    confidence_metric: str | None = None
    confidence_threshold: float | None = None
    classifier: dict | None = None
    exit_rule: str = "confidence"
    patience: int | None = None
    controller_actions: list[str] | None = None
    router_budgets: list[float] | None = None
    router_plans: list[int] | None = None
    gated_variants: list[str] | None = None
    gated_head: str | None = None
    refine_plans: list[str] | None = None
    refine_from: int | None = None
    corrections: dict[str, list[int]] | None = None
    orders: dict[str, list[int]] | None = None
    calibration: dict | None = None
    drafts: dict | None = None
    budget_feedback: float = 0.0
    controller_hidden_sizes: list[int] | None = None
    format_version: int = FORMAT_VERSION

    vocab_size = OfBase()
    hidden_size = OfBase()
    intermediate_size = OfBase()
    num_hidden_layers = OfBase()
    num_attention_heads = OfBase()
    num_key_value_heads = OfBase()
    head_dim = OfBase()
    max_position_embeddings = OfBase()
    use_cache = OfBase(settable=True)
    bos_token_id = OfBase(settable=True)
    eos_token_id = OfBase(settable=True)
    pad_token_id = OfBase(settable=True)

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in defaults and check every field."""
        self._check_version()
        refuse_unknown(self._unknown(kwargs), self.known_fields(), "a field of AneeConfig")
        of_base = {name: kwargs.pop(name) for name in list(kwargs) if isinstance(getattr(type(self), name, None), OfBase)}
        if not isinstance(self.text_config, dict | PreTrainedConfig | None):
            raise ValueError(f"text_config={self.text_config!r} is not allowed: it must be a dict or a PreTrainedConfig")
        if self.controller_hidden_sizes is None:
            self.controller_hidden_sizes = [32]
        if self.precisions is None:
            self.precisions = []
        if self.router_budgets is None and not self.precisions:
            self.router_budgets = list(ROUTER_BUDGETS)
        if self.confidence_metric is None:
            self.confidence_metric = "margin" if self.controller == "refine" else "entropy"
        if self.confidence_threshold is None and self.classifier is None:
            self.confidence_threshold = CONFIDENCE_THRESHOLD
        if self.narrow is None:
            self.narrow = []
        self._check_precisions()
        self.actions = self.table.with_precisions(self.precisions, self.narrow).stored()
        if self.controller == "gated":
            self._prepare_gated()
        if self.controller_actions is None:
            self.controller_actions = self.table.names[1:]
        super().__post_init__(**kwargs)
        for name, value in of_base.items():
            setattr(self, name, value)
        # One answer for tied weights and tokens: the base's own.
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        if self.controller == "gated" and self.exit_layers is None:
            self.exit_layers = strategic_layers(self.num_layers)
        self.check()

    def _prepare_gated(self) -> None:
        """The variants of a `gated` controller, and the actions that it needs."""
        if self.gated_variants is None:
            self.gated_variants = default_variants(self.precisions or [])
        check_variants(self.gated_variants, self.precisions or [])
        self.actions = with_gated_rows(self.table, self.gated_variants).stored()

    @property
    def table(self) -> ActionTable:
        """The actions, see `actions.py`."""
        return ActionTable.of(self.actions)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers of the base."""
        return self.text_config.num_hidden_layers

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As that of transformers; the file of another kind of model is refused.

        Raises:
            ValueError: the folder or repository holds a plain model.
        """
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = fields.get("model_type", cls.model_type)
        if kind != cls.model_type:
            name = str(pretrained_model_name_or_path)
            raise ValueError(f"{name!r} is a {kind!r} model, not an artifact: wrap it with AneeForCausalLM.from_base({name!r})")
        return fields, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        """As that of transformers; fields that this code does not know (a newer one wrote them) are left out with a warning.

        Raises:
            ValueError: an argument that looks like a misspelt field. Others may be meant for a tokenizer or a model.
        """
        if not kwargs.get("return_unused_kwargs"):  # else whoever gets them checks them
            misspelt = [
                name for name in cls._unknown(kwargs) if difflib.get_close_matches(name, cls.__annotations__, cutoff=0.8)
            ]
            refuse_unknown(misspelt, cls.__annotations__, "a field of AneeConfig")
        unknown = cls._unknown(config_dict)
        if unknown:
            names = ", ".join(nearest(name, cls.known_fields()) for name in unknown)
            logger.warning_once(f"the configuration has fields that this version of anee does not know: {names}")
        cls._check_unit(config_dict, kwargs)
        known = {name: value for name, value in config_dict.items() if name not in unknown}
        return super().from_dict(known, **kwargs)

    @staticmethod
    def _check_unit(stored: dict, asked: dict) -> None:
        """Refuse another unit for a dial that was found in its own."""
        dial, before = stored.get("calibration"), stored.get("cost_unit", "bytes")
        kind, unit = (asked.get(name, stored.get(name)) for name in ("controller", "cost_unit"))
        if dial and "settings" in dial and kind not in ("plan", "budget") and unit not in (None, before):
            raise ValueError(
                f"cost_unit={unit!r} is not allowed for a {kind!r} controller that was calibrated in {before}: load it with "
                "controller='plan', or fit one with that cost_unit"
            )

    @classmethod
    def known_fields(cls) -> set[str]:
        """Names that a configuration may be given."""
        of_base = {name for name, value in vars(AneeConfig).items() if isinstance(value, OfBase)}
        return set(cls.__dataclass_fields__) | of_base | OF_TRANSFORMERS

    @classmethod
    def _unknown(cls, names: Any) -> list[str]:
        known = cls.known_fields()
        return [name for name in names if name not in known and not name.startswith("_")]

    def check(self) -> None:
        """Check every field; call it again after changing one by hand."""
        for name in AneeConfig.__annotations__:
            if name != "text_config":
                setattr(self, name, plain(getattr(self, name)))
        self._check_strings()
        self._check_choices()
        self._check_numbers()
        self._check_layers()
        self._check_precisions()
        check_corrections(self.corrections, self.num_layers)
        check_orders(self.orders, self.num_layers)
        if self.gated_variants is not None:
            check_variants(self.gated_variants, self.precisions or [])
        check_head(self.gated_head, self.precisions or [])
        check_refinement(self.refine_plans, self.refine_from, self.table, self.num_layers)
        self._check_actions()
        check_calibration(self.calibration)
        if self.controller == "gated":  # another kind ignores the columns of an artifact that was one
            check_columns(self.calibration, self.num_layers, len(self.gated_variants or ()) - 1, len(self.exit_layers or ()))
        if self.drafts is not None:
            check_drafts(self.drafts, draft_table(self.table, self.precisions), self.num_layers)
        if self.classifier is not None:
            self.classifier = completed(self.classifier, self.num_layers, self.precisions or [])
            check_rule(self.exit_rule, self.confidence_threshold, self.patience)
            if self.problem_type not in (None, "single_label_classification") or (self.num_labels or 0) < 2:
                raise ValueError(
                    f"problem_type={self.problem_type!r} with {self.num_labels} labels is not allowed: a classifier with exits "
                    "tells two or more classes apart (problem_type='single_label_classification')"
                )

    def _check_version(self) -> None:
        version = self.format_version
        if not is_whole(version) or version < 1:
            raise ValueError(f"format_version={version!r} is not allowed: it must be an integer from 1")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={version} is newer than this code, which knows versions up to {FORMAT_VERSION}: "
                "update modeling-anee, or load with trust_remote_code=True in a process where it is not installed"
            )

    def _check_strings(self) -> None:
        for name in ("base_model_name_or_path", "base_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be a string")
        for name in ("base_model_revision", "base_gguf_file"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be a string or None")
        if self.base_dtype is not None:
            one_of("base_dtype", self.base_dtype, BASE_DTYPES)

    def _check_precisions(self) -> None:
        from .base_variants import precisions  # with what runs them

        names, known = self.precisions, precisions()
        if not isinstance(names, list | tuple) or not all(name in known for name in names) or len(set(names)) != len(names):
            raise ValueError(f"precisions={names!r} is not allowed: it must be a list of different ones of {known}")
        check_narrow(self.narrow, names)

    def _check_choices(self) -> None:
        from .controller_kinds import CONTROLLER_CLASSES  # their files read this one

        one_of("controller", self.controller, tuple(CONTROLLER_CLASSES))
        check_prices(self.prices, self.cost_unit)
        one_of("budget_mode", self.budget_mode, BUDGET_MODES)
        metrics = CONFIDENCE_METRICS if self.controller == "confidence" else DOUBT_METRICS
        one_of("confidence_metric", self.confidence_metric, metrics)
        one_of("exit_rule", self.exit_rule, EXIT_RULES)
        one_of("strict_base", self.strict_base, (True, False))

    def _check_numbers(self) -> None:
        self.energy_budget = check_budget(self.energy_budget)
        if self.prompt_energy_budget is not None:
            self.prompt_energy_budget = check_budget(self.prompt_energy_budget, "prompt_energy_budget")
        self.budget_feedback = check_budget(self.budget_feedback, "budget_feedback")
        if self.budget_feedback and self.budget_mode == "strict":
            raise ValueError(f"budget_feedback={self.budget_feedback} is not allowed with budget_mode='strict': it must be 0")
        self.exit_budget_threshold = check_budget(self.exit_budget_threshold, "exit_budget_threshold")
        if self.confidence_threshold is not None:
            self.confidence_threshold = check_budget(self.confidence_threshold, "confidence_threshold")
        budgets: Any = self.router_budgets
        numbers = isinstance(budgets, list | tuple) and all(is_number(budget) and 0.0 <= budget <= 1.0 for budget in budgets)
        if budgets is not None and (not numbers or not 0 < len(budgets) == len(set(budgets))):
            raise ValueError(
                f"router_budgets={budgets!r} is not allowed: it must be a list of different numbers between 0 and 1"
            )
        whole("decision_interval", self.decision_interval, 1)
        if self.patience is not None:
            whole("patience", self.patience, 0)
        for name in ("keep_first_tokens", "bridge_rank", "ffn_bridge_rank", "exit_translator_rank"):
            whole(name, getattr(self, name), 0)
        whole("min_layers", self.min_layers, 0, self.num_layers)
        whole("keep_last_layers", self.keep_last_layers, 0, self.num_layers)
        sizes = self.controller_hidden_sizes
        if not isinstance(sizes, list | tuple) or not all(is_whole(size) and size > 0 for size in sizes):
            raise ValueError(f"controller_hidden_sizes={sizes!r} is not allowed: it must be a list of positive integers")

    def _check_layers(self) -> None:
        for name in ("skip_order", "exit_layers", "bridge_layers", "ffn_bridge_layers"):
            layers = getattr(self, name)
            if layers is None:
                continue
            known = isinstance(layers, list | tuple) and all(map(is_whole, layers))
            if not known or len(set(layers)) != len(layers) or not set(layers) <= set(range(self.num_layers)):
                raise ValueError(
                    f"{name}={layers!r} is not allowed: it must be a list of different layers from 0 to {self.num_layers - 1}"
                )
        if self.plans is not None:
            self.plans = checked_plans(self.plans, self.table, self.num_layers)
        check_router_plans(self.router_plans, len(self.plans or ()))

    def _check_actions(self) -> None:
        allowed = self.table.names[1:]
        actions = self.controller_actions
        if not isinstance(actions, list | tuple) or not all(action in allowed for action in actions):
            raise ValueError(f"controller_actions={actions!r} is not allowed: it must be a list of some of {allowed}")
