"""From prompts to answers to scores."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.config import GenerationSection
from chatglm_ptuning.data.dataset import Prompt
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.evaluation.generation import generate_predictions
from chatglm_ptuning.evaluation.metrics import score
from chatglm_ptuning.evaluation.predictions import Prediction

SAMPLING = ("temperature", "top_p", "top_k")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompts: Sequence[Prompt],
    generation: GenerationSection,
    path: Path,
    resume: bool = False,
) -> dict[str, float]:
    """Answer prompts and score the answers.

    Args:
        model: The model, its adapters set as they shall answer.
        tokenizer: Its tokenizer.
        template: Its chat format.
        prompts: What to answer, with references.
        generation: The run's section of that name.
        path: predictions.jsonl; os.devnull keeps none.
        resume: Keep the answers that are in the file already.

    Returns:
        Scores 0-100 by name, see `metrics.score`.

    Raises:
        UserError: As `generate_predictions`.
    """
    settings = asdict(generation)
    batch_size = settings.pop("batch_size")
    if generation.temperature == 0:
        settings["do_sample"] = False
    if not settings["do_sample"]:
        settings = {name: value for name, value in settings.items() if name not in SAMPLING}
    return score_predictions(
        generate_predictions(
            model, tokenizer, template, prompts, path, batch_size, resume, **settings
        )
    )


def score_predictions(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Scores 0-100 of predictions, see `metrics.score`."""
    return score([row.prediction for row in predictions], [row.reference for row in predictions])
