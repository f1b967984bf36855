"""What tests of the workshop share: a tiny base and tokenizer in a folder, text, recipes, and stages that are quick."""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_anee.training import fit as fitting
from modeling_anee.training.checkpoint import load_optimizer, optimizer_tensors
from modeling_anee.training.recipe import Recipe

from .tiny import VOCABULARY, tiny_base


WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
CHAT = "{% for m in messages %}w3 {{ m['role'] == 'user' and 'w4' or 'w5' }} {{ m['content'] }} w6 {% endfor %}w3 w5 "


def tiny_tokenizer(begins_with_bos=False):
    """Words w3, w4, ... to their ids, with a chat template; by default nothing is put before a text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT
    return wrapped


def words(count, seed=0):
    """Random words, ten a line."""
    draw = random.Random(seed)
    lines = (" ".join(draw.choices(WORDS[3:], k=10)) for _ in range(count // 10))
    return "\n".join(lines) + "\n"


def make_workshop(folder):
    """Write `base` and `data` into a folder."""
    tiny_base().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "data").mkdir()
    (folder / "data" / "text.txt").write_text(words(2000))
    records = [{"question": f"w{7 + i}", "answer": f"w{30 + i} w{8 + i}"} for i in range(20)]
    (folder / "data" / "pairs.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")


def recipe_fields(folder, **changes):
    """Fields of a small recipe over `make_workshop`'s base, with two short stages."""
    bridges = {"steps": 7, "batch_windows": 2, "learning_rate": 0.01, "budgets": [0.5, 0.9], "checkpoint_every": 3}
    supervised = {"steps": 5, "batch_tokens": 8, "learning_rate": 0.01, "checkpoint_every": 2}
    fields = {
        "base": {"name": str(folder / "base")},
        "length": 8,
        "device": "cpu",
        "text": {"train": [{"file": "text.txt", "tokens": 400}]},
        "anee": {"controller": "learned", "decision_interval": 1},
        "stages": {"bridges": bridges, "supervised": supervised},
    }
    return fields | changes


def recipe_of(folder, **changes):
    return Recipe.model_validate(recipe_fields(folder, **changes))


def training_stage(name, before_step=lambda step: None, updates=None):
    """A stage that trains our modules on noise, with checkpoints, as the real ones do."""

    def run_stage(run):
        settings, named = run.settings(name), run.own_parameters()
        optimizer = torch.optim.AdamW(named.values(), lr=settings.learning_rate)
        start, total = 0, torch.zeros(())
        if saved := run.load(name):
            start, tensors, values = saved
            run.load_own(tensors)
            load_optimizer(optimizer, list(named), tensors)
            total = torch.tensor(values["total"])
        windows = run.windows("train")
        for step in run.track(settings.steps, name, start):
            before_step(step)
            generator = run.generator(name, step)
            rows = run.rows(windows[torch.randperm(len(windows), generator=generator)[:4]])
            policy = run.model.controller.policies[0]
            states = rows.float()[:, : policy[0].in_features] / VOCABULARY
            loss = (policy(states) - torch.randn(policy[-1].out_features, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            run.reduce_gradients(named.values())
            optimizer.step()
            mean = run.sum(loss.detach()) / run.accelerator.num_processes
            total = total + mean
            run.log(name, step, loss=float(mean), total=float(total))
            if (step + 1) % settings.checkpoint_every == 0:
                tensors = run.own() | optimizer_tensors(optimizer, list(named))
                run.save(name, step + 1, tensors, {"total": float(total)})
        return updates or {}

    return run_stage


def use_stages(monkeypatch, before_step=lambda stage, step: None, updates=None):
    """Replace the recipe's two stages by `training_stage`s; the first one sets the fields `updates`."""
    first = training_stage("bridges", lambda step: before_step("bridges", step), updates)
    second = training_stage("supervised", lambda step: before_step("supervised", step))
    monkeypatch.setattr(fitting, "STAGES", {"bridges": first, "supervised": second})


KILLED = """
import os, signal, sys
from pathlib import Path
from modeling_anee.training import fit as fitting
from modeling_anee.training.recipe import Recipe
from modeling_anee.training.run import Run

stage, recipe, folder, data = sys.argv[1], Recipe.model_validate_json(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
before = recipe.planned[: recipe.planned.index(stage)]
track = Run.track

def dying(self, total, description, start=0):
    for step in track(self, total, description, start):
        if self.state.done == before and step >= min(3, total - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        yield step

Run.track = dying
fitting.fit(recipe, folder, data)
"""


def fit_killed_in(forks, stage, recipe, folder, data):
    """Begin a fit in another process, which is killed in the midst of a stage."""
    killed = forks.run(KILLED, stage, recipe.model_dump_json(), folder, data, installed=True)
    assert killed.returncode == -9, killed.stderr


def assert_same_run(one, other):
    """Two folders of runs have the same artifact, state and log."""
    for name in ("artifact/model.safetensors", "artifact/config.json", "run.json", "log.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
