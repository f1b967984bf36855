"""The real base, SmolLM2-135M-Instruct: what the tiny random models promise must hold on it. Slow."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_anee import AneeForCausalLM
from modeling_anee.data.smollm2 import smollm2_folder


pytestmark = pytest.mark.slow

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "What is 17 times 23? Show the steps.",
    "Translate to French: The weather is lovely today.",
    "List three ways to save energy at home.",
)
TEXT = (
    "The lighthouse stood at the end of a long spit of sand, and for forty years the same family had kept its lamp. "
    "In winter the sea came over the road and nobody could reach it for weeks, so the cellar was filled in autumn with "
    "flour, potatoes, dried apples and oil. The youngest daughter, who was called Marit, had learned to read from the "
    "labels of the tins and from a single book about whales. She knew the Latin names of all of them, and when a ship "
    "passed she wrote its name in a ledger, with the direction of the wind and the height of the waves. One evening in "
    "March the lamp went out. Her father was ill, her brothers were at sea, and the wick, which had been cut only the "
    "day before, would not take. She carried the spare lamp up the hundred and twelve steps, one at a time, and set it "
    "on the iron plate where the mirrors turned. Far out, very small, a green light answered, went under, and came "
    "back. She counted the seconds between the flashes as she had been taught, and wrote them down. "
    "In the morning the boat lay on the sand below the house, whole, with its sail folded, and on the thwart sat a man "
    "she had never seen, asleep."
)


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2_folder())


@pytest.fixture(scope="module")
def model(base):
    return AneeForCausalLM.from_base(base, controller="plan")


def chat(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_full_budget_gives_the_tokens_of_transformers(base, model, tokenizer, prompt):
    inputs = chat(tokenizer, prompt)
    mode = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False}
    assert torch.equal(model.generate(**inputs, energy_budget=1.0, **mode), base.generate(**inputs, **mode))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_budget_gives_the_tokens_of_transformers_in_half_precision(tokenizer, dtype):
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=dtype)
    model, mode = AneeForCausalLM.from_base(base, controller="plan"), {"max_new_tokens": 64, "do_sample": False}
    for prompt in PROMPTS[:3]:
        inputs = chat(tokenizer, prompt)
        assert torch.equal(model.generate(**inputs, energy_budget=1.0, **mode), base.generate(**inputs, **mode))


@pytest.mark.parametrize("budget", [0.8, 0.6, 0.5, 0.3])
def test_the_budget_is_kept(model, tokenizer, budget):
    inputs = chat(tokenizer, PROMPTS[0])
    output = model.generate(**inputs, energy_budget=budget, max_new_tokens=64, return_dict_in_generate=True, do_sample=False)
    assert abs(output.execution.mean_cost - budget) <= 0.02


@pytest.mark.parametrize("budget", [1.0, 0.6])
@pytest.mark.parametrize("controller", ["plan", "budget", "confidence"])
def test_scoring_is_decoding(base, tokenizer, controller, budget, record_property):
    model = AneeForCausalLM.from_base(base, controller=controller)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :256]
    whole = model(ids, energy_budget=budget, use_cache=False).logits
    cache, largest = None, 0.0
    for token in range(ids.shape[1]):
        output = model(ids[:, token : token + 1], past_key_values=cache, energy_budget=budget)
        cache = output.past_key_values
        largest = max(largest, float((output.logits[:, 0] - whole[:, token]).abs().max()))
    record_property("largest_difference", largest)
    print(f"{controller} at {budget}: largest logit difference {largest:.2e} over {ids.shape[1]} tokens")
    assert ids.shape[1] >= 250 and largest <= 1e-3
