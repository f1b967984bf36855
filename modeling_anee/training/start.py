"""Where a run begins when its recipe names an artifact: with the fields and the weights of that."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from ..configuration_anee import FORMAT_VERSION, AneeConfig
from ..other_dtype import growth
from ..weight_files import readable_weights
from .recipe import ANEE_FIELDS, Recipe


@dataclass(frozen=True)
class Start:
    """What an artifact has learned.

    Args:
        name: of the artifact.
        fields: of `AneeConfig`, as far as the recipe leaves them open, in terms of its base's dtype; without the calibration
            and the places of the router's plans, which new weights and plans end.
        tensors: weights by name.
    """

    name: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, recipe: Recipe) -> "Start | None":
        """What the recipe's `start` names; None if it names nothing.

        Raises:
            OSError: there is no such artifact.
            ValueError: it is a model of another kind, or of an older format.
        """
        name = recipe.start
        if name is None:
            return None
        values, _ = PreTrainedConfig.get_config_dict(name)
        if values.get("model_type") != AneeConfig.model_type:
            raise ValueError(f"start={name!r} is not allowed: it is a {values.get('model_type')!r} model, not an artifact")
        if (version := values.get("format_version", FORMAT_VERSION)) < FORMAT_VERSION:
            raise ValueError(
                f"start={name!r} is not allowed: it is of format version {version}, whose budgets mean something else; "
                "AneeForCausalLM.from_pretrained(...).save_pretrained(...) writes it anew"
            )
        open_fields = {*ANEE_FIELDS, "base_fingerprint"} - recipe.anee.keys() - {"calibration", "router_plans"}
        fields = {field: value for field, value in values.items() if field in open_fields}
        if fields.get("router_budgets") and fields.get("precisions"):
            times = growth(values.get("base_dtype"), getattr(torch, recipe.base.dtype))
            fields["router_budgets"] = [budget * times for budget in fields["router_budgets"]]
        weights = cached_file(name, SAFE_WEIGHTS_NAME)
        assert weights is not None  # where there is no such file, it raises
        with readable_weights(weights):
            return cls(name, fields, load_file(weights))

    def load_into(self, own: dict[str, Tensor]) -> None:
        """Copy every weight that a run has too into its tensors; those that only the run has stay untrained.

        Raises:
            ValueError: weights of another shape.
        """
        shared = own.keys() & self.tensors.keys()
        for name in shared:
            there, here = tuple(self.tensors[name].shape), tuple(own[name].shape)
            if there != here:
                raise ValueError(
                    f"start={self.name!r} is not allowed: its {name} has the shape {there}, that of this recipe {here}; "
                    "leave the fields that decide it out of the recipe's anee"
                )
        for name in shared:
            own[name].copy_(self.tensors[name])
