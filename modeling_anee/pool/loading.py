"""Loading rungs: models that differ in nothing but their budget are one, and so are the bases of others.

Weights come from safetensors only, and no code comes with them.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from ..base_loading import find_base
from ..configuration_anee import AneeConfig
from ..modeling_anee import AneeForCausalLM
from ..sequence_classification import AneeForSequenceClassification
from ..weight_files import readable_weights
from .classifiers import ClassifierRung
from .config import RungConfig
from .rungs import Rung


PRECISIONS = ("int8", "int4")
AnyRung = Rung | ClassifierRung


class Loader:
    """Loads the rungs of a pool, and keeps them.

    Args:
        folder: what folders in the pool's file are relative to.
        device: where rungs go.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        self._folder, self._device = folder, device
        self._models: dict[tuple, tuple[Any, Any]] = {}
        self._bases: dict[tuple, tuple[Any, Any]] = {}

    def load(self, config: RungConfig) -> AnyRung:
        """Load one rung.

        Raises:
            OSError: the model can't be found or read, or has no safetensors.
            ValueError: what can't be wrapped, a plan for an artifact, costs in something else than bytes.
        """
        whole = (config.model, config.revision, config.dtype, config.strict, config.plan)
        if whole not in self._models:
            where = self._where(config.model)
            with readable_weights(where):
                known = PreTrainedConfig.get_config_dict(where, **files_of(config))[0]
                if known.get("model_type") == AneeConfig.model_type:
                    model, tokenizer = artifact_of(where, config, known.get("classifier") is not None)
                else:
                    model, tokenizer = self._wrapped(where, config)
            if model.costs.unit != "bytes":
                raise ValueError(f"{config.model} counts costs in {model.costs.unit}, and rungs are compared in bytes")
            self._models[whole] = model.to(self._device).eval(), tokenizer
        model, tokenizer = self._models[whole]
        budget = 1.0 if config.energy_budget is None else config.energy_budget
        if isinstance(model, AneeForSequenceClassification):
            return ClassifierRung(config, model, tokenizer, budget)
        return Rung(config, model, tokenizer, budget if config.plan is None else min(model.controller.plan_budgets()))

    def _where(self, model: str) -> str:
        """A folder relative to the pool's, or else what the name stands for."""
        local = self._folder / model
        if not local.is_dir() and (os.path.isabs(model) or model.startswith(".")):
            raise FileNotFoundError(f"there is no folder {local}")
        return str(local) if local.is_dir() else find_base(model)[0]

    def _wrapped(self, where: str, config: RungConfig) -> tuple[Any, Any]:
        options: dict[str, Any] = {"controller": "plan", "cost_unit": "bytes", "keep_first_tokens": 0}
        if config.plan is not None:
            precisions = [name for name in PRECISIONS if name in config.plan.lower()]
            options |= {"plans": [config.plan], "precisions": precisions}
        key = (config.model, config.revision, config.dtype)
        if key not in self._bases:
            loading: dict[str, Any] = {"dtype": config.dtype, "use_safetensors": True}
            model = AneeForCausalLM.from_base(where, **files_of(config), **loading, **options)
            self._bases[key] = model.base, tokenizer_of(where, config)
            return model, self._bases[key][1]
        base, tokenizer = self._bases[key]
        return AneeForCausalLM.from_base(base, **options), tokenizer


def artifact_of(where: str, config: RungConfig, classifies: bool) -> tuple[Any, Any]:
    """An artifact and its tokenizer.

    Raises:
        ValueError: a plan, which is for bases.
    """
    if config.plan is not None:
        raise ValueError(f"rung {config.name!r} has a plan, and {config.model} is an artifact: give it an energy_budget")
    options: dict[str, Any] = {"dtype": config.dtype, "use_safetensors": True}
    options |= {"budget_mode": "strict"} if config.strict else {}
    if classifies:
        options["cost_unit"] = "bytes"
    made = AneeForSequenceClassification if classifies else AneeForCausalLM
    return made.from_pretrained(where, **files_of(config), **options), tokenizer_of(where, config)


def tokenizer_of(where: str, config: RungConfig) -> Any:
    """The tokenizer that comes with a model."""
    return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **files_of(config))


def files_of(config: RungConfig) -> dict[str, Any]:
    """Which files of a repository are meant."""
    return {} if config.revision is None else {"revision": config.revision}
