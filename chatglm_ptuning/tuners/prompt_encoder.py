"""What makes a soft prompt: its vectors themselves, or a small network (P-tuning v1); and their configs, as in peft.

Shapes: P virtual tokens, H hidden size of the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from chatglm_ptuning.errors import UserError

INITS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")


@dataclass
class SoftPromptConfig:
    """What both kinds of soft prompt have; field names are peft's. The last three are read off the base model.

    Args:
        num_virtual_tokens: P, the length of the prompt in tokens.
        token_dim: H.
        num_layers: Layers of the base.
        num_attention_heads: Heads of the base.

    Raises:
        UserError: A number that cannot be.
    """

    peft_type: ClassVar[str]

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.num_virtual_tokens, int) or self.num_virtual_tokens < 1:
            raise UserError(
                f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens!r}"
            )

    def fit(self, base: PreTrainedConfig) -> Any:
        """This config with the shape of a base model.

        Raises:
            UserError: A field that is already set says otherwise: the prompt was made for another model.
        """
        shape = {
            "token_dim": base.hidden_size,
            "num_layers": base.num_hidden_layers,
            "num_attention_heads": base.num_attention_heads,
        }
        for name, value in shape.items():
            own = getattr(self, name)
            if own is not None and own != value:
                raise UserError(
                    f"a soft prompt must fit its base model, got {name}={own!r} in the prompt"
                    f" and {name}={value!r} in the base; load it on the model it was trained on"
                )
        return replace(self, **shape)


@dataclass
class PromptTuningConfig(SoftPromptConfig):
    """Prompt tuning: the vectors themselves are trained.

    Args:
        prompt_tuning_init: "RANDOM" draws from a normal distribution of standard deviation 1, as peft does; "TEXT"
            takes the embeddings of a text's tokens, repeated or cut to P; "SAMPLE_VOCAB" those of tokens drawn at
            random.
        prompt_tuning_init_text: The text, for the record: a tuner knows no tokenizer.
        init_token_ids: Its ids, which a run fills in; empty where the vectors come from a file. Not saved.

    Raises:
        UserError: A value that cannot be.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    init_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in INITS:
            raise UserError(
                f"prompt_tuning_init must be one of {', '.join(INITS)}, got {self.prompt_tuning_init!r}"
            )
        if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
            raise UserError(
                "prompt_tuning_init_text must be given with prompt_tuning_init=TEXT and only then,"
                f" got {self.prompt_tuning_init_text!r} with {self.prompt_tuning_init}"
            )


@dataclass
class PromptEncoderConfig(SoftPromptConfig):
    """P-tuning v1: a small network makes the vectors from embeddings, and both are trained.

    Args:
        encoder_reparameterization_type: "MLP", three linear layers; "LSTM", a bidirectional LSTM and two.
        encoder_hidden_size: Width of the network; H if None.
        encoder_num_layers: Layers of the LSTM; of the MLP not counted, there it stays 2 as in peft.
        encoder_dropout: Probability of dropping an entry between the layers of the LSTM.

    Raises:
        UserError: A value that cannot be.
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {
            "encoder_reparameterization_type": (("MLP", "LSTM").__contains__, "be MLP or LSTM"),
            "encoder_hidden_size": (lambda size: size is None or size >= 1, "be at least 1"),
            "encoder_num_layers": (lambda count: count >= 1, "be at least 1"),
            "encoder_dropout": (lambda probability: 0 <= probability < 1, "be in [0, 1)"),
        }
        for name, (holds, rule) in rules.items():
            if not holds(getattr(self, name)):
                raise UserError(f"{name} must {rule}, got {getattr(self, name)!r}")
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            raise UserError(
                f"encoder_num_layers must be 2 for an MLP, got {self.encoder_num_layers!r}; it counts the layers of an"
                " LSTM"
            )


class PromptEmbedding(nn.Module):
    """The vectors themselves: [P, H]."""

    def __init__(self, config: SoftPromptConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)  # type: ignore[arg-type]

    def forward(self) -> Tensor:
        """The prompt [P, H], float32."""
        return self.embedding.weight


class PromptEncoder(PromptEmbedding):
    """Embeddings, the LSTM if there is one, the perceptron; names and layers are peft's."""

    config: PromptEncoderConfig

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__(config)
        output: Any = config.token_dim
        width = config.encoder_hidden_size if config.encoder_hidden_size is not None else output
        widths = [output, width, width, output]
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                output,
                width,
                config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            widths = [2 * width, 2 * width, output]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self) -> Tensor:
        """The prompt [P, H], float32."""
        with torch.autocast(self.embedding.weight.device.type, enabled=False):
            states = self.embedding.weight
            if self.config.encoder_reparameterization_type == "LSTM":
                states = self.lstm_head(states[None])[0][0]
            return self.mlp_head(states)


def fill(ids: Sequence[int], length: int) -> list[int]:
    """Ids of a text repeated or cut to a length, as peft does.

    Raises:
        UserError: There are none.
    """
    if not ids:
        raise UserError(
            "the text to start from must have at least one token, got none; write some text"
        )
    return (list(ids) * -(-length // len(ids)))[:length]
