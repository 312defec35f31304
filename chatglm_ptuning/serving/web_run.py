"""What an adapter's directory tells of its training: for the page's second tab, and examples to try."""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from chatglm_ptuning.config import RUN_CONFIG_FILE, RunConfig
from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation
from chatglm_ptuning.data.dataset import load_conversations
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.evaluation.predictions import read_predictions
from chatglm_ptuning.models.loading import read_json
from chatglm_ptuning.serving.web_text import TEXTS

EXAMPLES = 4
SAMPLES = 8
PREDICTIONS, BASE_PREDICTIONS = "predictions.jsonl", "base_predictions.jsonl"


@dataclass
class Run:
    """The records of a run; what is not there is empty.

    Args:
        directory: Where they are.
        scores: Base and tuned scores 0-100 by metric.
        samples: Rows with prompt, reference, prediction, and base: the untouched base's prediction.
        curve: The loss curve, a PNG.
        settings: A few of its settings by name.
        conversations: First rows of its data.
    """

    directory: Path
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    curve: bytes = b""
    settings: dict[str, str] = field(default_factory=dict)
    conversations: list[Conversation] = field(default_factory=list)

    @property
    def examples(self) -> list[str]:
        """Messages to try: those of the data, else those of the samples."""
        texts = [
            next(
                (message.content for message in conversation.messages if message.role == "user"), ""
            )
            for conversation in self.conversations
        ]
        texts = texts if texts else [sample["prompt"] for sample in self.samples]
        return [text for text in texts if text.strip()][:EXAMPLES]

    @property
    def has_turns(self) -> bool:
        """Whether its task is a conversation; False where every row is one question."""
        questions = [
            sum(message.role == "user" for message in conversation.messages)
            for conversation in self.conversations
        ]
        return max(questions, default=2) > 1


def read_run(directory: Path) -> Run:
    """Read the records in a directory, which may lack any of them.

    Raises:
        UserError: One of them is damaged.
    """
    run = Run(directory)
    if (directory / "loss.png").is_file():
        run.curve = (directory / "loss.png").read_bytes()
    if (directory / "scores.json").is_file():
        run.scores = read_json(directory / "scores.json")
    base, tuned = (
        read_predictions(directory / name) if (directory / name).is_file() else []
        for name in (BASE_PREDICTIONS, PREDICTIONS)
    )
    answers = {row.index: row.prediction for row in base}
    run.samples = [asdict(row) | {"base": answers.get(row.index, "")} for row in tuned]
    if (directory / RUN_CONFIG_FILE).is_file():
        config = RunConfig.load(directory / RUN_CONFIG_FILE)
        run.settings = settings_of(config)
        run.conversations = first_rows(config.data)
    return run


def settings_of(config: RunConfig) -> dict[str, str]:
    """What is worth knowing of a run, by the names of its YAML."""
    training, data = config.training, config.data
    values = {
        "model.path": config.model.path,
        "model.template": config.model.template,
        "adapter.type": config.adapter.type,
        **{f"adapter.{name}": value for name, value in config.adapter.settings.items()},
        "data.train_file": data.train_file,
        **{
            f"training.{name}": training.get(name)
            for name in ("max_steps", "num_train_epochs", "learning_rate")
        },
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def first_rows(data: DataConfig) -> list[Conversation]:
    """A few rows of the first data file that is still there, test before validation before train."""
    for paths in (data.test_file, data.validation_file, data.train_file):
        files = [paths] if isinstance(paths, str) else paths or []
        if files and all(Path(file).exists() for file in files):
            try:
                return load_conversations(files, data, EXAMPLES)
            except UserError:  # the file is no longer what the run was trained on
                return []
    return []


# ---- HTML


def run_html(run: Run | None, language: str) -> str:
    """The page of a run: scores, loss curve, settings, samples.

    Args:
        run: Its records; None where no adapter is loaded.
        language: A key of `TEXTS`.
    """
    texts = TEXTS[language]
    if run is None:
        return f'<div class="empty"><p>{texts["no_adapter"]}</p><pre>bash scripts/train_ptuning.sh</pre></div>'
    cards = []
    if run.scores:
        rows = len(run.samples) if run.samples else "–"
        cards.append(
            card(texts["scores"], texts["scores_info"].format(rows=rows), scores(run.scores, texts))
        )
    if run.curve:
        data = base64.b64encode(run.curve).decode("ascii")
        image = f'<img alt="{texts["curve"]}" src="data:image/png;base64,{data}">'
        cards.append(card(texts["curve"], "", image))
    if run.settings and cards:
        items = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in run.settings.items())
        cards.append(
            card(texts["settings"], "", f'<dl class="settings">{"".join(items)}</dl>', "wide")
        )
    if run.samples:
        count = min(SAMPLES, len(run.samples))
        info = texts["samples_info"].format(
            shown=count, rows=len(run.samples), file=run.directory / PREDICTIONS
        )
        body = "".join(sample(row, texts) for row in run.samples[:SAMPLES])
        cards.append(card(texts["samples"], info, body, "wide"))
    if not cards:
        text = texts["no_run"].format(directory=run.directory)
        return f'<div class="empty"><p>{escape(text)}</p></div>'
    return f'<div class="cards">{"".join(cards)}</div>'


def card(title: str, info: str, body: str, kind: str = "") -> str:
    """A titled box; `body` is HTML."""
    note = f'<p class="note">{escape(info)}</p>' if info else ""
    return f'<section class="card {kind}"><h3>{escape(title)}</h3>{note}{body}</section>'


def scores(values: dict[str, dict[str, float]], texts: dict[str, str]) -> str:
    """Base and tuned scores side by side, as a table."""
    names = ("metric", "base_column", "tuned_column", "change")
    rows = [cells([texts[name] for name in names], "th")]
    for name, tuned in values["tuned"].items():
        base = values["base"].get(name, 0.0)
        numbers = [f"{base:.2f}", f"{tuned:.2f}", f"{tuned - base:+.2f}".replace("-", "−")]
        rows.append(cells([name, *numbers], "td"))
    return f'<table class="scores">{"".join(rows)}</table>'


def cells(texts: Sequence[str], tag: str) -> str:
    """A row of a table."""
    return f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)}</tr>"


def sample(row: dict[str, str], texts: dict[str, str]) -> str:
    """One row of the test data with its answers."""
    names = {
        "prompt": "question",
        "reference": "reference",
        "base": "base_column",
        "prediction": "tuned_column",
    }
    items = (
        f'<dt>{texts[name]}</dt><dd class="{key}">{escape(row[key])}</dd>'
        for key, name in names.items()
        if row.get(key)
    )
    return f'<dl class="sample">{"".join(items)}</dl>'
