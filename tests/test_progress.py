"""Progress: plain lines where there is no terminal, a bar where there is one, nothing from other processes."""

import re
import time

import pytest
from rich.console import Console

from modeling_anee.data import progress as module
from modeling_anee.data.progress import progress, waiting


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.02)


def work(advance=lambda count: None):
    for _ in range(3):
        time.sleep(0.05)
        advance(2)


def test_away_from_a_terminal_there_are_plain_lines_every_few_seconds_not_one_an_item(capsys, monkeypatch):
    with progress("scoring", 6) as advance:
        work(advance)
    with waiting("loading"):
        work()
    lines = capsys.readouterr().err.splitlines()
    assert any(re.fullmatch(r"scoring: [24]/6, 0:00:0\d so far, about 0:00:0\d to go", line) for line in lines)
    assert any(re.fullmatch(r"loading: 0:00:0\d so far", line) for line in lines)
    monkeypatch.setattr(module, "EVERY", 100.0)
    with progress("quick", 10_000) as advance, waiting("short"):
        for _ in range(10_000):
            advance(1)
    assert capsys.readouterr() == ("", "")


def test_what_is_kept_has_its_last_state(capsys, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 100.0)
    with progress("bridges", 5, done=2, keep=True) as advance:
        advance(3)
    assert capsys.readouterr().err == "bridges: 5/5, 0:00:00 so far\n"


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(module, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True, force_interactive=True))
    with progress("scoring", 6, keep=True) as advance:
        work(advance)
    with waiting("loading"):
        work()
    shown = capsys.readouterr().err
    assert "━" in shown and "6/6" in shown and "so far" not in shown


def test_other_processes_show_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with progress("scoring", 6, keep=True) as advance:
        work(advance)
    with waiting("loading"):
        work()
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_lines(capsys):
    with pytest.raises(ValueError), progress("scoring", 6, keep=True):
        raise ValueError
    before = capsys.readouterr().err
    time.sleep(0.1)
    assert "6/6" not in before and capsys.readouterr().err == ""
