import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.training.trainer import AdapterTrainer, LossError
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
