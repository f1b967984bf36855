"""What `anee profile` and `anee plan` print and write."""

from typing import Any

import torch

from ..machines.choice import Candidate
from ..machines.measuring import machine_name
from ..machines.profile import Profile


PER_GIGABYTE = 1e6  # bytes in a millisecond, of a gigabyte in a second


def profile_as_text(profile: Profile) -> str:
    """The gist of a profile: one line a map and variant, and what is around the maps."""
    lines = [
        f"{profile.machine}, {profile.base}, measured in {profile.seconds:.0f} s on {profile.made}",
        f"memory {profile.bandwidth / PER_GIGABYTE:.1f} GB/s, launch {profile.launch_ms * 1e3:.1f} us",
        "",
        f"{'linear map':24s}{'1 row, us':>12s}{'GB/s':>8s}{'most rows, us':>16s}{'GFLOP/s':>10s}",
    ]
    for one in profile.maps:
        first, last, rows = one.ms[0], one.ms[-1], one.rows[-1]
        speed = 2 * one.outputs * one.inputs * rows / last / 1e6
        shape = f"{one.variant} {one.name} {one.outputs}x{one.inputs}"
        many = f"{last * 1e3:.0f} at {rows}"
        lines.append(f"{shape:24s}{first * 1e3:12.1f}{one.weight_bytes / first / PER_GIGABYTE:8.1f}{many:>16s}{speed:10.1f}")
    lines += ["", f"{'decoding, batch':24s}{'token, ms':>12s}{'layers besides, us':>22s}{'256 before, us a layer':>26s}"]
    for step in profile.decode:
        besides = ", ".join(f"{ms * 1e3:.0f}" for ms in step.layer_ms.values())
        lines.append(f"{step.batch:<24d}{step.token_ms:12.2f}{besides:>22s}{256e3 * step.context_ms:26.1f}")
    return "\n".join(lines)


def machine_note(profile: Profile, device: torch.device) -> str:
    """What to say where a profile is of another machine, or of other threads; nothing where it is of this one."""
    here = machine_name(device)
    return "" if here == profile.machine else f"the profile is of {profile.machine}; this is {here}"


def choice_report(model: Any, profile: Profile, chosen: Candidate, count: int, batch: int, context: int) -> dict[str, Any]:
    """What was chosen, and what is predicted of it, ready for JSON."""
    total = chosen.times.total
    return {
        "plan": chosen.plan,
        "energy_budget": chosen.budget,
        "cost_unit": model.costs.unit,
        "controller": model.config.controller,
        "plans": count,
        "batch": batch,
        "context": context,
        "ms_per_token": total,
        "tokens_per_second": 1e3 * batch / total,
        "parts_ms": chosen.times.parts,
        "perplexity_ratio": calibrated_ratio(model.config.calibration, chosen.budget),
        "predicted_by": {"machine": profile.machine, "base": profile.base, "made": profile.made},
    }


def calibrated_ratio(calibration: dict[str, Any] | None, budget: float) -> float | None:
    """Perplexity over that of the base at a cost, between calibrated ones; None where none were measured there."""
    costs, ratios = ((calibration or {}).get(name) for name in ("cost", "perplexity_ratio"))
    if not costs or not ratios:
        return None
    points = sorted(zip(costs, ratios, strict=True)) + [(1.0, 1.0)]
    for (low, first), (high, second) in zip(points, points[1:], strict=False):
        if low <= budget <= high and high > low:
            return first + (second - first) * (budget - low) / (high - low)
    return None


def choice_as_text(report: dict[str, Any]) -> str:
    """The same for a terminal."""
    by, ratio = report["predicted_by"], report["perplexity_ratio"]
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in report["parts_ms"].items() if ms)
    lines = [
        f"plan: {report['plan']}",
        f"energy budget: {report['energy_budget']:.4g} (in {report['cost_unit']}, {report['controller']} controller)",
        f"predicted: {report['ms_per_token']:.2f} ms a step of {report['batch']} after {report['context']} tokens, "
        f"{report['tokens_per_second']:.1f} tokens/s",
        f"of which: {parts} ms",
        f"by: {report['profile']}, {by['machine']}, {by['base']}, {by['made']}; linear maps as measured",
        f"the best of {report['plans']} plans that is predicted to take at most {report['most_ms']:.4g} ms",
    ]
    if ratio is not None:
        lines.insert(2, f"perplexity: {ratio:.3f} times the base's, between calibrated budgets")
    return "\n".join(lines)
