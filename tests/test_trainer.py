"""transformers' `Trainer` on a wrapped base: it trains, saves and resumes our modules and nothing else."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from .tiny import BRIDGES, VOCABULARY, tiny_base, token_ids, wrap


FIELDS = {"controller": "plan", "plans": ["PSFP", "PPFP"], "energy_budget": 0.6, **BRIDGES}


@pytest.fixture
def model(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return wrap(base, base_model_name_or_path=str(tmp_path / "base"), **FIELDS)


def rows(count: int = 8, **columns) -> list[dict]:
    """Rows of random ids that are their own labels; every second row has few labels."""
    data = []
    for index, ids in enumerate(token_ids(count, 10)):
        labels = ids.clone()
        labels[: 7 * (index % 2)] = -100
        data.append({"input_ids": ids, "labels": labels, **{name: values[index] for name, values in columns.items()}})
    return data


def trainer_of(model, folder, data=None, steps: int = 4, batch: int = 2, **arguments) -> Trainer:
    """A trainer on the CPU that says nothing."""
    fields = {"max_steps": steps, "learning_rate": 0.01, "lr_scheduler_type": "constant", "save_strategy": "no", "seed": 1}
    fields |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"} | arguments
    fields |= {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    data = rows() if data is None else data
    return Trainer(model, TrainingArguments(str(folder), **fields), train_dataset=data, eval_dataset=data)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_it_trains_our_modules_and_nothing_of_the_base(model, tmp_path):
    before = weights(model)
    trainer = trainer_of(model, tmp_path / "run", steps=12)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    used = {f"bridges.{kind}.{part}" for kind in ("skip.1", "skip_ffn.2") for part in ("down.weight", "up.weight", "up.bias")}
    assert changed == used
    optimised = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in (*model.bridges.parameters(), *model.controller.parameters())}
    states = trainer.optimizer.state_dict()["state"].values()
    assert sum(state["exp_avg"].numel() for state in states) < sum(p.numel() for p in model.bridges.parameters())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.base.parameters())
    assert not model.base.training


def test_checkpoints_hold_our_modules_and_load_as_artifacts(model, tmp_path):
    trainer_of(model, tmp_path / "run", save_strategy="steps", save_steps=2, save_total_limit=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"bridges", "controller"}
    loaded, ids = AutoModelForCausalLM.from_pretrained(checkpoint), token_ids()
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    mode = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **mode), model.generate(ids, **mode))


def test_an_interrupted_run_resumes(model, tmp_path, said):
    start = weights(model)
    trainer_of(model, tmp_path / "run", save_strategy="steps", save_steps=3, steps=6).train()
    expected = weights(model)
    model.load_state_dict(start, strict=False)
    said.clear()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    trainer_of(model, tmp_path / "again", steps=6).train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(weights(model), expected)
    assert not any("keys" in message for message in said)


def test_the_best_checkpoint_is_loaded_at_the_end(model, tmp_path):
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(model, tmp_path / "run", **every, load_best_model_at_end=True)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


def test_accumulated_batches_count_their_tokens_like_one(model, tmp_path):
    start, trained = weights(model), []
    for batch, accumulated in ((4, 1), (1, 4)):  # rows with many and with few labels
        model.load_state_dict(start, strict=False)
        sgd = {"optim": "sgd", "gradient_accumulation_steps": accumulated, "max_grad_norm": 0.0}
        trainer_of(model, tmp_path / "run", steps=1, batch=batch, **sgd).train()
        trained.append(weights(model))
    torch.testing.assert_close(*trained)


def test_evaluate_and_predict_give_the_models_own_logits(model, tmp_path):
    data = rows(5)
    trainer = trainer_of(model, tmp_path / "run", data)
    trainer.compute_metrics = lambda answers: {"tokens": float(answers.predictions.shape[1])}
    predicted = trainer.predict(data)
    assert predicted.predictions.shape == (5, 10, VOCABULARY) and predicted.metrics["test_tokens"] == 10
    ids, labels = (torch.stack([row[name] for row in data]) for name in ("input_ids", "labels"))
    output = model(ids, labels=labels)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), output.logits.detach())
    assert output.execution.mean_cost < 0.8


def test_a_column_of_the_data_is_the_budget_of_each_row(model, tmp_path):
    data = rows(energy_budget=[1.0, 0.6] * 4)
    ids = torch.stack([row["input_ids"] for row in data])
    predicted = trainer_of(model, tmp_path / "run", data).predict(data).predictions
    expected = model(ids, energy_budget=[1.0, 0.6] * 4).logits.detach()
    torch.testing.assert_close(torch.from_numpy(predicted), expected)
    before = weights(model)
    trainer_of(model, tmp_path / "run", data).train()
    assert not torch.equal(model.bridges.of_skip(1).up.bias, before["bridges.skip.1.up.bias"])


def test_a_batch_at_full_budget_teaches_nothing_and_that_is_said_once(model, tmp_path, said):
    before = weights(model)
    trainer_of(model, tmp_path / "run", rows(energy_budget=[1.0] * 8)).train()
    torch.testing.assert_close(weights(model), before)
    assert len([message for message in said if "nothing that can be trained was run" in message]) == 1


@pytest.mark.parametrize("budget", [0.6, 1.0])
def test_label_smoothing_trains_and_a_batch_that_teaches_nothing_does_not_end_it(model, tmp_path, budget):
    model.config.energy_budget = budget
    before = weights(model)
    trainer_of(model, tmp_path / "run", label_smoothing_factor=0.1).train()
    changed = any(not torch.equal(value, before[name]) for name, value in weights(model).items())
    assert changed == (budget < 1.0)
