"""A page of one generation: one HTML file that needs nothing else, with the text coloured by cost.

Pointing at a token, tapping it or walking to it with the arrow keys shows what every layer did with it. The text of the
model goes into the page only escaped, and the page's policy forbids every script but its own, and every connection.
"""

import base64
import hashlib
import html
import math
import os
from collections.abc import Mapping, Sequence

import torch

from ..actions import Action
from ..data.files import write_file
from ..trace import ExecutionTrace, heads_text
from .page_parts import SCRIPT, STEPS, style


def write_page(
    trace: ExecutionTrace,
    path: str | os.PathLike,
    tokens: Sequence[str],
    prompt_length: int,
    facts: Mapping[str, str] | None = None,
    row: int = 0,
) -> None:
    """Write the page of one row of a generation; `page` has the arguments."""
    write_file(path, page(trace, tokens, prompt_length, facts, row))


def page(
    trace: ExecutionTrace,
    tokens: Sequence[str],
    prompt_length: int,
    facts: Mapping[str, str] | None = None,
    row: int = 0,
) -> str:
    """The page as HTML.

    Args:
        trace: what was done.
        tokens: text of each token, padding included; together they are the text. The last token of `generate`, which
            was not run, may be among them.
        prompt_length: how many of them are the prompt, padding included.
        facts: what else to say of the generation: names and values, for the head of the page.
        row: which row of the batch.

    Raises:
        ValueError: a number of tokens that is not the trace's, or a length of the prompt that they don't have.
    """
    valid = trace.valid[row].tolist()
    if len(tokens) - len(valid) not in (0, 1):
        raise ValueError(f"tokens has {len(tokens)} entries, but the trace has {len(valid)} tokens")
    if not 0 <= prompt_length <= len(tokens):
        raise ValueError(f"prompt_length={prompt_length} is not allowed: there are {len(tokens)} tokens")
    low, high = scale(trace, row)
    parts: dict[bool, list[str]] = {True: [], False: []}
    for place, text in enumerate(tokens):
        if place == len(valid):
            parts[place < prompt_length].append(_token(text, place, None, "", low, high))
        elif valid[place]:
            letters = "".join(trace.table[action].letter for action in trace.actions[row, place].tolist())
            parts[place < prompt_length].append(_token(text, place, float(trace.cost[row, place]), letters, low, high))
    return _frame(
        head=_facts(_measured(trace, row, prompt_length) | dict(facts or {})),
        legend=_legend(low, high, trace, row),
        look=style(trace.table),
        text="".join(_section(name, parts[is_prompt]) for name, is_prompt in (("Prompt", True), ("New tokens", False))),
    )


def scale(trace: ExecutionTrace, row: int) -> tuple[float, float]:
    """The ends of the colour scale: the costs that all but a twentieth of a row lie above and below, to whole tenths.

    So the first tokens, which are processed in full, don't make the others look alike.
    """
    cost = trace.cost[row][trace.valid[row]].sort().values
    if not len(cost):
        return 0.0, 1.0
    out = len(cost) // 20
    low = math.floor(10 * float(cost[out]) + 1e-6) / 10
    return low, max(math.ceil(10 * float(cost[-1 - out]) - 1e-6) / 10, low + 0.1)


def _token(text: str, place: int, cost: float | None, letters: str, low: float, high: float) -> str:
    """One token; without a cost, one that was not run."""
    if cost is None:
        return f'<span class="t none" role="option" tabindex="-1" data-n="{place}">{_visible(text)}</span>'
    step = min(max(int((cost - low) / (high - low) * STEPS), 0), STEPS - 1)
    data = f'data-n="{place}" data-c="{cost:.3f}" data-a="{letters}"'
    return f'<span class="t s{step}" role="option" tabindex="-1" {data}>{_visible(text)}</span>'


def _visible(text: str) -> str:
    """A token's text, escaped, with signs where there would be nothing to see or to point at."""
    if not text:
        return '<i class="sign">∅</i>'
    shown = html.escape(text)
    shown = shown.replace("\r", '<i class="sign">␍</i>').replace("\t", '<i class="sign">⇥</i>\t')
    return shown.replace("\n", '<i class="sign">⏎</i>\n')


def _section(name: str, spans: list[str]) -> str:
    if not spans:
        return ""
    kind = name.split()[0].lower()
    label = f"<h2>{name} <small>{len(spans)} token{'s' * (len(spans) != 1)}</small></h2>"
    return (
        f'<section class="{kind}">{label}<div class="text" role="listbox" aria-label="{name}">{"".join(spans)}</div></section>'
    )


def _measured(trace: ExecutionTrace, row: int, prompt_length: int) -> dict[str, str]:
    """What the trace itself says of the row."""
    valid, cost, depth = trace.valid[row], trace.cost[row], trace.depth[row].float()
    facts = {"mean cost": f"{float(cost[valid].mean()):.3f} of the whole model ({trace.unit})" if valid.any() else "none"}
    for name, part in (
        ("cost of the prompt", slice(None, prompt_length)),
        ("cost of the new tokens", slice(prompt_length, None)),
    ):
        if valid[part].any():
            mean, layers = float(cost[part][valid[part]].mean()), float(depth[part][valid[part]].mean())
            facts[name] = f"{mean:.3f}, {layers:.1f} of {trace.actions.shape[-1]} layers ran"
    if heads := heads_text(trace.rows(torch.tensor([row])).head_share):
        facts["head"] = heads.removeprefix("head ")
    if trace.refined is not None and valid.any():
        facts["ran again"] = f"{float(trace.refined[row][valid].float().mean()):.0%} of the tokens"
    return facts


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{html.escape(n)}</dt><dd>{html.escape(v)}</dd></div>" for n, v in facts.items())


def _legend(low: float, high: float, trace: ExecutionTrace, row: int) -> str:
    """The scale of costs, and the actions that were taken, dearest first: the script reads from it what they are."""
    steps = "".join(f'<span class="s{i}"></span>' for i in range(STEPS))
    taken = trace.table.darkest_first(trace.actions[row][trace.valid[row]])
    actions = "".join(_explained(place, trace.table[place]) for place in taken)
    return (
        f'<div class="scale"><span>cost up to {low:.1f}</span><span class="ramp" aria-hidden="true">{steps}</span>'
        f"<span>{high:.1f} and more</span></div><ul>{actions}</ul>"
    )


def _explained(place: int, action: Action) -> str:
    letter, name, meaning = (html.escape(text) for text in (action.letter, action.name, action.meaning))
    data = f'data-letter="{letter}" data-name="{name}" data-ran="{int(action.runs)}" data-place="{place}"'
    return f'<li {data}><span class="cell a{place}" aria-hidden="true">{letter}</span> {name}: {meaning}</li>'


def _frame(head: str, legend: str, look: str, text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>One generation, token by token</title>
<style>{look}</style>
</head>
<body>
<header><h1>One generation, token by token</h1><dl>{head}</dl><div class="legend">{legend}</div></header>
<main>{text}</main>
<aside aria-live="polite"><p class="what">Point at a token, tap it, or walk with the arrow keys.</p>
<div class="strip" role="img" aria-label="no token chosen"></div></aside>
<noscript><p>Without scripts the text is coloured by cost, but does not show the actions of a token.</p></noscript>
<script>{SCRIPT}</script>
</body>
</html>
"""
