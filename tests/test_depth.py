"""Depth along a text, read back from its PNG; and the text of single tokens."""

import pytest
import torch
from matplotlib import image
from matplotlib.colors import to_rgb
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from modeling_anee.actions import DEFAULT_TABLE, PROCESS, SKIP, SKIP_FFN
from modeling_anee.cli.main import app
from modeling_anee.evaluation.tokens import token_texts
from modeling_anee.pictures import depth
from modeling_anee.pictures.depth import draw_depth
from modeling_anee.trace import ExecutionTrace

from .tiny import tiny_base
from .workshop import tiny_tokenizer, words


LAYERS = 6
PER_LINE, MAX_TOKENS = 8, 16  # in the test of long texts


def trace_of(actions, valid=None):
    """A trace of rows of actions [B, T, L] whose cost is above every bar."""
    cost = torch.full(actions.shape[:2], 1.1)
    valid = torch.ones(actions.shape[:2], dtype=torch.bool) if valid is None else valid
    return ExecutionTrace(actions, cost * valid, valid, 0.1, "bytes")


def stairs(tokens, seed=0):
    """Token i runs its first layers whole, then some with attention only, skips the rest; uint8 [1, T, L]."""
    torch.manual_seed(seed)
    whole, attention = torch.randint(1, 4, (2, tokens, 1))
    layer = torch.arange(LAYERS)
    skip_ffn = torch.where(layer < whole + attention, int(SKIP_FFN), int(SKIP))
    return torch.where(layer < whole, int(PROCESS), skip_ffn).to(torch.uint8).unsqueeze(0)


def picture(trace, path, tokens=None, **kwargs):
    """Pixels [H, W, 3] in [0, 1]."""
    draw_depth(trace, path, ["x"] * trace.valid.shape[1] if tokens is None else tokens, **kwargs)
    assert path.read_bytes().startswith(b"\x89PNG")
    return torch.from_numpy(image.imread(path)).float()[..., :3]


def pixels_of(pixels, action):
    return (pixels - torch.tensor(to_rgb(DEFAULT_TABLE[action].colour))).abs().amax(dim=-1) < 0.01


def test_the_height_of_a_bar_is_the_depth_of_its_token(tmp_path):
    """Of two texts, the one with twice the layers has twice the colour; the parts keep their proportion."""
    actions = torch.full((1, 20, LAYERS), int(SKIP), dtype=torch.uint8)
    areas = {}
    for whole, attention in ((2, 0), (4, 0), (2, 2), (2, 4)):
        one = actions.clone()
        one[..., :whole], one[..., whole : whole + attention] = int(PROCESS), int(SKIP_FFN)
        pixels = picture(trace_of(one), tmp_path / "x.png")[:-40]  # without the legend
        areas[whole, attention] = [int(pixels_of(pixels, a).sum()) for a in (PROCESS, SKIP_FFN)]
    assert areas[4, 0][0] == pytest.approx(2 * areas[2, 0][0], rel=0.1)
    assert areas[2, 2][0] == pytest.approx(areas[2, 0][0], rel=0.1)
    assert areas[2, 4][1] == pytest.approx(2 * areas[2, 2][1], rel=0.1)
    assert areas[2, 0][1] == 0


def test_long_texts_go_on_in_the_next_line_and_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "PER_LINE", PER_LINE)
    monkeypatch.setattr(depth, "MAX_TOKENS", MAX_TOKENS)
    one, two = (picture(trace_of(stairs(n)), tmp_path / "x.png") for n in (PER_LINE, PER_LINE + 1))
    assert two.shape[0] > 1.5 * one.shape[0] and two.shape[1] == one.shape[1]
    long = picture(trace_of(stairs(MAX_TOKENS + 9)), tmp_path / "x.png")
    cut = picture(trace_of(stairs(MAX_TOKENS + 9)[:, :MAX_TOKENS]), tmp_path / "y.png")
    title = 30  # rows of pixels; that of the long text says that it is cut
    assert torch.equal(long[title:], cut[title:]) and not torch.equal(long[:title], cut[:title])


def test_padding_is_left_out_and_the_last_token_may_have_a_text(tmp_path):
    actions = stairs(12)
    padded = torch.cat([torch.zeros(1, 3, LAYERS, dtype=torch.uint8), actions], dim=1)
    trace = trace_of(padded, torch.arange(15).unsqueeze(0) >= 3)
    names = [f"t{i}" for i in range(12)]
    plain = picture(trace_of(actions), tmp_path / "a.png", names, prompt_length=5)
    assert torch.equal(plain, picture(trace, tmp_path / "b.png", ["pad"] * 3 + names, prompt_length=8))
    assert torch.equal(plain, picture(trace_of(actions), tmp_path / "c.png", [*names, "last"], prompt_length=5))
    assert not torch.equal(plain, picture(trace_of(actions), tmp_path / "d.png", names))
    with pytest.raises(ValueError, match="tokens has 3 entries, but the trace has 12 tokens"):
        draw_depth(trace_of(actions), tmp_path / "e.png", ["x"] * 3)
    with pytest.raises(ValueError, match="row=0 of the trace has no tokens"):
        draw_depth(trace_of(actions, torch.zeros(1, 12, dtype=torch.bool)), tmp_path / "e.png", names)
    assert not (tmp_path / "e.png").exists()


def byte_tokenizer():
    """A token for each byte, and a decoder that strips the space at the start, as those of sentencepiece do."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"▁a": 256, "b": 257, "<unk>": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_texts_of_tokens_are_together_the_text():
    tokenizer = byte_tokenizer()
    ids = [256, 257, 256, *"é".encode(), 256, *"😀".encode(), *b"\n", 257]
    texts = token_texts(tokenizer, ids)
    assert texts[:3] == ["a", "b", " a"] and texts[-2:] == ["\n", "b"]  # one by one, "a" would have no space
    assert "".join(texts).replace("\ufffd", "") == tokenizer.decode(ids) == "ab aé a😀\nb"
    assert [text for text in texts if "😀" in text] == ["😀"]
    assert token_texts(tokenizer, []) == []


def test_the_verb_draws_a_text_and_generate_a_generation(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(words(100))
    runner, output = CliRunner(), tmp_path / "depth.png"
    call = ["depth", "--model", str(tmp_path / "base"), "--text", str(tmp_path / "text.txt"), "--energy-budget", "0.6"]
    done = runner.invoke(app, [*call, "--tokens", "30", "--output", str(output)])
    assert done.exit_code == 0 and "30 tokens, mean cost 0.6" in done.stdout, done.output
    assert image.imread(output).ndim == 3
    page, drawn = tmp_path / "page.html", tmp_path / "generated.png"
    call = ["generate", "--model", str(tmp_path / "base"), "--prompt", "w5 w6 w7", "--max-new-tokens", "5", "--stats"]
    done = runner.invoke(app, [*call, "--energy-budget", "0.6", "--depth", str(drawn), "--page", str(page)])
    assert done.exit_code == 0, done.output
    assert image.imread(drawn).ndim == 3
    assert "J per new token" in done.stderr or "energy not known: " in done.stderr
    head = page.read_text(encoding="utf-8")
    assert "<dd>0.6</dd>" in head and "<dd>plan</dd>" in head and "tokens/s" in head and "w6" in head
    assert AutoTokenizer.from_pretrained(tmp_path / "base").decode([5]) == "w5"
    for option in ("--depth", "--page"):
        done = runner.invoke(app, [*call, option, "no/such/folder/x"])
        assert done.exit_code == 1 and f"{option} no/such/folder/x" in done.stderr
