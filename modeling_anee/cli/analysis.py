"""What `anee analyze` reads from its options and prints; the figures are `evaluation/analysis.py`'s."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.windows import Window
from ..trace import heads_text
from .texts import full_windows_of


def windows_of(tokenizer: Any, texts: Sequence[Path], length: int, limit: int | None) -> list[Window]:
    """Windows of several texts, at most `limit` of each. Raises as `full_windows_of`."""
    return [window for text in texts for window in full_windows_of(tokenizer, text, length, limit)]


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal: for each budget what holds of the whole, a table of the layers, one of the classes."""
    lines = [
        f"{report['controller']} controller, {report['dtype']}, cost unit {report['cost_unit']}, {report['windows']} windows "
        f"of {report['length']} tokens; entropies in bits, by class = what the class of a token tells of the action",
    ]
    for row in report["rows"]:
        lines += ["", *_whole(row), "", *_layers(row["layers"]), "", *_classes(row["classes"])]
    return "\n".join(lines)


def draw_plot(report: dict[str, Any], file: Path) -> None:
    """Draw the tokens' way through the layers."""
    from ..pictures.life import draw_life

    draw_life(report, file)


def _whole(row: dict[str, Any]) -> list[str]:
    """The lines of a budget."""
    ways, heads = row["ways"], heads_text(row["heads"])
    return [
        f"budget {row['budget']:g}: {row['tokens']} tokens, mean cost {row['mean_cost']:.3f}, mean depth "
        f"{row['mean_depth']:.1f} of {len(row['layers'])} layers{heads and f', {heads}'}",
        f"ways through the model: {ways['distinct']}, entropy {ways['entropy']:.2f}; the class of a token tells "
        f"{row['explained_by_class']:.1%} of the layers' entropy",
    ]


def _layers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each layer; columns that are 0 everywhere are left out."""
    columns = [
        *((f"attention {name}", [_percent(row["attention"][name]) for row in rows]) for name in rows[0]["attention"]),
        *((f"FFN {name}", [_percent(row["feed_forward"][name]) for row in rows]) for name in rows[0]["feed_forward"]),
        ("leave", [_percent(row["leaves"]) for row in rows]),
        ("entropy", [f"{row['entropy']:.3f}" for row in rows]),
        ("by class", [f"{row['information']:.3f}" for row in rows]),
        ("router", [_bits(row["router_entropy"]) for row in rows]),
    ]
    shown = [(name, cells) for name, cells in columns if set(cells) - {"0%", ""}]
    return _table([("layer", [str(row["layer"]) for row in rows]), *shown])


def _classes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each class of tokens."""
    columns = [
        ("tokens", [str(row["tokens"]) for row in rows]),
        ("share", [f"{row['share']:.1%}" for row in rows]),
        ("of the work", [f"{row['work']:.1%}" for row in rows]),
        ("cost", [f"{row['mean_cost']:.4f}" for row in rows]),
        ("depth", [f"{row['mean_depth']:.2f}" for row in rows]),
        ("attention", [f"{row['attention']:.1%}" for row in rows]),
        ("FFN", [f"{row['feed_forward']:.1%}" for row in rows]),
    ]
    if any(row["leaves"] for row in rows):
        columns += [
            ("leave", [_percent(row["leaves"]) for row in rows]),
            ("exit depth", [f"{row['exit_depth']:.2f}" for row in rows]),
        ]
    return _table([("class", [row["class"] for row in rows]), *columns])


def _table(columns: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Lines of columns, each a heading and its cells: the first to the left, the others to the right."""
    padded = []
    for place, (heading, cells) in enumerate(columns):
        width = max(map(len, (heading, *cells)))
        padded.append([cell.ljust(width) if place == 0 else cell.rjust(width) for cell in (heading, *cells)])
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _bits(entropy: float | None) -> str:
    return "" if entropy is None else f"{entropy:.3f}"
