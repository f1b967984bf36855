"""What can be wrapped: a causal LM of transformers, as it is. For anything else, what to do instead."""

from typing import Any

from transformers import PreTrainedModel

from .base_families import family_of


_ADAPTERS = "merge its adapters (base.merge_and_unload()), or wrap the model that they are in (base.get_base_model())"
# By the name of a class, since most belong to packages that need not be installed.
INSTEAD = {
    "PeftModel": _ADAPTERS,
    "PeftMixedModel": _ADAPTERS,
    "OptimizedModule": "wrap the model that was compiled (base._orig_mod)",
    "DataParallel": "wrap the model in it (base.module)",
    "DistributedDataParallel": "wrap the model in it (base.module)",
    "FullyShardedDataParallel": "wrap the model before it is sharded",
}


def check_base(base: Any, takes_encoders: bool = False) -> None:
    """Check that a base is a causal LM, or an encoder where these are taken, whose layers are what its config says.

    Raises:
        ValueError: anything else, or an unknown family; the message says what to do.
    """
    kind = type(base).__name__
    for parent in type(base).__mro__:
        if parent.__name__ in INSTEAD:
            raise ValueError(f"a {kind} can't be wrapped: {INSTEAD[parent.__name__]}")
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"a {kind} can't be wrapped: a base is a Hub name, a folder, or a causal LM of transformers")
    if base.config.model_type == "anee":
        raise ValueError(f"a {kind} can't be wrapped again: wrap its base (model.base), or go on with it as it is")
    if base.get_output_embeddings() is None:
        raise ValueError(f"a {kind} has no language model head: load the base with AutoModelForCausalLM")
    family = family_of(base)
    if family.encoder and not takes_encoders:
        raise ValueError(
            f"a {base.config.model_type} base is an encoder, not a language model: make a classifier of it with "
            "AneeForSequenceClassification.from_base, or with anee fit-classifier"
        )
    layers: Any = base.get_submodule(family.decoder).get_submodule(family.layers)
    if len(layers) != base.config.num_hidden_layers:
        raise ValueError(
            f"the base has {len(layers)} layers, but its config says num_hidden_layers={base.config.num_hidden_layers}: make "
            "the config say what is left, save the base (an artifact has to name it), and wrap that folder"
        )
