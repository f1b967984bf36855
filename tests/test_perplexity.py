"""Perplexity: equal to what it is by definition, each token scored once, and errors that match resampling."""

import math

import pytest
import torch

from modeling_anee.data.windows import Window, windows
from modeling_anee.evaluation.controls import controls, score_control
from modeling_anee.evaluation.perplexity import NotFiniteError, Scores, corpus_perplexity, ratio, score
from modeling_anee.evaluation.processes import Processes

from .tiny import CONTROLLERS, tiny_base, token_ids, wrap


def text_ids(tokens, seed=0):
    return token_ids(1, tokens, seed)[0]


def made_scores(nll, tokens, **fields):
    return Scores(torch.tensor(nll, dtype=torch.float64), torch.tensor(tokens), "made", **fields)


# Scores


@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("budget", [None, 0.6])
@torch.no_grad()
def test_equals_the_definition_token_by_token(budget, stride):
    base = tiny_base()
    model, extra = (base, {}) if budget is None else (wrap(base), {"energy_budget": budget})
    cut = windows(text_ids(20), 8, stride)
    found = score(model, cut, budget)
    for window, nll, tokens in zip(cut, found.nll, found.tokens, strict=True):
        expected = 0.0
        for place in range(window.context, len(window.ids)):
            logits = model(input_ids=window.ids[None, :place], **extra).logits[0, -1]
            expected -= float(logits.log_softmax(dim=-1)[window.ids[place]])
        assert float(nll) == pytest.approx(expected, rel=1e-4)
        assert int(tokens) == len(window.ids) - window.context
    assert found.perplexity == pytest.approx(math.exp(float(found.nll.sum()) / int(found.tokens.sum())))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_one_window_equals_the_loss_of_transformers(family):
    base, ids = tiny_base(family), text_ids(24)
    with torch.no_grad():
        loss = base(input_ids=ids[None], labels=ids[None]).loss
    assert corpus_perplexity(base, ids).perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_batch_size_does_not_matter(controller):
    model = wrap(controller=controller)
    cut = windows(text_ids(75), 16, 9)
    one, many = (score(model, cut, 0.6, batch_size=size) for size in (1, 5))
    torch.testing.assert_close(one.nll, many.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.cost, many.cost)
    assert torch.equal(one.tokens, many.tokens) and one.digest == many.digest


@pytest.mark.parametrize("controller", [None, *CONTROLLERS])
def test_windows_of_any_lengths_may_be_run_together(controller):
    model, budget = (tiny_base(), None) if controller is None else (wrap(controller=controller), 0.6)
    mixed = [Window(text_ids(length, seed=length), context) for length, context in ((3, 1), (17, 4), (2, 1), (9, 8), (9, 1))]
    together, alone = (score(model, mixed, budget, batch_size=size) for size in (5, 1))
    torch.testing.assert_close(together.nll, alone.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.perplexities, (alone.nll / alone.tokens).exp(), rtol=1e-5, atol=1e-5)
    if controller is not None:
        torch.testing.assert_close(together.cost, alone.cost)
        assert together.cost_tokens.tolist() == [3, 17, 2, 9, 9]


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_budget_one_is_the_base(controller):
    base, ids = tiny_base(), text_ids(50)
    plain, ours = corpus_perplexity(base, ids, 16), corpus_perplexity(wrap(base, controller), ids, 16, energy_budget=1.0)
    torch.testing.assert_close(ours.nll, plain.nll, rtol=1e-5, atol=1e-5)
    assert ratio(ours, plain)[0] == pytest.approx(1.0, abs=1e-5)
    assert ours.mean_cost == pytest.approx(1.0)
    assert plain.mean_cost is None


@pytest.mark.parametrize("budget", [0.6, 0.75, 0.9])
def test_the_plan_controller_keeps_its_budget(budget):
    found = corpus_perplexity(wrap(), text_ids(512), 128, energy_budget=budget)
    assert found.mean_cost == pytest.approx(budget, abs=0.02)
    assert found.mean_cost < 1.0


def test_cost_is_that_of_every_token_that_was_run():
    model, cut = wrap(energy_budget=0.7), windows(text_ids(30), 12, 5)
    found = score(model, cut)  # the model's own budget
    traces = [model(window.ids[None]).execution for window in cut]
    torch.testing.assert_close(found.cost, torch.cat([trace.cost.sum(dim=1) for trace in traces]).double())
    assert found.cost_tokens.tolist() == [len(window.ids) for window in cut]


def test_progress_counts_every_window():
    done, cut = [], windows(text_ids(75), 10)
    score(tiny_base(), cut, batch_size=3, progress=done.append)
    assert done == [3, 3, 2] and sum(done) == len(cut)


def test_a_model_can_be_trained_after_scoring():
    model, ids = wrap(controller="learned"), text_ids(16)
    found = corpus_perplexity(model, ids, 8, energy_budget=0.5)
    assert not (found.nll.is_inference() or found.cost.is_inference())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(ids[None], labels=ids[None], energy_budget=1.0).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


# Errors of the mean


def test_standard_error_of_windows_of_equal_length_is_that_of_a_mean():
    nll = torch.tensor([30.0, 34.0, 25.0, 41.0, 28.0], dtype=torch.float64)
    found = made_scores(nll.tolist(), [10] * 5)
    expected = (nll / 10).std() / math.sqrt(5) * (nll / 10).mean().exp()
    assert found.standard_error == pytest.approx(float(expected))


def test_standard_error_matches_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 60, (200,), generator=generator)
    nll = tokens * (2.0 + 0.3 * torch.randn(200, generator=generator, dtype=torch.float64))
    drawn = torch.randint(0, 200, (4000, 200), generator=generator)
    bootstrap = (nll[drawn].sum(dim=1) / tokens[drawn].sum(dim=1)).exp().std()
    assert made_scores(nll.tolist(), tokens.tolist()).standard_error == pytest.approx(float(bootstrap), rel=0.05)


def test_one_window_has_no_standard_error():
    found = corpus_perplexity(tiny_base(), text_ids(20))
    assert math.isfinite(found.perplexity) and found.standard_error is None and ratio(found, found)[1] is None


def test_the_ratio_to_itself_is_one_without_error():
    found = corpus_perplexity(tiny_base(), text_ids(70), 16, 5)
    assert ratio(found, found) == (1.0, 0.0)


def test_the_ratio_is_that_of_the_perplexities_and_its_error_is_paired():
    tokens, base_nll = [9, 10, 11, 10], [20.0, 30.0, 45.0, 24.0]
    base = made_scores(base_nll, tokens)
    worse = made_scores([nll + 0.2 * n for nll, n in zip(base_nll, tokens, strict=True)], tokens)
    times, error = ratio(worse, base)
    assert times == pytest.approx(worse.perplexity / base.perplexity) == pytest.approx(math.exp(0.2))
    assert error == pytest.approx(0.0, abs=1e-9) and base.standard_error > 1.0


# Bad arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 1}, "length=1"),
        ({"stride": 0}, "stride=0"),
        ({"length": 8, "stride": 9}, "stride=9"),
        ({"ids": torch.tensor([5])}, "at least 2 tokens"),
        ({"ids": token_ids()}, r"\(2, 12\)"),
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"energy_budget": 1.5}, "energy_budget=1.5"),
        ({"model": tiny_base(), "energy_budget": 0.5}, "LlamaForCausalLM is a plain model"),
        ({"model": tiny_base("gpt2"), "ids": text_ids(129)}, "length=129 .* 128 positions"),
        ({"model": wrap(tiny_base("gpt2")), "ids": text_ids(129)}, "length=129 .* 128 positions"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        corpus_perplexity(**({"model": wrap(), "ids": text_ids(30)} | arguments))


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="windows is empty"):
        score(tiny_base(), [])


@pytest.mark.parametrize("other", [(1, 30, 10), (0, 30, 15), (0, 29, 10)])
def test_a_ratio_needs_the_same_windows(other):
    base = tiny_base()
    seed, tokens, length = other
    with pytest.raises(ValueError, match="different windows"):
        ratio(corpus_perplexity(base, text_ids(tokens, seed), length), corpus_perplexity(base, text_ids(30), 10))


# Scores that are no numbers


def broken(base, value):
    """The base, which gives a logit of the second word that is no number."""
    with torch.no_grad():
        base.lm_head.weight[4] = value
    return base


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_score_that_is_no_number_names_window_and_budget(value, wrapped):
    base = broken(tiny_base(), value)
    model = wrap(base) if wrapped else base
    told = []
    with pytest.raises(
        NotFiniteError, match=f"window 1 of 8 at {'budget 0.6' if wrapped else 'full budget'} has no score"
    ) as error:
        score(model, windows(text_ids(80), 10), 0.6 if wrapped else None, batch_size=2, progress=told.append)
    assert error.value.window == 0 and not told, "it stops there"


def test_only_some_windows_may_have_no_score():
    cut, target = windows(text_ids(60), 10), 4
    assert [target in w.ids[1:].tolist() for w in cut] != [True] * 6

    def loss(logits, targets):
        return torch.where(targets == target, math.nan, 1.0)

    first = next(number for number, window in enumerate(cut) if target in window.ids[1:].tolist())
    with pytest.raises(NotFiniteError, match=f"window {first + 1} of 6") as error:
        score(tiny_base(), cut, loss=loss)
    assert error.value.window == first


def test_a_perplexity_that_is_no_float_is_no_score():
    with pytest.raises(NotFiniteError, match="the loss of a token is 800 nats"):
        score(tiny_base(), windows(text_ids(20), 10), loss=lambda logits, targets: torch.full(targets.shape, 800.0))


def test_a_control_without_a_score_is_named():
    model = wrap(broken(tiny_base(), math.nan), plans=["PPSP"], bridge_rank=4)
    control = controls(model)[1]
    with pytest.raises(NotFiniteError, match="window 1 of 2 at budget 0.6, static plan, no bridges has no score"):
        score_control(model, control, windows(text_ids(20), 10), 0.6)


def test_all_of_several_processes_say_which_window_has_no_score():
    """This one has scored the second batch; the first, of another process, has no score."""

    class Second(Processes):
        def sum(self, tensor):
            return torch.cat([torch.full((2,), math.nan), tensor[2:]])

    with pytest.raises(NotFiniteError, match="window 1 of 4"):
        score(tiny_base(), windows(text_ids(40), 10), batch_size=2, processes=Second(1, 2))
