"""The heatmap, read back from its PNG."""

import pytest
import torch
from matplotlib import image
from matplotlib.colors import to_rgb

from modeling_anee.actions import DEFAULT_TABLE, PROCESS, SKIP, SKIP_FFN
from modeling_anee.pictures.drawing import token_label
from modeling_anee.pictures.heatmap import MAX_TOKENS, draw_heatmap
from modeling_anee.trace import ExecutionTrace


LAYERS, TOKENS = 5, 12


def random_trace(rows: int = 2, tokens: int = TOKENS, layers: int = LAYERS, seed: int = 0) -> ExecutionTrace:
    """Random actions in a frame of SKIP, by which a map is found in a picture."""
    torch.manual_seed(seed)
    actions = torch.randint(0, len(DEFAULT_TABLE), (rows, tokens, layers), dtype=torch.uint8)
    actions[:, [0, -1]] = actions[:, :, [0, -1]] = int(SKIP)
    return ExecutionTrace(actions, torch.rand(rows, tokens), torch.ones(rows, tokens, dtype=torch.bool), 0.1, "bytes")


def picture(trace: ExecutionTrace, path, *args, **kwargs) -> torch.Tensor:
    """Pixels [H, W, 3] in [0, 1]."""
    draw_heatmap(trace, path, *args, **kwargs)
    assert path.read_bytes().startswith(b"\x89PNG")
    return torch.from_numpy(image.imread(path)).float()[..., :3]


def pixels_of(pixels: torch.Tensor, action: int) -> torch.Tensor:
    return (pixels - torch.tensor(to_rgb(DEFAULT_TABLE[action].colour))).abs().amax(dim=-1) < 0.01


def box(mask: torch.Tensor) -> tuple[int, int]:
    where = mask.nonzero().flatten()
    return int(where[0]), int(where[-1]) + 1


def map_of(pixels: torch.Tensor) -> torch.Tensor:
    """The part of a picture that is the map."""
    skip = pixels_of(pixels, SKIP)
    # Only the map's own first and last layer are lines of this colour across most of the picture.
    top, bottom = box(skip.float().mean(dim=1) > 0.4)
    left, right = box(skip[top + 2])
    return pixels[top:bottom, left:right]


def read_actions(pixels: torch.Tensor, tokens: int, layers: int) -> torch.Tensor:
    """The actions [T, L] that a map shows, from the pixel in the middle of each cell."""
    cells = map_of(pixels)
    height, width = cells.shape[:2]
    shown = torch.full((tokens, layers), -1)
    for token in range(tokens):
        for layer in range(layers):
            middle = cells[int((layers - layer - 0.5) * height / layers), int((token + 0.5) * width / tokens)]
            found = [action for action in range(len(DEFAULT_TABLE)) if pixels_of(middle, action)]
            shown[token, layer] = found[0] if found else -1
    return shown


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> torch.Tensor:
    """The picture of row 0 of `random_trace()`."""
    return picture(random_trace(), tmp_path_factory.mktemp("plain") / "map.png")


def test_every_cell_has_the_colour_of_its_action(tmp_path, plain):
    trace = random_trace()
    assert read_actions(plain, TOKENS, LAYERS).tolist() == trace.actions[0].tolist()
    other = picture(trace, tmp_path / "map.png", row=1)
    assert read_actions(other, TOKENS, LAYERS).tolist() == trace.actions[1].tolist()


def test_colours_have_about_the_right_proportions(plain):
    cells = map_of(plain)
    for action in range(len(DEFAULT_TABLE)):
        share = float((random_trace().actions[0] == action).float().mean())
        assert float(pixels_of(cells, action).float().mean()) == pytest.approx(share, abs=0.02)


def test_a_legend_shows_every_action(plain):
    corner = plain[: plain.shape[0] // 4, 2 * plain.shape[1] // 3 :]
    assert all(pixels_of(corner, action).sum() > 100 for action in range(len(DEFAULT_TABLE)))


def test_precisions_have_colours_of_their_own_and_the_legend_has_what_was_taken(tmp_path):
    """The cheaper, the further from the foot of a bar and the lower in the legend; what was not taken is not explained."""
    table = DEFAULT_TABLE.with_precisions(["int8", "int4"])
    process, int8, int4, skip = (table.place(name) for name in ("PROCESS", "INT8", "INT4", "SKIP_INT4"))
    actions = torch.full((1, 12, 4), skip, dtype=torch.uint8)
    actions[0, :9], actions[0, :6], actions[0, :3] = int4, int8, process
    trace = ExecutionTrace(actions, torch.rand(1, 12), torch.ones(1, 12, dtype=torch.bool), 0.1, "bytes", table=table)
    pixels = picture(trace, tmp_path / "map.png")
    found = [(pixels - torch.tensor(to_rgb(action.colour))).abs().amax(dim=-1) < 0.01 for action in table]
    right, top = 2 * pixels.shape[1] // 3, pixels.shape[0] // 4
    below = [int(box(found[place][: top + 20, right:].any(dim=1))[0]) for place in (process, int8, int4, skip)]
    assert below == sorted(below)
    not_taken = [
        table.place(name) for name in ("SKIP_FFN", "INT8_INT4", "INT8_SKIP_FFN", "INT4_SKIP_FFN")
    ]  # greys are ink, too
    assert all(found[place].sum() < 50 for place in not_taken)
    side = [
        box(found[place][pixels.shape[0] // 3 :, 54 * pixels.shape[1] // 100 :].any(dim=0)) for place in (process, int8, int4)
    ]
    assert side == sorted(side) and len(set(side)) == 3


def test_padding_is_left_out(tmp_path):
    trace = random_trace(rows=1)
    padded = ExecutionTrace(
        torch.cat([torch.zeros(1, 3, LAYERS, dtype=torch.uint8), trace.actions], dim=1),
        torch.cat([torch.zeros(1, 3), trace.cost], dim=1),
        torch.cat([torch.zeros(1, 3, dtype=torch.bool), trace.valid], dim=1),
        0.1,
        "bytes",
    )
    words = [f"t{i}" for i in range(TOKENS)]
    plain = picture(trace, tmp_path / "plain.png", words, prompt_length=5)
    with_padding = picture(padded, tmp_path / "padded.png", ["pad"] * 3 + words, prompt_length=5 + 3)
    assert torch.equal(plain, with_padding)


def test_what_follows_the_end_of_a_row_does_not_move_the_end_of_its_prompt(tmp_path):
    trace = random_trace(rows=1)
    ended = ExecutionTrace(trace.actions, trace.cost, torch.arange(TOKENS).unsqueeze(0) < TOKENS - 4, 0.1, "bytes")
    shorter = picture(trace.tokens(0, TOKENS - 4), tmp_path / "shorter.png", prompt_length=5)
    assert torch.equal(picture(ended, tmp_path / "ended.png", prompt_length=5), shorter)


def test_long_texts_are_cut(tmp_path):
    trace = random_trace(rows=1, tokens=MAX_TOKENS + 40)
    cut = picture(trace.tokens(0, MAX_TOKENS), tmp_path / "cut.png")
    long = picture(trace, tmp_path / "long.png")
    title = 30  # rows of pixels; that of the long text says that it is cut
    assert torch.equal(long[title:], cut[title:]) and not torch.equal(long[:title], cut[:title])


def test_labels_prompt_and_title_are_drawn(tmp_path, plain):
    trace = random_trace()
    words = [f"word{i}" for i in range(TOKENS)]
    pictures = [
        plain,
        picture(trace, tmp_path / "words.png", words),
        picture(trace, tmp_path / "others.png", words[::-1]),
        picture(trace, tmp_path / "prompt.png", prompt_length=7),
        picture(trace, tmp_path / "title.png", title="a title"),
    ]
    assert all(one.shape != two.shape or not torch.equal(one, two) for i, one in enumerate(pictures) for two in pictures[:i])
    # The map stays the same; a line at the end of the prompt lies between two cells.
    for pixels in pictures:
        assert read_actions(pixels, TOKENS, LAYERS).tolist() == trace.actions[0].tolist()


def test_odd_tokens_are_drawn(tmp_path):
    words = ["", " ", "\n", "\t", "$x^2$", "\\frac", "a_b", "%", "x" * 40, "é", "“", "<|im_start|>"]
    pixels = picture(random_trace(), tmp_path / "odd.png", words)
    assert read_actions(pixels, TOKENS, LAYERS).tolist() == random_trace().actions[0].tolist()


@pytest.mark.parametrize(
    ("text", "label"),
    [("", "∅"), ("a\nb", "a⏎b"), ("\t", "⇥"), ("$", r"\$"), ("x" * 15, "x" * 15), ("x" * 16, "x" * 14 + "…"), ("  ", "␣␣")],
)
def test_label(text, label):
    assert token_label(text) == label


def test_the_last_generated_token_may_have_a_label_but_no_others(tmp_path):
    trace, path = random_trace(), tmp_path / "map.png"
    words = [f"t{i}" for i in range(TOKENS + 1)]
    assert torch.equal(picture(trace, path, words), picture(trace, path, words[:-1]))
    path.unlink()
    for count in (0, TOKENS - 1, TOKENS + 2):
        with pytest.raises(ValueError, match=f"tokens has {count} entries, but the trace has {TOKENS} tokens"):
            draw_heatmap(trace, path, ["x"] * count)
    assert not path.exists()


def test_one_token_can_be_drawn(tmp_path):
    picture(random_trace().tokens(0, 1), tmp_path / "map.png", ["x"], prompt_length=1)


def test_the_share_of_each_layer_is_drawn_by_action(tmp_path):
    """At the right of the map: PROCESS from the axis on, then SKIP_FFN; what is left out is blank."""
    trace = random_trace(rows=1)
    actions = torch.full_like(trace.actions, int(SKIP))
    actions[0, 1:7, 2], actions[0, 7:10, 2] = int(PROCESS), int(SKIP_FFN)
    pixels = picture(ExecutionTrace(actions, 0 * trace.cost, trace.valid, 0.1, "bytes"), tmp_path / "map.png")
    side = pixels[pixels.shape[0] // 3 :, 54 * pixels.shape[1] // 100 :]
    whole, attention = (box(pixels_of(side, action).any(dim=0)) for action in (PROCESS, SKIP_FFN))
    assert abs(whole[1] - attention[0]) <= 2  # one follows the other
    assert whole[1] - whole[0] == pytest.approx(2 * (attention[1] - attention[0]), abs=4)
    assert not pixels_of(side, SKIP).any()
