"""Token windows: deterministic, disjoint where their parts are, and of every kind of source."""

import gzip
import logging
import sys
import types

import pytest
import torch

from modeling_anee.data import text as reader
from modeling_anee.data.documents import token_windows
from modeling_anee.data.sources import DatasetSource, FileSource, GeneratedSource

from .tiny import VOCABULARY, tiny_base
from .workshop import make_workshop, tiny_tokenizer, words


LENGTH = 8
EOS = 2


@pytest.fixture
def data(tmp_path):
    make_workshop(tmp_path)
    return tmp_path / "data"


def windows(data, *sources, seed=0, base=None, length=LENGTH):
    return token_windows(list(sources), tiny_tokenizer(), length, data, seed, base)


def rows(found):
    return {tuple(row) for row in found.tolist()}


def as_document(line):
    return [*(int(word[1:]) for word in line.split()), EOS]


def test_a_text_is_cut_into_windows_that_are_shuffled(data):
    found = windows(data, FileSource(file="text.txt", tokens=400))
    expected = torch.tensor([int(word[1:]) for word in (data / "text.txt").read_text().split()[:400]]).view(-1, LENGTH)
    assert found.dtype == torch.int64 and found.shape == (50, LENGTH)
    assert not torch.equal(found, expected) and sorted(found.tolist()) == sorted(expected.tolist())


def test_same_seed_same_windows_another_seed_another_order(data):
    source = FileSource(file="text.txt", tokens=400)
    assert torch.equal(windows(data, source), windows(data, source))
    other = windows(data, source, seed=1)
    assert not torch.equal(windows(data, source), other) and rows(other) == rows(windows(data, source))


@pytest.mark.parametrize("name", ["text.txt", "pairs.jsonl"])
def test_a_gzip_file_is_its_text(data, name):
    (data / f"{name}.gz").write_bytes(gzip.compress((data / name).read_bytes()))
    fields = {"tokens": 100, "start": 0.2} | ({"template": "{question}"} if name.endswith(".jsonl") else {})
    plain, packed = (windows(data, FileSource(file=file, **fields)) for file in (name, f"{name}.gz"))
    assert len(plain) and torch.equal(plain, packed)


@pytest.mark.parametrize("damage", [lambda packed: packed[:-20], lambda packed: b"w3 w4 w5"])
def test_a_damaged_gzip_file_is_an_error_that_names_it(data, damage):
    (data / "text.txt.gz").write_bytes(damage(gzip.compress((data / "text.txt").read_bytes())))
    with pytest.raises(ValueError, match="text.txt.gz is not a whole gzip file"):
        windows(data, FileSource(file="text.txt.gz", tokens=100))


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
def test_parts_that_meet_share_no_window_and_miss_no_line(data, lines, share):
    first = FileSource(file="text.txt", tokens=5000, lines=lines, stop=share)
    second = FileSource(file="text.txt", tokens=5000, lines=lines, start=share)
    one, two = windows(data, first), windows(data, second)
    assert len(one) and len(two) and not rows(one) & rows(two)
    whole = windows(data, FileSource(file="text.txt", tokens=5000, lines=lines))
    assert len(whole) - 2 <= len(one) + len(two) <= len(whole) + 1


def test_lines_are_documents_joined_by_eos(data):
    found = windows(data, FileSource(file="text.txt", tokens=11, lines=True), length=11)
    assert found.tolist() == [as_document((data / "text.txt").read_text().splitlines()[0])]


def test_long_texts_are_read_in_pieces_with_the_same_tokens(data, monkeypatch):
    source = FileSource(file="text.txt", tokens=5000)
    whole = windows(data, source)
    monkeypatch.setattr(reader, "PIECE", 50)
    assert torch.equal(windows(data, source), whole)


def test_no_more_is_tokenised_than_is_taken(data, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 50)
    tokenizer, seen = tiny_tokenizer(), []

    class Counting:
        eos_token_id = EOS

        def __call__(self, text, **kwargs):
            seen.append(text)
            return tokenizer(text, **kwargs)

    token_windows([FileSource(file="text.txt", tokens=16)], Counting(), LENGTH, data, 0)
    assert sum(map(len, seen)) < 200 < len((data / "text.txt").read_text()) / 10


def test_progress_is_told_the_tokens_that_are_taken(data):
    told = []
    sources = [FileSource(file="text.txt", tokens=80), FileSource(file="pairs.jsonl", tokens=10**6, template="{answer}")]
    token_windows(sources, tiny_tokenizer(), LENGTH, data, 0, progress=told.append)
    assert sum(told) == 80 + 20 * 3  # two words and EOS


def test_json_lines_fill_a_template(data):
    source = FileSource(file="pairs.jsonl", tokens=4, template="{question}\n{answer}")
    assert windows(data, source, length=4).tolist() == [as_document("w7 w30 w8")]


def test_json_lines_fill_the_chat_template(data):
    source = FileSource(file="pairs.jsonl", tokens=8, chat=[["user", "{question}"], ["assistant", "{answer}"]])
    assert windows(data, source).tolist() == [as_document("w3 w4 w7 w6 w3 w5 w30 w8")[:LENGTH]]


def test_sources_are_taken_up_to_their_tokens_and_mixed(data):
    found = windows(
        data, FileSource(file="text.txt", tokens=80), FileSource(file="pairs.jsonl", tokens=24, template="{answer}")
    )
    assert found.shape == (10 + 3, LENGTH)


@pytest.mark.parametrize("generated", ["chat", "bos"])
def test_the_base_samples_text_without_data(tmp_path, generated):
    source = GeneratedSource(generated=generated, tokens=64, documents=20, new_tokens=12, user_tokens=4, batch=8)
    base = tiny_base()
    state = torch.get_rng_state()
    found = windows(tmp_path, source, base=base)
    assert found.shape[1] == LENGTH and 1 <= len(found) <= 8 and int(found.max()) < VOCABULARY
    assert torch.equal(found, windows(tmp_path, source, base=base))
    assert not torch.equal(found, windows(tmp_path, source, base=base, seed=1))
    assert torch.equal(torch.get_rng_state(), state), "the user's own randomness is not touched"


def test_sampled_chats_are_laid_out_by_the_template(tmp_path):
    source = GeneratedSource(generated="chat", tokens=1000, documents=6, new_tokens=5, user_tokens=3, batch=6)
    found = token_windows([source], tiny_tokenizer(), 2, tmp_path, 0, tiny_base())
    tokens = found.flatten().tolist()
    assert tokens.count(3) >= 12 // 2  # "w3 w4 ... w6 w3 w5", cut into pairs


def test_a_colder_base_repeats_itself_more(tmp_path):
    def distinct(temperature):
        source = GeneratedSource(generated="bos", tokens=400, documents=30, new_tokens=10, temperature=temperature)
        return len(windows(tmp_path, source, base=tiny_base()).unique())

    assert distinct(0.01) < distinct(5.0)


def test_too_little_text_gives_what_there_is_and_says_so(data, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (data / "short.txt").write_text(words(20))
    found = windows(data, FileSource(file="short.txt", tokens=100))
    assert found.shape == (2, LENGTH)
    assert "short.txt has 21 tokens, fewer than tokens=100" in caplog.text


def use_datasets(monkeypatch, columns):
    class Table(list):
        column_names = list(columns)

    def load_dataset(name, config, split, revision):
        assert (name, config, split, revision) == ("org/name", None, "train", None)
        return Table(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_datasets_give_a_column(data, monkeypatch):
    use_datasets(monkeypatch, {"text": ["w5 w6 w7", "w8 w9 w10"]})
    found = windows(data, DatasetSource(dataset="org/name", tokens=8), length=4)
    assert sorted(found.tolist()) == [[5, 6, 7, EOS], [8, 9, 10, EOS]]
    with pytest.raises(ValueError, match="column='body' is not allowed: org/name has text"):
        windows(data, DatasetSource(dataset="org/name", tokens=8, column="body"))


@pytest.mark.parametrize("value", [None, 3, ["w5"]])
def test_a_row_of_a_dataset_without_text_is_named(data, monkeypatch, value):
    use_datasets(monkeypatch, {"text": ["w5 w6 w7", value]})
    with pytest.raises(ValueError, match="org/name, row 1: column 'text' is .*, not a text"):
        windows(data, DatasetSource(dataset="org/name", tokens=8), length=4)


def test_without_datasets_the_error_names_the_extra(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"modeling-anee\[train-data\]"):
        windows(data, DatasetSource(dataset="org/name", tokens=8))


def test_missing_file_names_path_and_option(data):
    with pytest.raises(OSError, match=r"data/gone\.txt does not exist: --data"):
        windows(data, FileSource(file="gone.txt", tokens=8))


@pytest.mark.parametrize(
    "content, source, message",
    [
        ('\n{"a": 1}\n', {"template": "{b}"}, "bad.jsonl, line 2: there is no field 'b'; the fields are a"),
        ('{"b": "w3"}\n{', {"template": "{b}"}, "bad.jsonl, line 2 is not JSON"),
        ("[1]", {"template": "{b}"}, "bad.jsonl, line 1: it is not a JSON object"),
        ('{"b": "w3"}\n\n{"b": null}', {"template": "{b}"}, "bad.jsonl, line 3: the field 'b' is null"),
        ('{"b": NaN}', {"chat": [["user", "{b}"]]}, "bad.jsonl, line 1: the field 'b' is nan"),
        ('{"b": "\\ud83d"}', {"template": "{b}"}, "bad.jsonl, line 1: the text of its fields has .* half of a character"),
        ('{"a": "w5"}', {"template": "{a}"}, "too short for one window of 8 tokens"),
    ],
)
def test_bad_lines_are_errors(data, content, source, message):
    (data / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        windows(data, FileSource(file="bad.jsonl", tokens=8, **source))


def test_a_part_of_a_file_has_the_line_numbers_of_the_whole(data):
    lines = ['{"b": "w3 w4"}'] * 9 + ['{"b": null}']
    (data / "bad.jsonl").write_text("\n".join(lines))
    assert len(windows(data, FileSource(file="bad.jsonl", tokens=8, template="{b}", stop=0.9)))
    with pytest.raises(ValueError, match="bad.jsonl, line 10: the field 'b' is null"):
        windows(data, FileSource(file="bad.jsonl", tokens=100, template="{b}", start=0.5))


def test_a_chat_that_the_template_refuses_has_its_line(data):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    source = FileSource(file="pairs.jsonl", tokens=8, chat=[["user", "{question}"]])
    with pytest.raises(ValueError, match="pairs.jsonl, line 1 does not fit .* chat template: roles must alternate"):
        token_windows([source], tokenizer, LENGTH, data, 0)


@pytest.mark.parametrize("spelling", [lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n")])
@pytest.mark.parametrize("name", ["text.txt", "pairs.jsonl"])
def test_byte_order_marks_and_ends_of_lines_do_not_matter(data, name, spelling):
    fields = {"tokens": 100} | ({"template": "{question}"} if name.endswith(".jsonl") else {"lines": True, "stop": 0.7})
    before = windows(data, FileSource(file=name, **fields))
    (data / name).write_bytes(spelling((data / name).read_bytes()))
    assert torch.equal(windows(data, FileSource(file=name, **fields)), before)


# What the tokenizer puts before every text


@pytest.mark.parametrize("kind", ["file", "lines", "records", "generated"])
def test_every_window_begins_as_the_tokenizer_begins_every_text(data, kind):
    source = {
        "file": FileSource(file="text.txt", tokens=400),
        "lines": FileSource(file="text.txt", tokens=400, lines=True),
        "records": FileSource(file="pairs.jsonl", tokens=60, template="{answer}"),
        "generated": GeneratedSource(generated="bos", tokens=64, documents=20, new_tokens=12),
    }[kind]
    bare = token_windows([source], tiny_tokenizer(), LENGTH - 1, data, 0, tiny_base())
    found = token_windows([source], tiny_tokenizer(begins_with_bos=True), LENGTH, data, 0, tiny_base())
    assert found.shape[1] == LENGTH and set(found[:, 0].tolist()) == {1}
    assert torch.equal(found[:, 1:], bare)


def test_what_the_base_or_tokenizer_lack_is_an_error(data):
    with pytest.raises(ValueError, match="no base to sample text"):
        windows(data, GeneratedSource(generated="bos", tokens=8, documents=1))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="generated='chat' is not allowed.*no chat template"):
        source = GeneratedSource(generated="chat", tokens=8, documents=1)
        token_windows([source], tokenizer, LENGTH, data, 0, tiny_base())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        token_windows([FileSource(file="text.txt", tokens=8)], tokenizer, LENGTH, data, 0)
    (data / "latin.txt").write_bytes(b"w5 \xe9\n")
    with pytest.raises(ValueError, match="latin.txt is not text in UTF-8: .* at byte 3, in line 1"):
        windows(data, FileSource(file="latin.txt", tokens=8))
