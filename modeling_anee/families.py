"""The one table of supported base families: what each is called and where its parts are.

A family is data only; `blocks.py` reads it. To add one, add an entry to `FAMILIES` and its name to the tests.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Names and flags of one decoder family; the defaults are llama's.

    Dotted names are paths from the causal LM (`decoder`, `final_norm`, ...) or from one decoder layer.
    """

    decoder: str = "model"  # holds the layers, the final norm and the rotary embedding
    layers: str = "layers"
    final_norm: str = "norm"
    rotary: str | None = "rotary_emb"
    position_embeddings: str | None = None  # learned absolute positions

    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # one name: a single fused projection
    qkv_layout: str = "concatenated"  # rows of a fused projection: "concatenated" q, k, v, or "per_head" [head, 3, d]
    output: str = "o_proj"

    feed_forward: str = "mlp"
    feed_forward_norm: str = "post_attention_layernorm"
    gated: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    activation: str = "act_fn"
    parallel: bool = False  # attention and feed-forward read the same hidden state


_LLAMA = Family()
_GPT2 = Family(
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
)
_GPT_NEOX = Family(
    decoder="gpt_neox",
    final_norm="final_layer_norm",
    attention="attention",
    qkv=("query_key_value",),
    qkv_layout="per_head",
    output="dense",
    gated=None,
    parallel=True,
)

FAMILIES = {"llama": _LLAMA, "qwen2": _LLAMA, "gpt2": _GPT2, "gpt_neox": _GPT_NEOX}


def family_of(base: nn.Module) -> Family:
    """The family of a base causal LM.

    Raises:
        ValueError: an unknown family, or a variant of a known one that is not supported; names the known ones.
    """
    config = base.config
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise ValueError(
            f"base model type {model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    if model_type == "gpt_neox" and not config.use_parallel_residual:
        return Family(**{**vars(family), "parallel": False})
    if model_type == "gpt2" and config.add_cross_attention:
        raise ValueError("add_cross_attention=True is not supported: a gpt2 base must be a plain decoder")
    return family


