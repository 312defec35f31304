import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from chatglm_ptuning.training.arguments import make_arguments
from chatglm_ptuning.training.guard import EarlyStopping, GradientWatch, collapse
from chatglm_ptuning.training.trainer import AdapterTrainer
from tests.training.conftest import MODELS

Train = Callable[..., AdapterTrainer]


def watch(norms: list[float], tmp_path: Path, **settings: Any) -> None:
    arguments = make_arguments({"report_to": "none", **settings}, tmp_path)
    watched = GradientWatch()
    for step, norm in enumerate(norms, start=1):
        state = TrainerState(global_step=step)
        watched.on_log(arguments, state, TrainerControl(), logs={"grad_norm": norm})


@pytest.mark.parametrize(
    ("norms", "text"),
    [
        ([1, 2, 3, 2, 1, 250, 900], "its norm is 250 at step 6 where 2 is usual"),
        ([1, math.nan], "its norm is nan at step 2; lower"),
        ([1, math.inf], "its norm is inf at step 2; lower"),
    ],
)
def test_exploding_gradient_is_told_once(
    norms: list[float], text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        watch(norms, tmp_path)
    (message,) = caplog.messages
    assert text in message
    assert "training.max_grad_norm (now 1)" in message


def test_usual_gradients_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        watch([1, 500, 1, 2, 3, 150, 190], tmp_path)  # too few before; then under 100 times
    assert caplog.messages == []


def test_trainer_watches_its_gradients(
    train: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterTrainer, "_get_grad_norm", lambda self, *a, **k: math.inf)
    with caplog.at_level(logging.WARNING):
        train(MODELS["chatglm"]())
    assert sum("the gradient explodes" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        (["", " ", "好"], "2 of 3 answers are empty; "),
        (["<unk>好", "a<unk>", "好"], "2 of 3 answers hold <unk> or broken characters; "),
        (
            ["这件的的的的的的", "上衣是白白白白白", "好"],
            "2 of 3 answers repeat one piece to their end; ",
        ),
        (["一件 上衣, " * 6, "abc" * 5], "2 of 2 answers repeat one piece to their end; "),
        (["一样的话"] * 8, "all 8 answers are '一样的话'; the prompts are ignored: "),
    ],
)
def test_collapsed_answers_are_named(answers: list[str], text: str) -> None:
    problem = collapse(answers)
    assert problem is not None
    assert problem.startswith(text)
    assert "training.learning_rate" in problem


@pytest.mark.parametrize(
    "answers",
    [
        [],
        ["好", "", "是"],
        ["这件上衣很好，很好。", "是", "不是"],
        ["一样"] * 3,
        ["1000000", "25", "7"],
    ],
)
def test_sound_answers_are_left_alone(answers: list[str]) -> None:
    assert collapse(answers) is None


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_run_stops_where_the_first_one_did(step: int, train: Train, tmp_path: Path) -> None:
    """No evaluation after the first is better, so patience 2 ends the run at step 3."""
    settings = {
        "max_steps": 9,
        "learning_rate": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    whole = train(MODELS["chatglm"](), callbacks=[EarlyStopping(2)], **settings)
    assert whole.state.global_step == 3
    resumed = train(
        MODELS["chatglm"](),
        callbacks=[EarlyStopping(2)],
        resume=str(tmp_path / "out" / f"checkpoint-{step}"),
        **settings,
    )
    assert resumed.state.global_step == 3
