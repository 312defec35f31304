"""The `data` section of a run."""

import codecs
import math
from dataclasses import dataclass

from chatglm_ptuning.errors import UserError

LOSSES = ("all", "last")
TRUNCATIONS = ("left", "right", "middle", "drop")


@dataclass
class DataConfig:
    """Which files, which columns, how long.

    Args:
        train_file: Path or list of paths to learn from.
        validation_file: Path or list of paths for the loss during training.
        test_file: Path or list of paths for generation and scores.
        prompt_column: Column of the question; None recognises it (see `data.formats`).
        response_column: Column of the answer; None recognises it.
        history_column: Column of earlier turns, a list of [question, answer]; None recognises it.
        messages_column: Column of whole conversations, a list of messages; None recognises it.
        max_source_length: Longest prompt in tokens, with its control tokens (in ChatGLM-6B up to and with [gMASK]).
        max_target_length: Longest answer in tokens, with its end token (in ChatGLM-6B with <sop> too).
        truncation: What happens to a prompt that is too long after its oldest turns were dropped: "right" cuts the end
            of its last message as the released ChatGLM-6B training does, "left" its beginning, "middle" keeps both
            ends, "drop" leaves the row out (also when the answer is too long).
        loss_on: "all" learns every answer of a conversation, "last" only the last one. A message's own `loss` flag
            comes first. In ChatGLM-6B only the last answer can be learned (see `ChatGLMTemplate`).
        max_train_samples: Use only this many rows of train_file, from its beginning; None uses all.
        max_eval_samples: The same for validation_file and test_file.
        encoding: Text encoding of the files; a byte order mark is fine.
        train_weights: For each path of train_file how often its rows count in an epoch: 0.1 draws a tenth of them, 2.5
            takes all twice and half of them once more; None takes all once.
        seed: Of those draws and of the streamed order.
        packing: Several training examples in one row without padding.
        packing_length: Longest packed row in tokens; None takes max_source_length + max_target_length.
        streaming: Read and encode training rows as they are needed, endlessly: set training.max_steps.
        shuffle_buffer_size: Streaming draws the next row out of so many.
        cache_dir: Keep encoded data here and map it instead of holding it in memory; None encodes at every start.
    """

    train_file: str | list[str] | None = None
    validation_file: str | list[str] | None = None
    test_file: str | list[str] | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    history_column: str | None = None
    messages_column: str | None = None
    max_source_length: int = 512
    max_target_length: int = 512
    truncation: str = "right"
    loss_on: str = "all"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    encoding: str = "utf-8"
    train_weights: list[float] | None = None
    seed: int = 42
    packing: bool = False
    packing_length: int | None = None
    streaming: bool = False
    shuffle_buffer_size: int = 10_000
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_source_length": (self.max_source_length >= 8, "be at least 8 tokens"),
            "max_target_length": (self.max_target_length >= 3, "be at least 3 tokens"),
            "truncation": (self.truncation in TRUNCATIONS, f"be one of {', '.join(TRUNCATIONS)}"),
            "loss_on": (self.loss_on in LOSSES, f"be one of {', '.join(LOSSES)}"),
            "encoding": (
                splits_at_newlines(self.encoding),
                "name an encoding like utf-8 or gb18030",
            ),
        }
        rules["shuffle_buffer_size"] = (self.shuffle_buffer_size >= 1, "be at least 1 row")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            rules[name] = (value is None or value >= 1, "be at least 1 row")
        paths = [self.train_file] if isinstance(self.train_file, str) else self.train_file
        rules["train_weights"] = (
            self.train_weights is None
            or (
                len(self.train_weights) == len(paths or [])
                and all(0 < weight < math.inf for weight in self.train_weights)
            ),
            "have one number over 0 for each path of data.train_file",
        )
        rules["packing_length"] = (
            self.packing_length is None or self.packing_length >= 8,
            "be at least 8 tokens",
        )
        rules["packing"] = (
            not (self.packing and self.streaming),
            "be false where data.streaming is true",
        )
        rules["cache_dir"] = (
            not (self.cache_dir and self.streaming),
            "be left out where data.streaming is true",
        )
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"data.{name} must {rule}, got {getattr(self, name)!r}")
        if (self.prompt_column is None) != (self.response_column is None):
            raise UserError(
                "data.prompt_column and data.response_column must be given together,"
                f" got prompt_column={self.prompt_column!r}, response_column={self.response_column!r}"
            )

    @property
    def packed_length(self) -> int:
        """Longest packed row in tokens."""
        if self.packing_length is not None:
            return self.packing_length
        return self.max_source_length + self.max_target_length


def splits_at_newlines(encoding: str) -> bool:
    """Whether Python knows the encoding and a line break is the single byte 0x0A in it (UTF-16 fails)."""
    try:
        codecs.lookup(encoding)
        return "\n{".encode(encoding).endswith(b"\n{")
    except (LookupError, UnicodeError):
        return False
