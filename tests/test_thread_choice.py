"""Fewer threads while others take processors away: when they are tried, when kept, and that torch has its own again."""

import contextlib
import importlib
import threading

import pytest
import torch

from modeling_anee import thread_choice
from modeling_anee.budget_sources import Deadline, TokensPerSecond
from modeling_anee.thread_choice import KNOWN_WAIT, WAIT, begin_choice

from .clocks import passes_with_cost
from .tiny import token_ids, wrap


NEW = 40
MODE = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(autouse=True)
def threads():
    """Four of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Others:
    """A machine of four processors, some of which others use."""

    count = 4

    def __init__(self):
        self.used = 0.0

    def busy(self):
        return self.used


@pytest.fixture
def others(monkeypatch):
    made = Others()
    monkeypatch.setattr(thread_choice, "Processors", lambda psutil, every: made)
    return made


@pytest.fixture
def no_psutil(monkeypatch):
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: real("no_such_module" if name == "psutil" else name))


def numbers(paces, choice=None):
    """Threads after each token of a pace, by number of threads."""
    with contextlib.closing(Ended(choice or begin_choice())) as choosing:
        return [choosing.after(pace) for pace in paces]


class Ended:
    def __init__(self, choice):
        self.choice, self.close = choice, choice.end

    def after(self, pace):
        self.choice.passed(pace[torch.get_num_threads()], 100)
        return torch.get_num_threads()


QUICK, SLOW = {4: 1.0, 3: 1.2, 2: 1.6, 1: 3.0}, {4: 5.0, 3: 1.2, 2: 1.6, 1: 3.0}


def test_one_processor_that_others_take_is_left_to_them(others):
    choice = begin_choice()
    assert [choice.passed(1.0, 9) or choice.current for _ in range(5)] == [4] * 5
    others.used = 1.0
    assert numbers([SLOW] * 10, choice) == [3] * 10
    assert torch.get_num_threads() == 4


def test_all_threads_run_again_when_others_are_gone(others):
    choice = begin_choice()
    others.used = 2.0
    for _ in range(8):
        choice.passed(SLOW[choice.current], 9)
    others.used = 0.1
    assert choice.current == 2 and numbers([QUICK] * 8, choice)[-KNOWN_WAIT:] == [4] * KNOWN_WAIT


def test_what_is_no_faster_is_given_up_and_tried_ever_more_rarely(others):
    others.used = 1.0
    tried = [place for place, number in enumerate(numbers([QUICK] * 64)) if number == 3]
    gaps = [late - early for early, late in zip(tried, tried[1:], strict=False)]
    assert tried[0] == 0 and gaps == sorted(gaps) and gaps[-1] > 3 * gaps[0] >= 3 * KNOWN_WAIT


def test_a_single_slow_token_changes_nothing_where_no_other_process_is_busy(others):
    assert numbers([QUICK] * 5 + [SLOW] + [QUICK] * 5) == [4] * 11


def test_without_psutil_a_slow_token_is_enough_and_all_threads_are_tried_again(no_psutil):
    found = numbers([QUICK] * 5 + [SLOW] * 3 + [QUICK] * (WAIT + 2))
    assert found[:5] == [4] * 5 and found[5:8] == [2] * 3 and found[-1] == 4


def test_only_one_generation_at_a_time_changes_the_number(others):
    first = begin_choice()
    assert begin_choice() is None
    first.end()
    begin_choice().end()
    torch.set_num_threads(1)
    assert begin_choice() is None


class Machine:
    """A token takes 0.3 seconds and as many as it costs; from some time on others are busy, and four threads much slower."""

    def __init__(self, others, begin):
        self.now, self.others, self.begin, self.used = 0.0, others, begin, []

    def run(self, cost):
        self.others.used = float(self.now >= self.begin)
        threads = torch.get_num_threads()
        self.used.append(threads)
        self.now += (0.3 + cost) * ((6.0 if threads == 4 else 1.3) if self.others.used else 1.0)


@pytest.fixture
def machine(others, monkeypatch):
    made = Machine(others, begin=float("inf"))
    passes_with_cost(monkeypatch, lambda: made.now, lambda cost: made.run(float(cost[:, -1].mean())))
    return made


def model():
    return wrap(keep_first_tokens=0, precisions=["int8", "int4"])


@pytest.mark.parametrize("change", [True, False])
def test_a_deadline_that_no_budget_can_meet_is_met_with_fewer_threads(change, machine):
    seconds = NEW * 1.3 * 1.2
    machine.begin = seconds / 2
    model().generate(token_ids(1, 5), energy_budget=Deadline(seconds, change_threads=change), **MODE)
    assert (machine.now == pytest.approx(seconds, rel=0.02)) == change
    assert (machine.used[-1] == 3) == change and torch.get_num_threads() == 4


def test_after_an_error_torch_has_its_threads(machine):
    machine.begin = 10.0

    def fails(ids, scores):
        if torch.get_num_threads() < 4:
            raise KeyError("on the way")
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(KeyError, match="on the way"):
        model().generate(token_ids(1, 5), energy_budget=TokensPerSecond(1.0), stopping_criteria=[fails], **MODE)
    assert torch.get_num_threads() == 4
    begin_choice().end()  # nobody else is in the way


def test_numbers_and_functions_leave_threads_alone(machine):
    machine.begin = 0.0
    for budget in (0.5, lambda progress: 0.5):
        model().generate(token_ids(1, 5), energy_budget=budget, **MODE)
    assert set(machine.used) == {4}


def test_generations_at_once_end_with_the_number_of_the_begin(others):
    others.used = 1.0

    def generate():
        model().generate(token_ids(1, 5), energy_budget=Deadline(1e-6), **MODE)

    running = [threading.Thread(target=generate) for _ in range(3)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    assert torch.get_num_threads() == 4
