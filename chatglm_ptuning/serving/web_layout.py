"""The components of the web page."""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr

from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.web_chat import Chat
from chatglm_ptuning.serving.web_run import Run, run_html
from chatglm_ptuning.serving.web_text import LANGUAGES, TEXTS

BASE, NOBODY = "", "\0"  # choices beside the adapters' names, which are neither
LABEL_LENGTH = 28  # characters of an example on its button


class PageLayout:
    """What the page is made of; `blocks` is gradio's app.

    Args:
        engine: Answers.
        runs: The training records of each adapter.
        subtitle: What is served, in a line.
        language: A key of `LANGUAGES`; None follows the browser.
    """

    def __init__(
        self, engine: Engine, runs: Mapping[str, Run], subtitle: str, language: str | None = None
    ) -> None:
        self.engine, self.runs, self.language = engine, runs, language
        self.i18n = gr.I18n(**TEXTS, **{"zh-CN": TEXTS["zh"], "zh-TW": TEXTS["zh"]})
        self.words: list[tuple[Any, dict[str, str]]] = []
        self.first = next(iter(runs), BASE)
        self.has_roles = "<|user|>" in engine.template.control_tokens
        with gr.Blocks(title="ChatGLM P-Tuning", analytics_enabled=False) as self.blocks:
            self.chat = gr.State(Chat())
            with gr.Row(elem_id="head"):
                gr.HTML(
                    f"<h1>ChatGLM P-Tuning</h1><p>{escape(subtitle)}</p>",
                    elem_id="title",
                    padding=False,
                )
                self.languages = gr.Radio(
                    [(name, key) for key, name in LANGUAGES.items()],
                    value=language if language is not None else "zh",
                    show_label=False,
                    container=False,
                    elem_id="language",
                )
            with gr.Tabs():
                with self.add(gr.Tab, {"label": "chat"}), gr.Row():
                    with gr.Column(scale=5, min_width=320):
                        self.make_chat()
                    with gr.Column(scale=2, min_width=270):
                        self.make_settings()
                with self.add(gr.Tab, {"label": "run"}, elem_id="run"):
                    self.make_run()

    # ---- components

    def add(self, make: Callable[..., Any], words: dict[str, str], **settings: Any) -> Any:
        """A component whose properties `words` are texts, by their keys, in the page's language."""
        component = make(**{name: self.text(key) for name, key in words.items()}, **settings)
        self.words.append((component, words))
        return component

    def text(self, key: str) -> Any:
        """A text in the page's language, or for the browser to choose."""
        return TEXTS[self.language][key] if self.language is not None else self.i18n(key)

    def choices(self, base: Any, *others: tuple[Any, str]) -> list[tuple[Any, str]]:
        """Who can answer: `others`, every adapter, the base."""
        return [*others, *((name, name) for name in self.engine.adapters), (base, BASE)]

    def make_chat(self) -> None:
        """Who answers, the conversation or two side by side, the message box, examples."""
        base, nobody = self.text("base"), (self.text("nobody"), NOBODY)
        with gr.Row():
            self.left = self.add(
                gr.Dropdown,
                {"label": "answers"},
                choices=self.choices(base),
                value=self.first,
                filterable=False,
                min_width=150,
                elem_id="left",
            )
            self.right = self.add(
                gr.Dropdown,
                {"label": "compare"},
                choices=self.choices(base, nobody),
                value=NOBODY,
                filterable=False,
                min_width=150,
                elem_id="right",
            )
        self.columns, self.bots, self.statuses = [], [], []
        with gr.Row(equal_height=True):
            for side, empty in (("left", "empty"), ("right", "empty_right")):
                with gr.Column(min_width=280, visible=side == "left") as column:
                    bot = self.add(
                        gr.Chatbot,
                        {"placeholder": empty},
                        label=self.first if self.first else "",
                        show_label=side == "right",
                        elem_id=f"chat-{side}",
                        elem_classes="chat",
                        editable="user",
                        buttons=["copy"],
                        layout="bubble",
                        feedback_options=None,
                        allow_tags=False,
                        height=None,
                    )
                    status = gr.HTML(elem_id=f"status-{side}", elem_classes="status", padding=False)
                self.columns.append(column)
                self.bots.append(bot)
                self.statuses.append(status)
        self.notice = gr.HTML(elem_id="notice", padding=False)
        self.box = self.add(
            gr.Textbox,
            {"placeholder": "hint"},
            lines=1,
            max_lines=8,
            show_label=False,
            container=False,
            autofocus=True,
            submit_btn=True,
            stop_btn=False,
            elem_id="box",
        )
        self.examples = self.add(
            gr.Dataset,
            {"label": "examples"},
            components=[gr.Textbox(visible=False)],
            elem_id="examples",
            **self.example_settings(self.first),
        )

    def example_settings(self, name: str) -> dict[str, Any]:
        """What to try with an adapter."""
        texts = self.runs[name].examples if name in self.runs else []
        labels = [t if len(t) <= LABEL_LENGTH else f"{t[: LABEL_LENGTH - 1]}…" for t in texts]
        return {"samples": [[t] for t in texts], "sample_labels": labels, "visible": bool(texts)}

    def has_turns(self, name: str) -> bool:
        """Whether an adapter's task is a conversation, as the base's is."""
        return name not in self.runs or self.runs[name].has_turns

    def make_settings(self) -> None:
        """Sampling; system message and tools where the format has them; the raw prompt."""
        self.remember = self.add(
            gr.Checkbox,
            {"label": "remember", "info": "remember_info"},
            value=self.has_turns(self.first),
            elem_id="remember",
        )
        limits = self.engine.limits
        longest = min(
            limits.max_answer_tokens, self.engine.model.config.max_position_embeddings - 1
        )
        with self.add(gr.Accordion, {"label": "sampling"}, open=True):
            sliders = [
                self.slider("temperature", 0, 2, 0.05, 0),
                self.slider("top_p", 0.05, 1, 0.05, 1),
                self.slider("top_k", 0, 200, 1, 0),
                self.slider("repetition_penalty", 1, 2, 0.05, 1),
                self.add(
                    gr.Slider,
                    {"label": "max_tokens"},
                    minimum=1,
                    maximum=longest,
                    step=1,
                    value=min(256, longest),
                    buttons=[],
                    elem_id="max_tokens",
                ),
            ]
            seed = self.add(
                gr.Textbox, {"label": "seed", "info": "seed_info"}, value="", elem_id="seed"
            )
        with self.add(gr.Accordion, {"label": "instructions"}, open=False, visible=self.has_roles):
            system = self.add(gr.Textbox, {"label": "system"}, value="", lines=2, elem_id="system")
            tools = self.add(
                gr.Textbox,
                {"label": "tools", "info": "tools_info"},
                value="",
                lines=4,
                max_lines=12,
                elem_id="tools",
            )
        with self.add(gr.Accordion, {"label": "prompt"}, open=False, elem_id="prompt"):
            self.show = self.add(gr.Button, {"value": "show"}, size="sm", elem_id="show-prompt")
            self.raw = self.add(
                gr.Textbox,
                {"label": "prompt_text", "info": "prompt_info"},
                lines=4,
                max_lines=16,
                interactive=False,
                elem_id="raw-prompt",
            )
        self.context = [self.left, self.right, self.remember, system, tools, self.languages]
        self.settings = [*self.context, *sliders, seed]

    def slider(self, name: str, least: float, most: float, step: float, value: float) -> Any:
        """A slider for a field of `Sampling`."""
        return self.add(
            gr.Slider,
            {"label": name, "info": f"{name}_info"},
            minimum=least,
            maximum=most,
            step=step,
            value=value,
            buttons=[],
            elem_id=name,
        )

    def make_run(self) -> None:
        """The training records of an adapter."""
        self.trained = self.add(
            gr.Dropdown,
            {"label": "adapter"},
            choices=list(self.runs),
            value=next(iter(self.runs), None),
            visible=len(self.runs) > 1,
            filterable=False,
            elem_id="trained",
        )
        self.record = gr.HTML(
            run_html(self.runs.get(self.first), self.language or "zh"), padding=False
        )
