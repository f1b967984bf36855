"""How many tokens are drafted, and in which plan."""

from types import SimpleNamespace

import pytest

from modeling_anee.draft_policy import EDGES, MOST, Acceptance, DraftPolicy, Outlook, Times


FLAT = [1.0 + 0.05 * more for more in range(MOST + 1)]  # verifying hardly takes longer than decoding
STEEP = [1.0 + more for more in range(MOST + 1)]  # verifying takes as long as decoding each
PARTS = len(EDGES) + 1


def outlook(draft, overall=0.9, full=FLAT, name="plan", counts=(None, None), **fields):
    return Outlook(SimpleNamespace(text=name), Times(full, draft), Acceptance.of(*counts), overall, **fields)


def counted():
    return [0] * PARTS, [0] * PARTS


def test_cheap_drafts_pay_and_dear_ones_do_not():
    assert DraftPolicy([outlook(0.1)]).pays
    assert not DraftPolicy([outlook(1.0)]).pays
    assert not DraftPolicy([outlook(0.1, full=STEEP)]).pays
    assert not DraftPolicy([outlook(0.1, overall=0.05)]).pays
    assert not DraftPolicy([outlook(0.1, rows=64)]).pays


@pytest.mark.parametrize("overall", [0.5, 0.9, 0.99])
def test_the_expected_speed_is_that_of_the_best_length(overall):
    speed, count = outlook(0.1, overall).best()
    speeds = [sum(overall**place for place in range(n + 1)) / (0.1 * n + FLAT[n]) for n in range(1, MOST + 1)]
    assert speed == pytest.approx(max(speeds)) and count == speeds.index(max(speeds)) + 1


def test_likelier_tokens_make_longer_drafts():
    def length(overall, most=MOST):
        policy, drafted = DraftPolicy([outlook(0.1, overall)]), 0
        while policy.goes_on(drafted, overall**drafted, most):
            drafted += 1
        return drafted

    assert length(0.3) < length(0.8) < length(0.97) <= MOST
    assert length(0.97, most=3) == 3 and length(0.97, most=0) == 0


def test_a_draft_ends_where_its_last_token_is_unlikely():
    policy = DraftPolicy([outlook(0.1, 0.95)])
    assert policy.goes_on(2, 0.95**2, MOST) and not policy.goes_on(2, 0.01, MOST)
    assert policy.chance(5.0) > policy.chance(0.01)


def test_margins_tell_nothing_where_tokens_are_drawn():
    drawn = Outlook(None, Times(FLAT, 0.1), Acceptance.of(None, None, by_margin=False), 0.8)
    policy = DraftPolicy([drawn])
    assert policy.chance(5.0) == policy.chance(0.01) == 0.8


def test_what_was_measured_elsewhere_is_soon_overruled():
    good = [1000.0] * PARTS, [999.0] * PARTS
    policy = DraftPolicy([outlook(0.1, 0.99, counts=good)])
    before = policy.chance(1.0)
    for _ in range(30):
        policy.note([([1.0, 2.0], 0)], *counted())
    assert policy.chance(1.0) < 0.2 < 0.9 < before
    assert policy.current.overall < 0.2


def test_tokens_after_the_first_that_was_refused_tell_nothing():
    policy, (drafted, kept) = DraftPolicy([outlook(0.1)]), counted()
    policy.note([([0.3, 2.0, 5.0, 0.01], 2)], drafted, kept)
    assert sum(drafted) == 3 and sum(kept) == 2 and drafted[0] == 0


def test_another_plan_is_taken_when_it_is_expected_to_be_faster():
    first, second = outlook(0.05, name="first"), outlook(0.2, name="second")
    policy = DraftPolicy([second, first])
    assert policy.current is first
    for _ in range(40):
        policy.note([([1.0], 0)], *counted())
    assert policy.current is second and policy.speed == second.best()[0]
