"""Tiny random bases of every family, built locally, and the ways to wrap them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from modeling_anee import AneeConfig, AneeForCausalLM
from modeling_anee.controller_gated import GatedController


VOCABULARY = 64
LAYERS = 4
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}

GROUPED = {**COMMON, **SHAPE, "num_key_value_heads": 2}
WINDOW = 4  # shorter than the sequences of the tests
MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0] * 4}
GEMMA = {**GROUPED, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, "layer_types": MIXED}
FALCON = {**COMMON, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
OPT = {**FALCON, "ffn_dim": 48, "max_position_embeddings": 128}

# One configuration per family, that has what is peculiar to it.
CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, head_dim=12, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=12),
    "smollm3": lambda: SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1, 0]),
    "gemma2": lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "gemma3_text": lambda: Gemma3TextConfig(**GEMMA, final_logit_softcapping=5.0),
    "phi": lambda: PhiConfig(**GROUPED, rope_parameters=PARTIAL),
    "phi3": lambda: Phi3Config(**GROUPED, rope_parameters=PARTIAL, sliding_window=WINDOW),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, **SHAPE, rotary_pct=0.5, use_parallel_residual=True),
    "opt": lambda: OPTConfig(**OPT),
    "falcon": lambda: FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "granite": lambda: GraniteConfig(
        **GROUPED, embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.2, logits_scaling=2.5
    ),
    "starcoder2": lambda: Starcoder2Config(**GROUPED, sliding_window=WINDOW),
    "stablelm": lambda: StableLmConfig(**GROUPED, rope_parameters=PARTIAL, use_qkv_bias=True),
    "cohere": lambda: CohereConfig(**GROUPED, logit_scale=0.3),
}

# What else a family's configuration can ask for.
VARIANTS = {
    "llama-biases": lambda: LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, head_dim=12),
    "mistral-full": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "qwen2-sliding": lambda: Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3-sliding": lambda: Qwen3Config(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, layer_types=MIXED),
    "smollm3-sliding": lambda: SmolLM3Config(
        **GROUPED, no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=WINDOW, layer_types=MIXED
    ),
    "gemma2-uncapped": lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    "phi-qk_layernorm": lambda: PhiConfig(**COMMON, **SHAPE, rope_parameters=PARTIAL, qk_layernorm=True),
    "phi3-full": lambda: Phi3Config(**COMMON, **SHAPE),
    "phi3-longrope": lambda: Phi3Config(
        **GROUPED, rope_parameters=LONG, max_position_embeddings=128, original_max_position_embeddings=64
    ),
    "gpt2-inverse_layer_idx": lambda: GPT2Config(
        **COMMON, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(
        **COMMON, **SHAPE, rotary_pct=0.5, use_parallel_residual=False, attention_bias=False
    ),
    "opt-norm_after": lambda: OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16, enable_bias=False),
    "opt-no_final_norm": lambda: OPTConfig(
        **OPT, _remove_final_layer_norm=True, layer_norm_elementwise_affine=False, word_embed_proj_dim=16
    ),
    "falcon-one_norm": lambda: FalconConfig(
        **FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True
    ),
    "falcon-multi_query": lambda: FalconConfig(**FALCON, multi_query=True),
    "falcon-per_head": lambda: FalconConfig(**FALCON, multi_query=False, parallel_attn=False),
    "olmo2-biases": lambda: Olmo2Config(**COMMON, **SHAPE, attention_bias=True),
    "granite-biases": lambda: GraniteConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "starcoder2-full": lambda: Starcoder2Config(**GROUPED, use_bias=False),
    "stablelm-parallel": lambda: StableLmConfig(
        **GROUPED, rope_parameters=PARTIAL, use_parallel_residual=True, qk_layernorm=True
    ),
    "cohere-qk_norm": lambda: CohereConfig(**GROUPED, logit_scale=0.8, use_qk_norm=True, attention_bias=True),
}

FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2")  # enough where a test is not about anatomy
CONTROLLERS = ("budget", "confidence", "gated", "learned", "plan", "refine", "routed")
BRIDGES = {"bridge_rank": 4, "ffn_bridge_rank": 4, "exit_translator_rank": 4}


def tiny_base(family: str = "llama", attn_implementation: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A random base in eval mode whose norms and biases matter, and whose logits are far apart."""
    torch.manual_seed(seed)
    attn_implementation = attn_implementation or ("eager" if family == "gemma2" else "sdpa")
    config = (CONFIGS | VARIANTS)[family]()
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(8.0)
    base.generation_config.pad_token_id = 0
    return base


def wrap(base: PreTrainedModel | None = None, controller: str = "plan", **fields) -> AneeForCausalLM:
    """Wrap a base. Bridges get random weights; controllers that learn such that actions differ from token to token."""
    fields.setdefault("decision_interval", 1)
    if controller == "routed":  # without, it keeps no account of its budget
        fields.setdefault("calibration", {"budgets": [0.3, 0.9], "settings": [3.0, -1.0]})
    if controller == "refine":
        fields.setdefault("calibration", {"budgets": [0.3, 0.9], "settings": [3.0, 0.5]})
    base = base or tiny_base()
    fields.setdefault("base_model_name_or_path", base.name_or_path or "tiny/base")  # what has no name can't be saved
    model = AneeForCausalLM.from_base(base, controller=controller, **fields)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.bridges.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    if controller == "routed":
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.controller.parameters():
                parameter.copy_(torch.randn_like(parameter))
    if controller == "gated":
        randomise_gates(model.controller)
        if model.config.calibration is None:
            model.config.calibration = calibration_of_gates(model.config)
            model.controller.bind(model.costs)
    if controller == "learned":
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.controller.parameters():
                parameter.copy_(torch.randn_like(parameter))
            for probe, policy in zip(model.controller.probes, model.controller.policies, strict=True):
                probe.linear.weight.mul_(3.0)
                policy[0].weight[:, :2].mul_(8.0)
                policy[0].bias.sub_(4.0 * policy[0].weight[:, :2].sum(dim=1) / 8.0)
                leaves = model.config.table.leaving.repeat(len(policy[-1].bias) // len(model.config.table))
                policy[-1].bias.copy_(torch.where(leaves, -4.0, 2.0))
    return model


def randomise_gates(controller: GatedController, seed: int = 1) -> None:
    """Weights under which about half of the scores are below 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bank in (controller.routers, controller.gates):
            bank.weight.copy_(torch.randn(bank.weight.shape, generator=generator) / bank.weight.shape[1] ** 0.5)
            bank.bias.zero_()


def calibration_of_gates(
    config: AneeConfig, budgets: tuple[float, float] = (0.3, 0.9), thresholds: tuple[float, float] = (2.0, -2.0)
) -> dict:
    """Thresholds at two budgets, from where most is left out to where little is; fewer tokens leave."""
    boundaries, layers, exits = len(config.gated_variants) - 1, config.num_layers, len(config.exit_layers)
    return {
        "budgets": list(budgets),
        "settings": [0.1, 1.0],
        "thresholds": [[[threshold - 0.5 * number] * layers for number in range(boundaries)] for threshold in thresholds],
        "exit_thresholds": [[threshold / 2 - 1.0] * exits for threshold in thresholds],
        "shares": [[0.3] * layers, [0.8] * layers],
    }


def token_ids(rows: int = 2, tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, tokens] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)


def assert_alike(model, other, ids: torch.Tensor, budget) -> None:
    """Check that two models say the same of token ids at a budget, at the same cost and by the same heads."""
    found, expected = model(ids, energy_budget=budget), other(ids, energy_budget=budget)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.execution.cost, expected.execution.cost)
    assert torch.equal(found.execution.head, expected.execution.head)
