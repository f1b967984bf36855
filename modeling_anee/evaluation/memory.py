"""Peak memory of generation, each case in a process of its own: `python -m modeling_anee.evaluation.memory BASE BUDGET`.

BUDGET is a number, or `plain` for transformers without us. Prints the peak resident size in bytes.
"""

import resource
import subprocess
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..modeling_anee import AneeForCausalLM


def peak_memory(base: str, budget: float | None, dtype: str) -> int:
    """Peak bytes of a fresh process that loads a base and generates; without a budget, with plain transformers."""
    command = [sys.executable, "-m", __name__, base, "plain" if budget is None else str(budget), dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(base: str, budget: str, dtype: str = "float32") -> None:
    """Load, generate 64 tokens after a prompt of 256, print the peak."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    limit = min(256, getattr(model.config, "max_position_embeddings", 256) // 2)
    ids = torch.arange(3, 3 + limit).unsqueeze(0) % model.config.vocab_size
    length: dict[str, Any] = {
        "max_new_tokens": 64,
        "min_new_tokens": 64,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    if budget == "plain":
        model.generate(ids, **length)
    else:
        AneeForCausalLM.from_base(model, controller="plan").generate(ids, energy_budget=float(budget), **length)
    unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main(*sys.argv[1:])
