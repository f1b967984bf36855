"""Tiny random bases of every family, built locally, and the ways to wrap them."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen2Config

from modeling_anee import AneeForCausalLM


VOCABULARY = 64
LAYERS = 4
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}

CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON, **SHAPE, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**COMMON, **SHAPE, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, **SHAPE, rotary_pct=0.5, use_parallel_residual=True),
}
FAMILIES = sorted(CONFIGS)
CONTROLLERS = ("budget", "confidence", "learned", "plan")


def tiny_base(family: str = "llama", attn_implementation: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random base in eval mode whose norms and biases matter, and whose logits are far apart."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(8.0)
    base.generation_config.pad_token_id = 0
    return base


def wrap(base: PreTrainedModel | None = None, controller: str = "plan", **fields) -> AneeForCausalLM:
    """Wrap a base; a learned controller gets random weights, so that its actions differ from token to token."""
    model = AneeForCausalLM.from_base(base or tiny_base(), controller=controller, **fields)
    if controller == "learned":
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.controller.parameters():
                parameter.copy_(torch.randn_like(parameter))
            model.controller.probe.linear.weight.mul_(3.0)
            model.controller.policy[0].weight[:, :2].mul_(8.0)
            model.controller.policy[0].bias.sub_(4.0 * model.controller.policy[0].weight[:, :2].sum(dim=1) / 8.0)
            model.controller.policy[-1].bias.copy_(torch.tensor([2.0, 2.0, -4.0]))
    return model


def token_ids(rows: int = 2, tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, tokens] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
