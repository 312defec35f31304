"""Configs of soft prompts that cannot be."""

from typing import Any

import pytest

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.tuners import PromptEncoderConfig, PromptTuningConfig


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: PromptTuningConfig(0), "num_virtual_tokens must be at least 1, got 0"),
        (
            lambda: PromptTuningConfig(prompt_tuning_init="text"),
            "prompt_tuning_init must be one of RANDOM, TEXT",
        ),
        (
            lambda: PromptTuningConfig(prompt_tuning_init="TEXT"),
            "prompt_tuning_init_text must be given with prompt_tuning_init=TEXT",
        ),
        (
            lambda: PromptEncoderConfig(encoder_reparameterization_type="GRU"),
            "encoder_reparameterization_type must be MLP or LSTM, got 'GRU'",
        ),
        (
            lambda: PromptEncoderConfig(encoder_num_layers=3),
            "encoder_num_layers must be 2 for an MLP, got 3",
        ),
        (lambda: PromptEncoderConfig(encoder_dropout=1), r"encoder_dropout must be in \[0, 1\)"),
    ],
)
def test_values_that_cannot_be(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config()
