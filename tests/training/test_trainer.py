import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import TrainerCallback

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.trainer import AdapterTrainer, LossError
from chatglm_ptuning.tuners import LoraConfig, add_adapter
from tests.training.conftest import MODELS, PAD, VOCAB, make_rows

Train = Callable[..., AdapterTrainer]


def batch_of(count: int) -> dict[str, Tensor]:
    rows = make_rows(count)
    return Collator(PAD)([rows[i] for i in range(count)])


@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_the_models_own(family: str, train: Train) -> None:
    batch = batch_of(5)
    model = MODELS[family]()
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss_expected = model(**batch).loss
    model.zero_grad()

    trainer = train(model, start=False)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    assert_close(loss, loss_expected, atol=1e-6, rtol=0)
    assert outputs.logits.shape == ((batch["labels"][:, 1:] != -100).sum(), VOCAB)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)
    assert_close(
        model(**batch).logits.shape, (*batch["input_ids"].shape, VOCAB)
    )  # the hook is gone


def test_loss_smooths_labels(train: Train) -> None:
    batch, model = batch_of(5), MODELS["chatglm"]()
    trainer = train(model, start=False, label_smoothing_factor=0.1)
    expected = F.cross_entropy(
        model(**batch).logits[:, :-1].reshape(-1, VOCAB),
        batch["labels"][:, 1:].reshape(-1),
        label_smoothing=0.1,
    )
    assert_close(trainer.compute_loss(model, batch), expected, atol=1e-6, rtol=0)


def test_batch_without_a_label_is_zero(train: Train) -> None:
    batch, model = batch_of(2), MODELS["chatglm"]()
    batch["labels"][:] = -100
    trainer = train(model, start=False)
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss == 0
    assert (
        trainer.training_step(model, batch, torch.tensor(7)) == 0
    )  # not an error: nothing to learn in it


@pytest.mark.parametrize("family", MODELS)
def test_accumulated_batches_equal_one(family: str, train: Train) -> None:
    sgd = {
        "optim": "sgd",
        "learning_rate": 0.1,
    }  # Adam would blow up the noise of gradients that are 0
    whole = train(MODELS[family](), per_device_train_batch_size=4, **sgd)
    parts = train(
        MODELS[family](), per_device_train_batch_size=1, gradient_accumulation_steps=4, **sgd
    )
    for one, other in zip(whole.state.log_history, parts.state.log_history, strict=True):
        if "loss" in one:
            assert_close(one["loss"], other["loss"], atol=1e-5, rtol=0)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


class Spoiled(nn.Module):
    """An output layer whose logits are of one value, or right without doubt."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.zeros(VOCAB, 32))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.weight.T + self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_no_number_stops_before_the_step(value: float, train: Train) -> None:
    model = MODELS["chatglm"]()
    model.lm_head = Spoiled(value)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        LossError,
        match=r"the loss must be a number, got nan at step 1; lower training\.learning_rate",
    ):
        train(model)
    for name, parameter in model.named_parameters():
        assert_close(parameter, before[name], atol=0, rtol=0)


def test_loss_of_exactly_zero_stops(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *args, **kwargs: logits.sum() * 0)
    with pytest.raises(LossError, match=r"the loss must be over 0, got 0\.0 at step 1"):
        train(MODELS["chatglm"]())


def test_scores_join_the_validation_loss(train: Train) -> None:
    scores: list[dict[str, Any]] = []

    def score() -> dict[str, float]:
        scores.append({})
        return {"rouge-l": 10.0 * len(scores)}

    trainer = train(
        MODELS["chatglm"](),
        score=score,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rouge-l",
    )
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["eval_rouge-l"] for row in evaluations] == [10.0, 20.0]
    assert trainer.state.best_global_step == 4


def test_tokens_per_second_are_logged(train: Train) -> None:
    trainer = train(MODELS["chatglm"]())
    rates = [row["tokens_per_second"] for row in trainer.state.log_history if "loss" in row]
    assert len(rates) == 4
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("family", MODELS)
def test_neftune_noise_is_there_in_training_only(family: str, train: Train) -> None:
    model, seen = MODELS[family](), {True: [], False: []}

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen[module.training].append((output - module.weight[args[0]]).abs().max().item())

    class Note(TrainerCallback):
        """Looks at the embeddings behind NEFTune's own hook."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            model.get_input_embeddings().register_forward_hook(note)

    train(model, neftune_noise_alpha=5, eval_strategy="steps", eval_steps=2, callbacks=[Note()])
    assert len(seen[True]) == 4
    assert all(noise > 0.01 for noise in seen[True])
    assert len(seen[False]) == 2
    assert max(seen[False]) == 0


def test_lora_plus_gives_b_a_higher_rate(train: Train) -> None:
    model = MODELS["glm"]()
    add_adapter(model, LoraConfig(r=2))
    trainer = train(model, adapter_name="default", loraplus_lr_ratio=16, weight_decay=0.1)
    groups = trainer.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [1e-2, 0.16]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]
    names = {id(p): name for name, p in model.named_parameters()}
    for group, letter in zip(groups, "AB", strict=True):
        assert all(f"lora_{letter}" in names[id(p)] for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == 12


def test_lora_plus_refuses_other_adapters(train: Train) -> None:
    with pytest.raises(
        UserError, match=r"must come with adapter\.type=lora, got loraplus_lr_ratio="
    ):
        train(MODELS["chatglm"](), loraplus_lr_ratio=16)
