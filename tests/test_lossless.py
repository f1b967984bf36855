"""Lossless decoding: the tokens of budget 1.0, or its distribution, however they are drafted."""

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from modeling_anee.compatibility import cache_argument, cache_of
from modeling_anee.draft_policy import DraftPolicy

from .tiny import BRIDGES, CONFIGS, CONTROLLERS, VOCABULARY, tiny_base, token_ids, wrap


PRECISIONS = {"precisions": ["int8", "int4"]}
GREEDY = {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return wrap(**PRECISIONS)


def both(model, ids=None, **options):
    """What a model generates at budget 1.0, and losslessly."""
    ids = token_ids(1) if ids is None else ids
    options = GREEDY | options
    return model.generate(ids, energy_budget=1.0, **options), model.generate(ids, lossless=True, **options)


def assert_same(plain, lossless, drafts: bool = True) -> None:
    assert torch.equal(plain.sequences, lossless.sequences)
    account = lossless.execution.lossless
    assert bool(account.drafted) == drafts == (not account.plain), account
    assert torch.equal(plain.execution.actions, lossless.execution.actions)
    torch.testing.assert_close(plain.execution.cost, lossless.execution.cost)
    assert torch.equal(plain.execution.valid, lossless.execution.valid)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_budget_1_in_every_family(family):
    assert_same(*both(wrap(tiny_base(family), **PRECISIONS)))


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_they_are_with_every_controller(controller):
    fields = {"precisions": ["int8"]} if controller == "gated" else PRECISIONS
    assert_same(*both(wrap(controller=controller, energy_budget=0.3, **fields, **BRIDGES)))


def test_a_base_without_precisions_drafts_in_8_bits():
    plain, lossless = both(wrap())
    assert_same(plain, lossless)
    assert lossless.execution.lossless.plan == "4*INT8 / int8"


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 20},
        {"bad_words_ids": [[5], [6, 7]], "exponential_decay_length_penalty": (3, 1.1)},
        {"forced_eos_token_id": 2, "suppress_tokens": [8, 9]},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 5},
        {"eos_token_id": list(range(3, 12))},
    ],
    ids=str,
)
def test_they_are_under_all_that_generate_can_be_told(model, options):
    options = {"eos_token_id": 2} | options
    plain, lossless = both(model, **options)
    assert_same(plain, lossless)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens_need_no_drafts(model, count):
    plain, lossless = both(model, max_new_tokens=count)
    assert torch.equal(plain.sequences, lossless.sequences)
    assert lossless.execution.lossless.drafted <= max(count - 2, 0)
    assert "nothing was left to draft" in lossless.execution.summary() or count == 3


def test_they_are_in_a_left_padded_batch(model):
    ids, mask = token_ids(3), torch.ones(3, 12, dtype=torch.int64)
    mask[1, :5] = mask[2, :2] = 0
    ids[mask == 0] = 0
    for end in (2, [2, *range(20, 28)]):
        plain, lossless = both(model, ids, attention_mask=mask, eos_token_id=end)
        assert_same(plain, lossless)
    alone = model.generate(ids[1:2, 5:], lossless=True, **GREEDY | {"eos_token_id": end}).sequences[0, 7:]
    assert torch.equal(lossless.sequences[1, 12:][: len(alone)], alone)


def test_a_padded_row_and_embeddings_alone(model):
    ids, mask = token_ids(1), torch.ones(1, 12, dtype=torch.int64)
    mask[0, :4] = 0
    assert_same(*both(model, ids, attention_mask=mask))
    embeds = model.get_input_embeddings()(ids)
    plain = model.generate(inputs_embeds=embeds, energy_budget=1.0, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embeds, lossless=True, **GREEDY).sequences, plain.sequences)


class Counts(LogitsProcessor):
    """Forbids the token that was seen so many calls ago: what it says hangs on how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, self.calls % VOCABULARY] = -1e9
        return scores + 0.1 * torch.sin(torch.arange(VOCABULARY) * self.calls)


class Until(StoppingCriteria):
    """Ends after a token, wherever it comes."""

    def __init__(self, token):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


def test_processors_and_criteria_of_the_users_see_what_they_would_see_in_plain_decoding(model):
    first, second = Counts(), Counts()
    plain = model.generate(token_ids(1), energy_budget=1.0, logits_processor=LogitsProcessorList([first]), **GREEDY)
    lossless = model.generate(token_ids(1), lossless=True, logits_processor=LogitsProcessorList([second]), **GREEDY)
    assert_same(plain, lossless)
    assert first.calls == second.calls
    last = plain.sequences[0, 20].item()
    for rows in (1, 2):
        first, second = Until(last), Until(last)
        plain = model.generate(token_ids(rows), energy_budget=1.0, stopping_criteria=StoppingCriteriaList([first]), **GREEDY)
        lossless = model.generate(token_ids(rows), lossless=True, stopping_criteria=StoppingCriteriaList([second]), **GREEDY)
        assert torch.equal(plain.sequences, lossless.sequences)
        assert first.seen == second.seen


class Listener(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}], ids=str)
def test_a_streamer_hears_one_token_at_a_time(model, options):
    first, second = Listener(), Listener()
    model.generate(token_ids(1), energy_budget=1.0, streamer=first, **GREEDY, **options)
    model.generate(token_ids(1), lossless=True, streamer=second, **GREEDY, **options)
    assert first.heard == second.heard


def test_scores_and_logits_are_those_of_plain_decoding(model):
    plain, lossless = both(model, output_scores=True, output_logits=True, repetition_penalty=1.3)
    assert_same(plain, lossless)
    torch.testing.assert_close(lossless.scores, plain.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lossless.logits, plain.logits, rtol=1e-4, atol=1e-4)
    lossless.scores[0].mul_(2)  # ordinary tensors


@pytest.mark.parametrize("kind", [None, DynamicCache])
def test_what_stays_in_the_cache_is_of_the_full_model(model, kind):
    caches = [{} if kind is None else cache_argument(kind()) for _ in range(2)]
    plain = model.generate(token_ids(1), energy_budget=1.0, **GREEDY, **caches[0])
    lossless = model.generate(token_ids(1), lossless=True, **GREEDY, **caches[1])
    assert_same(plain, lossless)
    for own, other in zip(cache_of(lossless).layers, cache_of(plain).layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.values, other.values, rtol=1e-4, atol=1e-4)
    more = [torch.cat((one.sequences, token_ids(1, 3, seed=5)), dim=1) for one in (plain, lossless)]
    plain = model.generate(more[0], energy_budget=1.0, **GREEDY, **cache_argument(cache_of(plain)))
    lossless = model.generate(more[1], lossless=True, **GREEDY, **cache_argument(cache_of(lossless)))
    assert_same(plain, lossless)


def test_a_continued_cache_may_begin_with_cheap_tokens(model):
    start = token_ids(1)
    for lossless in ({"energy_budget": 1.0}, {"lossless": True}):
        cache = model(start[:, :8], energy_budget=0.2, use_cache=True).cache
        sequences = model.generate(start, **GREEDY, **lossless, **cache_argument(cache)).sequences
        if "energy_budget" in lossless:
            expected = sequences
    assert torch.equal(sequences, expected)


def test_ties_fall_as_they_do_in_plain_decoding():
    base = tiny_base()
    with torch.no_grad():
        base.lm_head.weight[VOCABULARY // 2 :] = base.lm_head.weight[: VOCABULARY // 2]  # every token has a twin
    plain, lossless = both(wrap(base, **PRECISIONS))
    assert torch.equal(plain.sequences, lossless.sequences)
    assert lossless.execution.lossless.near_ties == 24


def test_the_account_adds_up(model):
    execution = both(model)[1].execution
    account = execution.lossless
    assert account.tokens == 24
    assert account.verified == account.verifies + account.drafted
    assert account.accepted + account.verifies == account.tokens - 1
    drafted, kept = (sum(sum(counts[column]) for counts in account.by_margin.values()) for column in range(2))
    assert kept == account.accepted and drafted <= account.drafted
    rejected = account.drafted - account.accepted
    assert float(execution.discarded) == pytest.approx(rejected + account.drafting)
    assert execution.spent == pytest.approx(float(execution.cost.sum()) + rejected + account.drafting, rel=1e-6)
    assert 0 < account.acceptance <= 1 < account.tokens_per_verify
    assert account.weights_read < 1 < account.work
    assert account.summary() in execution.summary()


def test_a_generation_config_can_ask_for_it(model):
    plain = model.generate(token_ids(1), energy_budget=1.0, **GREEDY)
    config = GenerationConfig(lossless=True, energy_budget=0.3, pad_token_id=0, **GREEDY)
    assert_same(plain, model.generate(token_ids(1), generation_config=config))
    for other in ({"lossless": False}, {"energy_budget": 0.5}, {"energy_budget": 1.0}):  # the call itself comes first
        assert model.generate(token_ids(1), generation_config=config, **other).execution.lossless is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "no drafts"),
        ({"prompt_lookup_num_tokens": 3}, "no drafts"),
        ({"use_cache": False}, "no cache"),
        ({"output_hidden_states": True}, "hidden states"),
        ({"cache_implementation": "static"}, "can't forget"),
    ],
)
def test_where_nothing_can_be_drafted_it_is_said(model, said, options, reason):
    plain, lossless = both(model, **options)
    assert torch.equal(plain.sequences, lossless.sequences)
    assert reason in lossless.execution.lossless.plain and any(reason in one for one in said)
    assert reason in lossless.execution.summary()


def test_where_drafts_are_not_expected_to_pay_none_are_made(said):
    model = wrap(drafts={"plans": ["4*INT8 / int8"], "drafted": [[9.0] * 8], "kept": [[1.0] * 8]}, **PRECISIONS)
    plain, lossless = both(model)
    assert_same(plain, lossless, drafts=False)
    assert any("expected to be 0." in one for one in said)


def test_drafts_that_fail_are_given_up():
    base = tiny_base()
    model = wrap(base, drafts={"plans": ["4*SKIP / int4"], "drafted": [[99.0] * 8], "kept": [[98.0] * 8]}, **PRECISIONS)
    plain, lossless = both(model, max_new_tokens=60, min_new_tokens=60)
    account = lossless.execution.lossless
    assert torch.equal(plain.sequences, lossless.sequences)
    assert account.drafted and "no longer seemed" in account.plain and account.plain in account.summary()


@pytest.mark.parametrize("option", [{"energy_budget": 0.5}, {"prompt_energy_budget": 0.5}, {"budget_feedback": 0.5}], ids=str)
def test_budgets_beside_it_are_refused(model, option):
    with pytest.raises(ValueError, match=f"leave {next(iter(option))}=0.5 out"):
        model.generate(token_ids(1), lossless=True, **option)


def test_it_is_true_or_false(model):
    with pytest.raises(ValueError, match="lossless='fast' is not allowed"):
        model.generate(token_ids(1), lossless="fast")


@pytest.fixture
def drafts_of_two(monkeypatch):
    """Drafts of two tokens, whatever is expected of them."""
    monkeypatch.setattr(DraftPolicy, "pays", True)
    monkeypatch.setattr(DraftPolicy, "goes_on", lambda self, drafted, chance, most: drafted < min(most, 2))


def sampled(model, rows, calls, options):
    """How often each pair of tokens came first, [V, V]."""
    ids, counts = token_ids(1, 6).expand(rows, -1), torch.zeros(VOCABULARY**2)
    torch.manual_seed(0)
    for _ in range(calls):
        output = model.generate(ids, lossless=True, return_dict_in_generate=True, **options)
        assert output.execution.lossless.drafted
        pairs = output.sequences[:, 6] * VOCABULARY + output.sequences[:, 7]
        counts += torch.bincount(pairs, minlength=VOCABULARY**2)
    return counts.view(VOCABULARY, VOCABULARY)


DRAWN = {"top_k": 0, "do_sample": True, "max_new_tokens": 4, "eos_token_id": None}


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5, "top_k": 12, "repetition_penalty": 1.2}, {"temperature": 6.0}], ids=str
)
def test_sampled_tokens_have_the_full_models_distribution(drafts_of_two, options, calls=2):
    model, options = wrap(precisions=["int4"]), DRAWN | options
    counts = sampled(model, 1000, calls, options)
    assert_same_distribution(counts, probabilities(model, token_ids(1, 6), options) * counts.sum())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"top_k": 12, "repetition_penalty": 1.2}], ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.5, 6.0])
def test_20000_of_them_have_it(drafts_of_two, temperature, options):
    test_sampled_tokens_have_the_full_models_distribution(None, options | {"temperature": temperature}, calls=20)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_they_have_it_where_a_row_is_alone(drafts_of_two, temperature):
    model, options = wrap(precisions=["int4"]), DRAWN | {"temperature": temperature}
    counts = sampled(model, 1, 20_000, options)
    assert_same_distribution(counts, probabilities(model, token_ids(1, 6), options) * counts.sum())


def probabilities(model, ids, options):
    """Of every pair of tokens that may follow, [V, V]."""
    options = options | {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True, "energy_budget": 1.0}
    first = model.generate(ids, **options).scores[0].softmax(-1)[0]
    pairs = torch.cat((ids.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]), dim=1)
    mask = torch.ones_like(pairs)
    return first[:, None] * model.generate(pairs, attention_mask=mask, **options).scores[0].softmax(-1)


def assert_same_distribution(counts, expected):
    """Pearson's chi-square, rare pairs put together; at 4 standard deviations."""
    rare = expected < 5
    seen, due = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    seen, due = seen[due > 0], due[due > 0]
    freedom = len(due) - 1
    assert float(((seen - due) ** 2 / due).sum()) < freedom + 4 * (2 * max(freedom, 1)) ** 0.5 + 4


def test_the_same_seed_gives_the_same_text(model):
    options = {"lossless": True, "do_sample": True, "max_new_tokens": 20, "eos_token_id": None}
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(model.generate(token_ids(1), **options))
    assert torch.equal(*texts)


def test_the_page_on_it_is_right(model):
    inputs = {"input_ids": token_ids(1)}
    output = model.generate(**inputs, lossless=True, max_new_tokens=60, return_dict_in_generate=True)
    assert "drafted tokens kept" in output.execution.lossless.summary()
