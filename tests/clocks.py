"""A made-up time: it passes as a model's forwards cost, and not otherwise."""

import functools

from modeling_anee import AneeForCausalLM, timing


def passes_with_cost(monkeypatch, now, passes):
    """Time is what `now()` says, and each forward calls `passes` with the cost [B, T] of its tokens."""
    forward = AneeForCausalLM.forward

    @functools.wraps(forward)
    def timed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        passes(output.execution.cost)
        return output

    monkeypatch.setattr(AneeForCausalLM, "forward", timed)
    monkeypatch.setattr(timing, "perf_counter", now)
