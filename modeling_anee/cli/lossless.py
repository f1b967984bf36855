"""What `anee bench --lossless` and `anee drafts` print."""

from typing import Any

from ..draft_policy import EDGES
from ..evaluation.lossless_benchmark import EARLY, LOOKUP, LOSSLESS, OURS, RARELY


WIDTH = 18  # of a category


def benchmark_as_text(report: dict[str, Any]) -> str:
    """The report of a lossless benchmark for a terminal."""
    every = report["rows"][0]
    ways = (LOOKUP, EARLY, OURS, LOSSLESS)
    head = f"{'category':{WIDTH}s}{'':>4s}" + "".join(f"{way:>15s}" for way in ways)
    lines = [
        f"{report['dtype']}, {report['threads']} threads, {every['questions']} questions, at most {report['new_tokens']} new "
        f"tokens; times as fast as plain generate, prompt included, medians; {EARLY} for one question in {RARELY}",
        "",
        f"{head}{'decoding':>10s}{'kept':>7s}{'tokens/run':>12s}{'bytes':>7s}{'identical':>11s}",
    ]
    for row in report["rows"]:
        faster = "".join(_figure(row["faster"][way], 15) for way in ways)
        kept = "" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
        same = f"{row['identical']}/{row['questions']}"
        lines.append(
            f"{row['category']:{WIDTH}s}{row['questions']:4d}{faster}{_figure(row['decoding_faster'][LOSSLESS], 10)}{kept:>7s}"
            f"{_figure(row['tokens_per_verify'], 12)}{_figure(row['weights_read'], 7)}{same:>11s}"
        )
    lines += [
        "",
        "decoding: lossless, without the prompt; bytes: of weights read for a new token, as a share of the whole model",
    ]
    full = report["milliseconds"]["full"]
    drafts = ", ".join(f"{ms:.2f} in {plan}" for plan, ms in report["milliseconds"].items() if plan != "full")
    lines.append(
        f"milliseconds of the full model for 1, 4, 8, 16 tokens: {', '.join(f'{full[n - 1]:.2f}' for n in (1, 4, 8, 16))}; "
        f"of a drafted token: {drafts}"
    )
    lines += [f"{way}: {told}" for way in (OURS, LOSSLESS) if (told := _told_differences(report["answers"], way))]
    lines += [f"{way} is left out: {error}" for way, error in report["left_out"].items()]
    reasons = sorted({one["plain"] for one in report["answers"] if one["plain"]})
    return "\n".join(lines + [f"decoded plainly: {reason}" for reason in reasons])


def _figure(value: float | None, width: int) -> str:
    return f"{'':{width}s}" if value is None else f"{value:{width}.2f}"


def _told_differences(answers: list[dict[str, Any]], way: str) -> str:
    """Where a way had other tokens than plain `generate`, in words."""
    places = [
        f"question {number}, token {one['differs'][way] + 1} (likeliest by {one['margins'][way]:.1e} in logits)"
        for number, one in enumerate(answers, 1)
        if way in one["differs"]
    ]
    return f"another token than plain generate in {'; '.join(places)}" if places else ""


def drafts_as_text(drafts: dict[str, list], costs: list[float]) -> str:
    """What was measured of plans that draft: the share kept, all in all and by margin."""
    marks = "".join(f"{mark:>8s}" for mark in [f"<{edge:g}" for edge in EDGES] + [f">{EDGES[-1]:g}"])
    lines = [f"{'plan':36s}{'bytes':>7s}{'drafted':>9s}{'kept':>8s}   {marks}  by margin in logits"]
    for plan, cost, drafted, kept in zip(drafts["plans"], costs, drafts["drafted"], drafts["kept"], strict=True):
        shares = "".join(f"{k / n:8.0%}" if n else f"{'':8s}" for n, k in zip(drafted, kept, strict=True))
        lines.append(f"{plan:36s}{cost:7.3f}{sum(drafted):9d}{sum(kept) / max(sum(drafted), 1):8.1%}   {shares}")
    return "\n".join(lines)
