"""`pipeline("text-generation")` and streamers at a budget: chats, batches, artifacts by name."""

import asyncio
import threading

import pytest
from transformers import AsyncTextIteratorStreamer, GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline

from modeling_anee.executor import Executor

from .tiny import BRIDGES, tiny_base, wrap
from .workshop import tiny_tokenizer


GREEDY = {"max_new_tokens": 6, "do_sample": False}
TEXTS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14", "w20 w21", "w30 w31 w32"]
CHAT = [{"role": "user", "content": "w20 w21"}, {"role": "assistant", "content": "w30"}, {"role": "user", "content": "w40"}]
PLANS = {"plans": ["PSFP", "PPFP"], **BRIDGES}


@pytest.fixture(scope="module")
def model():
    model = wrap(controller="learned", **BRIDGES)
    model.generation_config.eos_token_id = None  # all answers have one length
    return model


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture
def costs(monkeypatch):
    """Mean cost of every forward."""
    seen, run = [], Executor.run

    def recorded(executor, *args, **kwargs):
        hidden, trace = run(executor, *args, **kwargs)
        seen.append(trace.mean_cost)
        return hidden, trace

    monkeypatch.setattr(Executor, "run", recorded)
    return seen


def answer_of(model, tokenizer, text: str | list, **kwargs) -> str:
    """What `generate` answers to a text or a chat, alone."""
    if isinstance(text, str):
        ids = tokenizer(text, return_tensors="pt").input_ids
    else:
        ids = tokenizer.apply_chat_template(text, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    return tokenizer.decode(model.generate(ids, **GREEDY, **kwargs)[0, ids.shape[1] :], skip_special_tokens=True)


def new_text(write, *args, **kwargs):
    return write(*args, return_full_text=False, **GREEDY, **kwargs)


def test_the_budget_of_the_call_comes_before_that_of_the_build(model, tokenizer, costs):
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, energy_budget=0.6)
    for given, budget in (({}, 0.6), ({"energy_budget": 1.0}, 1.0), ({"energy_budget": 0.7, "prompt_energy_budget": 1.0}, 0.7)):
        costs.clear()
        (answer,) = new_text(write, TEXTS[0], **given)
        found = list(costs)
        assert answer["generated_text"] == answer_of(model, tokenizer, TEXTS[0], **{"energy_budget": budget, **given})
        assert all(cost == 1.0 for cost in found) if budget == 1.0 else sum(found) / len(found) < 1.0
        assert found[0] == 1.0 or "prompt_energy_budget" not in given


def test_a_generation_config_may_have_the_budget(model, tokenizer):
    config = GenerationConfig(energy_budget=0.6, eos_token_id=None, **GREEDY)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = write(TEXTS[0], generation_config=config, return_full_text=False)
    assert answer["generated_text"] == answer_of(model, tokenizer, TEXTS[0], energy_budget=0.6)


def test_a_budget_may_follow_a_resource_named_in_the_build_or_the_call(model, tokenizer, costs):
    def source(progress):
        return 1.0 if progress.tokens < 2 else 0.4

    for at_build, at_call in (({"energy_budget": source}, {}), ({"energy_budget": 0.6}, {"energy_budget": source})):
        costs.clear()
        (answer,) = new_text(pipeline("text-generation", model=model, tokenizer=tokenizer, **at_build), TEXTS[0], **at_call)
        assert costs[:2] == [1.0, 1.0] and max(costs[2:]) < 1.0
        assert answer["generated_text"] == answer_of(model, tokenizer, TEXTS[0], energy_budget=source)


@pytest.mark.parametrize("controller", ["learned", "plan"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_answer_what_each_text_is_answered_alone(controller, batch_size, tokenizer):
    model = wrap(controller=controller, **BRIDGES)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size)
    for budget in (1.0, 0.5):
        answers = new_text(write, TEXTS, energy_budget=budget)
        for text, (answer,) in zip(TEXTS, answers, strict=True):
            expected = answer_of(model, tokenizer, text, energy_budget=budget)
            assert answer["generated_text"] == expected


def test_full_texts_begin_with_the_prompt(model, tokenizer):
    (answer,) = pipeline("text-generation", model=model, tokenizer=tokenizer)(TEXTS[0], energy_budget=0.6, **GREEDY)
    assert answer["generated_text"] == TEXTS[0] + answer_of(model, tokenizer, TEXTS[0], energy_budget=0.6)


def test_chats_are_answered_by_the_assistant(model, tokenizer):
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, energy_budget=0.6)
    *before, reply = write(CHAT, **GREEDY)[0]["generated_text"]
    assert before == CHAT and reply == {"role": "assistant", "content": answer_of(model, tokenizer, CHAT, energy_budget=0.6)}
    both = write([CHAT, CHAT[:1]], batch_size=2, **GREEDY)
    replies = [answer["generated_text"][-1]["content"] for (answer,) in both]
    assert replies == [reply["content"], answer_of(model, tokenizer, CHAT[:1], energy_budget=0.6)]


@pytest.mark.parametrize("how", [{"do_sample": True, "top_k": 1}, {"num_beams": 4, "do_sample": False}])
def test_several_answers_to_every_text(model, tokenizer, how):
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    mode = {"num_return_sequences": 3, "max_new_tokens": 6, "energy_budget": 0.6, **how}
    answers = write(TEXTS[:2], return_full_text=False, **mode)
    inputs = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    expected = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **mode)[:, inputs.input_ids.shape[1] :]
    found = [answer["generated_text"] for several in answers for answer in several]
    assert found == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert len(found) == 6


@pytest.mark.parametrize("budget", [1.5, -0.1, "0.5", [0.5, 0.5]])
def test_a_bad_budget_is_refused_by_name(model, tokenizer, budget):
    with pytest.raises(ValueError, match="energy_budget"):
        pipeline("text-generation", model=model, tokenizer=tokenizer)(TEXTS[0], energy_budget=budget, **GREEDY)
    with pytest.raises(ValueError, match="energy_budget"):
        pipeline("text-generation", model=model, tokenizer=tokenizer, energy_budget=budget)(TEXTS[0], **GREEDY)


BY_NAME = """
import sys, torch
from transformers import TextStreamer, pipeline
settings = {"model": sys.argv[1], "trust_remote_code": True, "energy_budget": 0.6}
write = pipeline("text-generation", device="cpu", dtype="bfloat16", **settings)
assert type(write.model).__module__.startswith("transformers_modules.") and write.device.type == "cpu"
assert write.model.dtype == torch.bfloat16
write = pipeline("text-generation", device_map="auto", **settings)
assert write.model.dtype == torch.float32
chat = [{"role": "user", "content": "w20 w21"}]
streamer = TextStreamer(write.tokenizer, skip_prompt=True, skip_special_tokens=True)
write(chat, streamer=streamer, max_new_tokens=6, do_sample=False)
"""


def test_an_artifact_by_name_without_the_package(tokenizer, tmp_path, forks):
    tiny_base().save_pretrained(tmp_path / "base")
    model = wrap(**PLANS, base_model_name_or_path=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "artifact", tokenizer=tokenizer)
    done = forks.run(BY_NAME, tmp_path / "artifact")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer_of(model, tokenizer, CHAT[:1], energy_budget=0.6)


# Streamers


@pytest.mark.parametrize("budget", [1.0, 0.6])
def test_printed_text_is_the_returned_text(model, tokenizer, budget, capsys):
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(ids, streamer=streamer, energy_budget=budget, **GREEDY)
    assert capsys.readouterr().out.strip() == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = new_text(write, TEXTS[0], streamer=streamer, energy_budget=budget)
    assert capsys.readouterr().out.strip() == answer["generated_text"]


@pytest.mark.parametrize("budget", [1.0, 0.6])
def test_text_iterated_from_another_thread_is_the_returned_text(model, tokenizer, budget):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    mode = {"input_ids": inputs.input_ids, "streamer": streamer, "energy_budget": budget, **GREEDY}
    thread = threading.Thread(target=model.generate, kwargs=mode)
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces).strip() == answer_of(model, tokenizer, TEXTS[0], energy_budget=budget) and len(pieces) > 2


def test_text_awaited_is_the_returned_text(model, tokenizer):
    inputs = tokenizer(TEXTS[0], return_tensors="pt")

    async def collect() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        mode = {"input_ids": inputs.input_ids, "streamer": streamer, "energy_budget": 0.6, **GREEDY}
        thread = threading.Thread(target=model.generate, kwargs=mode)
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join()
        return text

    assert asyncio.run(collect()).strip() == answer_of(model, tokenizer, TEXTS[0], energy_budget=0.6)
