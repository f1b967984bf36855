"""The one table of supported base families: what each is called and where its parts are.

A family is data only; `base_block.py` and `base_model.py` read it. To add one, add an entry to `FAMILIES` (and to `VARIANTS`
or `ALLOWED`, when its configuration changes its anatomy or can ask for what we don't do) and a config to the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """Names and flags of one family of decoders, or of encoders; the defaults are llama's.

    Dotted names are paths from the causal LM (`decoder`), from the decoder (up to `position_embeddings`), from one layer
    or from its attention module. None: there is no such part. Fields that end in `_field` name a field of the config.
    """

    decoder: str = "model"  # holds the layers, the final norm and the rotary embedding
    layers: str = "layers"
    final_norm: str | None = "norm"
    project_in: str | None = None  # from the width of the embeddings to that of the layers
    project_out: str | None = None  # and back, after the final norm
    rotary: str | None = "rotary_emb"
    rotary_by_layer_type: bool = False
    rotary_interleaved: bool = False  # pairs neighbouring channels, not the halves of a head
    rotary_switch: str | None = None  # attribute of an attention module: whether its layer rotates
    position_embeddings: str | None = None  # learned absolute positions
    encoder: bool = False  # tokens see those after them, too: no language model, but classifiers can be made of it
    embedding_norm: str | None = None
    token_types: str | None = None  # learned embeddings of which text of a pair a token belongs to
    first_position_field: str | None = None  # where learned positions begin, less 1
    positions_count_tokens: bool = False  # default positions count the real tokens of a row, padding left out
    embedding_multiplier_field: str | None = None
    logit_multiplier_field: str | None = None
    logit_divisor_field: str | None = None
    logit_softcap_field: str | None = None

    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # one name: a single fused projection
    qkv_layout: str = "concatenated"  # of a fused projection: q, k, v; or "grouped": [group, its queries and k and v, d]
    query_norm: str | None = None
    key_norm: str | None = None
    head_norm_input: str = "heads"  # last dimensions: "heads" [heads, d], "flat" [heads * d], "tokens" [heads, T, d]
    scaling: str = "scaling"  # attribute of the attention module
    softcap_field: str | None = None
    output: str = "o_proj"
    attention_output_norm: str | None = None

    feed_forward: str | tuple[str, ...] = "mlp"  # one module, or several run in turn
    feed_forward_norm: str | None = "post_attention_layernorm"
    gated: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    activation: str = "act_fn"
    feed_forward_output_norm: str | None = None

    parallel: bool = False  # attention and feed-forward read the same hidden state
    norm_after_residual: bool = False  # the two norms follow the two sums, and nothing is normalised before
    residual_multiplier_field: str | None = None


_LLAMA = Family()
_GEMMA2 = Family(
    feed_forward_norm="pre_feedforward_layernorm",
    attention_output_norm="post_attention_layernorm",
    feed_forward_output_norm="post_feedforward_layernorm",
    softcap_field="attn_logit_softcapping",
    logit_softcap_field="final_logit_softcapping",
)
_BERT = Family(
    decoder="bert",
    layers="encoder.layer",
    final_norm=None,
    rotary=None,
    position_embeddings="embeddings.position_embeddings",
    encoder=True,
    embedding_norm="embeddings.LayerNorm",
    token_types="embeddings.token_type_embeddings",
    attention="attention",
    attention_norm="attention.output.LayerNorm",
    qkv=("self.query", "self.key", "self.value"),
    scaling="self.scaling",
    output="output.dense",
    feed_forward=("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    feed_forward_norm="output.LayerNorm",
    gated=None,
    norm_after_residual=True,
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Family(query_norm="q_norm", key_norm="k_norm"),
    "smollm3": Family(rotary_switch="use_rope"),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, query_norm="q_norm", key_norm="k_norm", rotary_by_layer_type=True, softcap_field=None),
    "phi": Family(
        final_norm="final_layernorm",
        query_norm="q_layernorm",
        key_norm="k_layernorm",
        output="dense",
        feed_forward_norm="input_layernorm",
        gated=None,
        parallel=True,
    ),
    "phi3": Family(qkv=("qkv_proj",), gated=None),
    "gpt2": Family(
        decoder="transformer",
        layers="h",
        final_norm="ln_f",
        rotary=None,
        position_embeddings="wpe",
        attention="attn",
        attention_norm="ln_1",
        qkv=("c_attn",),
        output="c_proj",
        feed_forward_norm="ln_2",
        gated=None,
    ),
    "gpt_neox": Family(
        decoder="gpt_neox",
        final_norm="final_layer_norm",
        attention="attention",
        qkv=("query_key_value",),
        qkv_layout="grouped",
        output="dense",
        gated=None,
    ),
    "opt": Family(
        decoder="model.decoder",
        final_norm="final_layer_norm",
        project_in="project_in",
        project_out="project_out",
        rotary=None,
        position_embeddings="embed_positions",
        positions_count_tokens=True,
        attention_norm="self_attn_layer_norm",
        output="out_proj",
        feed_forward=("fc1", "activation_fn", "fc2"),
        feed_forward_norm="final_layer_norm",
        gated=None,
    ),
    "falcon": Family(
        decoder="transformer",
        layers="h",
        final_norm="ln_f",
        attention="self_attention",
        qkv=("query_key_value",),
        qkv_layout="grouped",
        scaling="inv_norm_factor",
        output="dense",
        gated=None,
    ),
    "olmo2": Family(
        attention_norm=None,
        query_norm="q_norm",
        key_norm="k_norm",
        head_norm_input="flat",
        attention_output_norm="post_attention_layernorm",
        feed_forward_norm=None,
        feed_forward_output_norm="post_feedforward_layernorm",
    ),
    "granite": Family(
        embedding_multiplier_field="embedding_multiplier",
        residual_multiplier_field="residual_multiplier",
        logit_divisor_field="logits_scaling",
    ),
    "starcoder2": Family(gated=None),
    "stablelm": Family(query_norm="q_layernorm", key_norm="k_layernorm", head_norm_input="tokens"),
    "bert": _BERT,
    "roberta": replace(_BERT, decoder="roberta", first_position_field="pad_token_id"),
    "cohere": Family(
        rotary_interleaved=True,
        logit_multiplier_field="logit_scale",
        query_norm="q_norm",
        key_norm="k_norm",
        feed_forward_norm="input_layernorm",
        parallel=True,
    ),
}

# Values of config fields without which a family is not the plain causal decoder that a block runs.
ALLOWED: dict[str, dict[str, tuple]] = {
    "gpt2": {"add_cross_attention": (False,)},
    "gemma2": {"use_bidirectional_attention": (False, None)},
    "gemma3_text": {"use_bidirectional_attention": (False, None)},
    "falcon": {"alibi": (False,)},
    "bert": {"is_decoder": (False,), "add_cross_attention": (False,)},
    "roberta": {"is_decoder": (False,), "add_cross_attention": (False,)},
}


def family_of(base: nn.Module) -> Family:
    """The family of a base causal LM, as its config varies it.

    Raises:
        ValueError: an unknown family, or a variant of a known one that is not supported; names what is allowed.
    """
    config: Any = base.config
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"base model type {model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}")
    for name, allowed in ALLOWED.get(model_type, {}).items():
        _check(config, name, allowed)
    if not getattr(config, "is_causal", True):  # a field that any config may have
        _check(config, "is_causal", (True,))
    family = FAMILIES[model_type]
    return replace(family, **VARIANTS[model_type](config)) if model_type in VARIANTS else family


def _check(config: PreTrainedConfig, name: str, allowed: tuple) -> None:
    value = getattr(config, name)
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}={value!r} of a {config.model_type} base is not supported; allowed: {names}")


def _head_norms(present: bool) -> dict[str, Any]:
    return {} if present else {"query_norm": None, "key_norm": None}


def _opt(config: Any) -> dict[str, Any]:
    final_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
    projections = () if config.word_embed_proj_dim != config.hidden_size else ("project_in", "project_out")
    missing = projections if final_norm else (*projections, "final_norm")
    return {"norm_after_residual": not config.do_layer_norm_before, **dict.fromkeys(missing)}


def _falcon(config: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {"parallel": config.parallel_attn}
    if config.new_decoder_architecture:
        _check(config, "parallel_attn", (True,))
    elif config.multi_query:
        changes["qkv_layout"] = "concatenated"
    if config.parallel_attn:
        two_norms = config.num_ln_in_parallel_attn == 2
        if two_norms:
            _check(config, "new_decoder_architecture", (True,))
        names = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "input_layernorm")
        changes |= dict(zip(("attention_norm", "feed_forward_norm"), names, strict=True))
    return changes


def _stablelm(config: Any) -> dict[str, Any]:
    parallel = {"parallel": True, "feed_forward_norm": "input_layernorm"} if config.use_parallel_residual else {}
    return parallel | _head_norms(config.qk_layernorm)


# What a config changes in its family's anatomy.
VARIANTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gpt_neox": lambda config: {"parallel": config.use_parallel_residual},
    "phi": lambda config: _head_norms(config.qk_layernorm),
    "cohere": lambda config: _head_norms(config.use_qk_norm),
    "stablelm": _stablelm,
    "opt": _opt,
    "falcon": _falcon,
}
