"""Memory of generation, each case in a process of its own: `python -m modeling_anee.evaluation.memory BASE CASE [DTYPE]`.

CASE is `plain` for transformers without us, a budget, or `int8` or `int4`: the base in these, the head in 8 bits, its full
weights dropped. Prints bytes: the peak of the resident size, that at the end, and that before anything was loaded.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..modeling_anee import AneeForCausalLM


PROMPT, NEW = 256, 64  # tokens


class Memory(NamedTuple):
    """Resident bytes of a process that loads a base and generates: at most, at the end, and of these for model and cache."""

    peak: int
    end: int
    model: int


def memory_of(base: str, case: str, dtype: str) -> Memory:
    """Memory of a fresh process; see above for the cases."""
    command = [sys.executable, "-m", __name__, base, case, dtype]
    return read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read(printed: str) -> Memory:
    """What a process has printed."""
    peak, end, begin = map(int, printed.split()[-3:])
    return Memory(peak, end, end - begin)


def main(base: str, case: str, dtype: str = "float32") -> None:
    """Load, generate after a prompt, print what was resident."""
    begin = resident()
    model, budget = load(base, case, dtype)
    config = getattr(model.config, "text_config", model.config)
    limit = min(PROMPT, getattr(config, "max_position_embeddings", PROMPT) // 2)
    ids = torch.arange(3, 3 + limit).unsqueeze(0) % config.vocab_size
    model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids), **budget)
    unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, resident(), begin)


def load(base: str, case: str, dtype: str) -> tuple[Any, dict[str, float]]:
    """The model of a case, and its budget, if it has one."""
    if case == "plain":
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype), {}
    if case not in ("int8", "int4"):
        return AneeForCausalLM.from_base(base, controller="plan", dtype=dtype), {"energy_budget": float(case)}
    plan = f"{AutoConfig.from_pretrained(base).num_hidden_layers}*{case.upper()} / int8"
    model = AneeForCausalLM.from_base(
        base, controller="plan", precisions=sorted({"int8", case}, reverse=True), plans=[plan], drop_full=True, dtype=dtype
    )
    return model, {"energy_budget": model.controller.ceiling}


def resident() -> int:
    """Bytes of this process that are in memory."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return 1024 * int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())], text=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
