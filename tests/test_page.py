"""The page of one generation, parsed as a browser would."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from modeling_anee.actions import DEFAULT_TABLE
from modeling_anee.pictures.page import page, scale, write_page
from modeling_anee.pictures.page_parts import (
    DARK_EXIT,
    DARK_EXIT_INK,
    DARK_INK,
    DARK_SCALE,
    LIGHT_INK,
    LIGHT_SCALE,
    SCRIPT,
    STEPS,
    ramp,
)
from modeling_anee.trace import ExecutionTrace


LAYERS = 4
NASTY = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a\nb", " ", "", "&amp;", "'\t'", "é😀"]


def trace_of(tokens, seed=0, valid=None):
    torch.manual_seed(seed)
    actions = torch.randint(0, len(DEFAULT_TABLE), (1, tokens, LAYERS), dtype=torch.uint8)
    valid = torch.ones(1, tokens, dtype=torch.bool) if valid is None else valid
    return ExecutionTrace(actions, torch.rand(1, tokens) * valid, valid, 0.1, "bytes")


class Reader(HTMLParser):
    """Tags, the tokens with their attributes and text, and the text of every section."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.tokens, self.sections, self.scripts = [], [], [], []
        self._depth = self._section = None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.sections.append((attributes["class"], []))
        if tag == "script":
            self.scripts.append("")
        if attributes.get("role") == "option":
            self.tokens.append((attributes, []))
            self.sections[-1][1].append(len(self.tokens) - 1)
            self._depth = 0
        elif self._depth is not None:
            self._depth += 1

    def handle_endtag(self, tag):
        if self._depth == 0:
            self._depth = None
        elif self._depth is not None:
            self._depth -= 1

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and not self.scripts[-1]:
            self.scripts[-1] = data
        elif self._depth is not None:
            self.tokens[-1][1].append(data)


def text_of(parts):
    """The text of a token without the signs for what can't be seen."""
    return re.sub("[⏎⇥∅␍]", "", "".join(parts))


def test_every_token_is_there_with_its_cost_and_actions():
    trace = trace_of(len(NASTY))
    found = Reader(page(trace, NASTY, 3)).tokens
    assert [text_of(parts) for _, parts in found] == NASTY
    for place, (attributes, _) in enumerate(found):
        assert attributes["data-c"] == f"{float(trace.cost[0, place]):.3f}" and attributes["data-n"] == str(place)
        assert attributes["data-a"] == "".join(DEFAULT_TABLE[a].letter for a in trace.actions[0, place].tolist())


def test_the_legend_has_the_actions_that_were_taken_and_where_the_script_finds_them():
    table = DEFAULT_TABLE.with_precisions(["int8", "int4"])
    actions = torch.full((1, 3, LAYERS), table.place("INT4"), dtype=torch.uint8)
    actions[0, 0], actions[0, 1, 0] = 0, table.place("INT8")
    trace = replace(trace_of(3), actions=actions, table=table, head=torch.tensor([[0, 2, 2]], dtype=torch.uint8))
    source = page(trace, ["a", "b", "c"], 1)
    entries = [attributes for tag, attributes in Reader(source).tags if tag == "li"]
    assert [entry["data-name"] for entry in entries] == ["PROCESS", "INT8", "INT4"]
    for entry in entries:
        action = table[int(entry["data-place"])]
        assert (entry["data-name"], entry["data-letter"]) == (action.name, action.letter)
        assert f".a{entry['data-place']}{{background:{action.colour};color:{action.ink}}}" in source
    assert "<dt>head</dt><dd>int8 for 67% of the tokens</dd>" in source
    assert "<dt>head</dt>" not in page(trace_of(3), ["a", "b", "c"], 1)


def test_text_is_inert_wherever_it_comes_from():
    source = page(trace_of(len(NASTY)), NASTY, 3, {"<b>name</b>": "<script>alert(3)</script>", 'x"y': "a & b"})
    reader = Reader(source)
    assert reader.scripts == [SCRIPT]
    assert {tag for tag, _ in reader.tags}.isdisjoint({"img", "b", "iframe", "link", "object"})
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "alert(1)</script>" not in source and "&lt;script&gt;alert(1)&lt;/script&gt;" in source


def test_the_page_needs_nothing_else_and_forbids_other_scripts():
    source = page(trace_of(3), ["a", "b", "c"], 1)
    reader = Reader(source)
    assert not any(name in attributes for _, attributes in reader.tags for name in ("src", "href", "srcset", "data"))
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(", source)
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(reader.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_prompt_and_new_tokens_are_told_apart():
    reader = Reader(page(trace_of(5), list("abcde"), 2))
    assert reader.sections == [("prompt", [0, 1]), ("new", [2, 3, 4])]
    assert [kind for kind, _ in Reader(page(trace_of(2), list("ab"), 2)).sections] == ["prompt"]
    with pytest.raises(ValueError, match="prompt_length=4 is not allowed: there are 2 tokens"):
        page(trace_of(2), list("ab"), 4)


def test_padding_is_left_out_and_the_last_token_has_no_actions():
    valid = torch.tensor([[False, True, True]])
    reader = Reader(page(trace_of(3, valid=valid), ["pad", "a", "b", "last"], 2))
    assert [text_of(parts) for _, parts in reader.tokens] == ["a", "b", "last"]
    assert reader.sections == [("prompt", [0]), ("new", [1, 2])]
    assert "data-a" not in reader.tokens[-1][0] and reader.tokens[-1][0]["class"] == "t none"
    with pytest.raises(ValueError, match="tokens has 2 entries, but the trace has 3 tokens"):
        page(trace_of(3), ["a", "b"], 1)


def test_colours_follow_the_cost():
    cost = torch.linspace(0.31, 0.89, 30).unsqueeze(0)
    trace = ExecutionTrace(trace_of(30).actions, cost, torch.ones(1, 30, dtype=torch.bool), 0.1, "bytes")
    assert scale(trace, 0) == pytest.approx((0.3, 0.9))
    steps = [int(attributes["class"].split()[1][1:]) for attributes, _ in Reader(page(trace, ["x"] * 30, 1)).tokens]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == STEPS - 1


def test_a_few_odd_costs_do_not_stretch_the_scale():
    cost = torch.cat([torch.ones(1), torch.linspace(0.51, 0.69, 39)]).unsqueeze(0)
    trace = ExecutionTrace(trace_of(40).actions, cost, torch.ones(1, 40, dtype=torch.bool), 0.1, "bytes")
    assert scale(trace, 0) == pytest.approx((0.5, 0.7))
    assert f"s{STEPS - 1}" in Reader(page(trace, ["x"] * 40, 1)).tokens[0][0]["class"].split()


@pytest.mark.parametrize("value", [0.0, 0.05, 0.4, 0.45, 1.0, 1.07])
def test_a_scale_holds_costs_that_are_all_alike(value):
    trace = trace_of(2)
    trace = ExecutionTrace(trace.actions, torch.full((1, 2), value), trace.valid, 0.1, "bytes")
    low, high = scale(trace, 0)
    assert low <= value + 1e-6 and value <= high + 1e-6 and high - low > 0.05
    assert len(Reader(page(trace, ["x", "y"], 1)).tokens) == 2


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, two):
    """Of WCAG 2: 4.5 is what normal text needs."""
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_colour():
    for ends, ink in ((LIGHT_SCALE, LIGHT_INK), (DARK_SCALE, DARK_INK)):
        assert len(set(ramp(ends))) == STEPS
        assert min(contrast(colour, ink) for colour in ramp(ends)) >= 4.5
    assert min(contrast(a.colour, a.ink) for a in DEFAULT_TABLE.with_precisions(["int8", "int4"])) >= 4.5
    assert contrast(DARK_EXIT, DARK_EXIT_INK) >= 4.5


def test_costs_of_both_parts_are_in_the_head():
    trace = trace_of(6)
    source = page(trace, list("abcdef"), 2, {"budget": "0.6"})
    for part in (slice(None, 2), slice(2, None)):
        assert f"<dd>{float(trace.cost[0, part].mean()):.3f}, " in source
    assert f"{float(trace.cost.mean()):.3f} of the whole model (bytes)" in source and "<dd>0.6</dd>" in source


def test_another_row_and_a_file(tmp_path):
    one, two = trace_of(3), trace_of(3, seed=1)
    both = ExecutionTrace(
        torch.cat([one.actions, two.actions]), torch.cat([one.cost, two.cost]), torch.cat([one.valid] * 2), 0.1, "bytes"
    )
    write_page(both, tmp_path / "page.html", list("abc"), 1, row=1)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(two, list("abc"), 1)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
