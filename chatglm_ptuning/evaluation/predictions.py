"""predictions.jsonl: what was asked, what was expected, what was answered."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from chatglm_ptuning.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """One line of the file.

    Args:
        index: Which of the prompts, from 0.
        prompt: Content of the message that was answered.
        reference: The answer in the data.
        prediction: The model's.
    """

    index: int
    prompt: str
    reference: str
    prediction: str


def write_predictions(file: TextIO, predictions: Iterable[Prediction]) -> None:
    """Add lines to a file and see to it that they are on disk."""
    for row in predictions:
        file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    file.flush()


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file, complete or not, in the order of the prompts; a line cut off at the end is left out.

    Raises:
        UserError: No such file, or a line that is no prediction.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: texts hold U+2028 and its like
    except OSError as error:
        raise UserError(
            f"predictions must be a readable file, got {path}: {error.strerror}"
        ) from None
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = Prediction(**json.loads(line.decode("utf-8")))
            if [type(value) for value in vars(row).values()] != [int, str, str, str]:
                raise TypeError("a number and three texts are wanted")
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: must be a prediction with index, prompt, reference and prediction; {error}"
            ) from None
        rows[row.index] = row
    return [rows[index] for index in sorted(rows)]
