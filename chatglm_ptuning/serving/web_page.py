"""What happens on the web page."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.engine import BusyError, Engine
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.serving.web_chat import (
    Chat,
    Progress,
    Request,
    answers,
    ask,
    explain,
    hear,
    question_at,
    raw_prompt,
    read_seed,
    read_tools,
    room,
    shown,
    to_encode,
)
from chatglm_ptuning.serving.web_layout import BASE, NOBODY, PageLayout
from chatglm_ptuning.serving.web_run import Run, run_html
from chatglm_ptuning.serving.web_text import TEXTS

# Replaces the first input, the language, by the browser's.
FOLLOW_BROWSER = "(_, ...rest) => [/^zh/i.test(navigator.language) ? 'zh' : 'en', ...rest]"
READY = gr.update(submit_btn=True, stop_btn=False)
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK = HIDDEN | {"queue": False}


class WebPage(PageLayout):
    """The page at work; arguments as `PageLayout`."""

    def __init__(
        self, engine: Engine, runs: Mapping[str, Run], subtitle: str, language: str | None = None
    ) -> None:
        super().__init__(engine, runs, subtitle, language)
        with self.blocks:
            self.connect()

    def connect(self) -> None:
        """What happens when."""
        shown = [self.chat, *self.bots, *self.statuses, self.notice, self.box]
        answering = [
            self.box.submit(
                self.submit,
                [self.box, self.chat, *self.settings],
                shown,
                concurrency_limit=None,
                **HIDDEN,
            )
        ]
        for bot in self.bots:
            for event, act in ((bot.retry, self.retry), (bot.edit, self.edit)):
                inputs = [self.chat, *self.settings]
                answering.append(event(act, inputs, shown, concurrency_limit=None, **HIDDEN))
            bot.undo(self.undo, [self.chat, self.languages], shown, **QUICK)
            bot.clear(self.clear, [self.chat, self.languages], shown, **QUICK)
        self.box.stop(
            self.stop,
            [self.chat, self.languages],
            shown,
            cancels=answering,
            **QUICK,
        ).then(self.say_stopped, [self.chat, self.languages], self.statuses, **QUICK)
        self.left.input(
            self.choose,
            [self.left, self.languages],
            [self.bots[0], self.examples, self.remember],
            **QUICK,
        )
        self.right.input(
            self.compare,
            [self.right, self.chat, self.languages],
            [self.chat, self.columns[1], *self.bots, self.box],
            **QUICK,
        )
        self.examples.click(lambda row: row[0], self.examples, self.box, **QUICK)
        self.show.click(self.show_prompt, [self.box, self.chat, *self.context], self.raw, **QUICK)
        self.trained.input(self.show_run, [self.trained, self.languages], self.record, **QUICK)
        translated = [component for component, _ in self.words]
        outputs = [self.languages, self.record, *translated]
        inputs = [self.languages, self.left, self.right, self.trained, self.chat]
        self.languages.input(self.translate, inputs, outputs, **QUICK)
        follow = FOLLOW_BROWSER if self.language is None else None
        self.blocks.load(self.translate, inputs, outputs, js=follow, **QUICK)

    async def submit(self, text: str, chat: Chat, *settings: Any) -> AsyncGenerator[tuple, None]:
        """The message in the box is sent."""
        async for view in self.answer(chat, chat.sides, text, *settings):
            yield view

    async def retry(
        self, event: gr.RetryData, chat: Chat, *settings: Any
    ) -> AsyncGenerator[tuple, None]:
        """A message is answered again."""
        sides, text = self.before(chat, event.index)
        async for view in self.answer(chat, sides, text, *settings):
            yield view

    async def edit(
        self, event: gr.EditData, chat: Chat, *settings: Any
    ) -> AsyncGenerator[tuple, None]:
        """A message is put in other words and answered again."""
        sides, _ = self.before(chat, event.index)
        async for view in self.answer(chat, sides, event.value, *settings):
            yield view

    def before(self, chat: Chat, index: Any) -> tuple[list[list[Message]], str]:
        """The conversations before a message (or before what it answers), and its text."""
        index = index[0] if isinstance(index, list | tuple) else index
        side = chat.sides[0] if len(chat.sides[0]) > index else chat.sides[1]
        place = question_at(side, index)
        return [messages[:place] for messages in chat.sides], side[place].content

    async def answer(
        self,
        chat: Chat,
        sides: list[list[Message]],
        text: str,
        left: str,
        right: str,
        remember: bool,
        system: str,
        tools: str,
        language: str,
        *sampling: Any,
    ) -> AsyncGenerator[tuple, None]:
        """Let one model or two answer a message that follows `sides`; what the page shows, again and again."""
        if not text.strip():
            return
        chat.turn += 1
        turn, names = chat.turn, [left] if right == NOBODY else [left, right]
        asked = [ask(side, text) for side in sides[: len(names)]]
        chat.sides = [*asked, *sides[len(names) :]]
        statuses = [TEXTS[language]["working"]] * len(names)
        yield self.view(
            chat, language, statuses, gr.update(value="", submit_btn=False, stop_btn=True)
        )
        try:
            requests = [  # long messages take their time; other visitors' answers go on meanwhile
                await asyncio.to_thread(
                    self.request, side, name, remember, system, tools, *sampling
                )
                for side, name in zip(asked, names, strict=True)
            ]
            progress = [Progress(len(request.prompt_ids)) for request in requests]
            async with aclosing(answers(self.engine, requests)) as stream:
                async for news in stream:
                    if chat.turn != turn:
                        return
                    for place, update in news:
                        progress[place].add(update)
                        hear(asked[place], update)
                    statuses = chat.lines = [each.text(language) for each in progress]
                    yield self.view(chat, language, statuses, gr.skip())
        except (UserError, BusyError) as error:
            chat.sides = sides
            box = READY | {"value": text}
            yield self.view(chat, language, [], box, explain(error, language))
            return
        yield self.view(chat, language, statuses, READY)

    def request(
        self,
        messages: list[Message],
        name: str,
        remember: bool,
        system: str,
        tools: str,
        *sampling: Any,
    ) -> Request:
        """What the engine is asked for.

        Raises:
            UserError: The tools are none, the format cannot hold the conversation, or it is too long.
        """
        offered = read_tools(tools)
        ids = self.engine.encode(to_encode(messages, system, remember), offered)
        adapter = name if name != BASE else None
        temperature, top_p, top_k, repetition_penalty, max_tokens, seed = sampling
        chosen = Sampling(
            max_tokens=room(self.engine, ids, adapter, int(max_tokens)),
            temperature=temperature,
            top_p=top_p,
            top_k=int(top_k),
            repetition_penalty=repetition_penalty,
            seed=read_seed(seed),
        )
        return Request(ids, chosen, adapter, offered)

    def view(
        self, chat: Chat, language: str, statuses: list[str], box: Any, notice: str = ""
    ) -> tuple:
        """Values for the state, both conversations, both lines beneath them, the notice, the box."""
        lines = [f"<p>{escape(status)}</p>" for status in [*statuses, "", ""][:2]]
        warning = f"<p>{escape(notice)}</p>" if notice else ""
        return (chat, *(shown(side, language) for side in chat.sides), *lines, warning, box)

    def undo(self, event: gr.UndoData, chat: Chat, language: str) -> tuple:
        """A message and what followed are taken back; its text is in the box again."""
        chat.turn += 1
        chat.sides, text = self.before(chat, event.index)
        return self.view(chat, language, [], READY | {"value": text})

    def clear(self, chat: Chat, language: str) -> tuple:
        """All is taken back."""
        return self.view(Chat(turn=chat.turn + 1), language, [], READY)

    def stop(self, chat: Chat, language: str) -> tuple:
        """The answer ends here; if there is none yet, its message goes back into the box."""
        chat.turn += 1
        text = None
        if chat.sides[0] and all(side[-1].role != "assistant" for side in chat.sides if side):
            text = chat.sides[0][-1].content
            chat.sides = [side[:-1] for side in chat.sides]
        for side in chat.sides:
            if side and side[-1].role != "assistant":
                side.append(Message("assistant", ""))
        box = READY if text is None else READY | {"value": text}
        _, left, right, _, _, notice, _ = self.view(chat, language, [], box)
        return chat, left, right, gr.skip(), gr.skip(), notice, box

    def say_stopped(self, chat: Chat, language: str) -> list[str]:
        """The lines beneath the answers say so, after the last one of the stopped stream came."""
        end = f" · {TEXTS[language]['cancelled']}"
        lines = [f"<p>{escape(line + end)}</p>" for line in chat.lines]
        return [*lines, "", ""][:2]

    def choose(self, name: str, language: str) -> tuple:
        """Another one answers: its name above the conversation, its examples."""
        return (
            gr.Chatbot(label=self.name(name, language)),
            gr.Dataset(**self.example_settings(name)),
            self.has_turns(name),
        )

    def compare(self, name: str, chat: Chat, language: str) -> tuple:
        """A second one answers too, from here on, or no longer."""
        chat.turn += 1
        is_shown = name != NOBODY
        if is_shown and not chat.sides[1]:
            chat.sides[1] = list(chat.sides[0])
        elif not is_shown:
            chat.sides[1] = []
        return (
            chat,
            gr.Column(visible=is_shown),
            gr.Chatbot(show_label=is_shown),
            gr.Chatbot(shown(chat.sides[1], language), label=self.name(name, language)),
            READY,
        )

    def name(self, name: str, language: str) -> str:
        """What one who answers is called."""
        return name if name not in (BASE, NOBODY) else TEXTS[language]["base"]

    def show_prompt(
        self,
        text: str,
        chat: Chat,
        left: str,
        right: str,
        remember: bool,
        system: str,
        tools: str,
        language: str,
    ) -> str:
        """The prompt of the message in the box, or else of the last one."""
        messages = chat.sides[0]
        if text.strip():
            messages = ask(messages, text)
        elif messages:
            messages = messages[: question_at(messages, len(messages) - 1) + 1]
        else:
            return TEXTS[language]["no_prompt"]
        try:
            offered = read_tools(tools)
            ids = self.engine.encode(to_encode(messages, system, remember), offered)
        except UserError as error:
            return explain(error, language)
        return raw_prompt(self.engine.tokenizer, ids)

    def show_run(self, name: str, language: str) -> str:
        """The records of another adapter."""
        return run_html(self.runs.get(name), language)

    def translate(self, language: str, left: str, right: str, trained: str, chat: Chat) -> list:
        """All texts in another language."""
        texts = TEXTS[language]
        changes: dict[Any, dict[str, Any]] = {
            component: {name: texts[key] for name, key in words.items()}
            for component, words in self.words
        }
        nobody = (texts["nobody"], NOBODY)
        changes[self.left]["choices"] = self.choices(texts["base"])
        changes[self.right]["choices"] = self.choices(texts["base"], nobody)
        for bot, side, name in zip(self.bots, chat.sides, (left, right), strict=True):
            changes[bot] |= {"value": shown(side, language), "label": self.name(name, language)}
        return [
            language,
            run_html(self.runs.get(trained), language),
            *(gr.update(**change) for change in changes.values()),
        ]
