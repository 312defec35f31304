import copy
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.answer import Update
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.limits import BusyError, Limits, TooLongError
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.tuners import (
    PromptEncoderConfig,
    PromptTuningConfig,
    add_adapter,
    list_adapters,
    prompt,
    save_adapter,
    set_adapter,
)
from tests.serving.conftest import Base

LONG = Sampling(max_tokens=200)


def last(updates: SimpleQueue[Update]) -> Update:
    while (update := updates.get(timeout=20)).finish_reason is None:
        pass
    return update


def ask(engine: Engine, adapter: str | None, sampling: Sampling) -> str:
    prompt = engine.encode([Message("user", "裙")])
    *_, update = engine.stream(prompt, sampling, adapter)
    return update.message.content


def test_cancelled_answer_ends_and_others_go_on(engine: Engine) -> None:
    prompt = engine.encode([Message("user", "裙")])
    queues: list[SimpleQueue[Update]] = [SimpleQueue(), SimpleQueue()]
    given_up, kept = (engine.submit(prompt, queue.put, LONG, "p5") for queue in queues)
    given_up.cancel()
    assert last(queues[0]).finish_reason == "cancelled"
    assert last(queues[1]).finish_reason in ("length", "stop")
    assert kept.num_tokens > given_up.num_tokens
    assert engine.load == (0, 0)


def test_request_cancelled_while_it_waits_alone_does_not_stop_the_engine(engine: Engine) -> None:
    prompt = engine.encode([Message("user", "裙")])
    queue: SimpleQueue[Update] = SimpleQueue()

    def go_on(
        update: Update,
    ) -> None:  # in the engine's thread, so it is cancelled before it can join
        if update.finish_reason is not None:
            engine.submit(prompt, queue.put, LONG).cancel()

    engine.submit(prompt, go_on, Sampling(max_tokens=1))
    assert last(queue).finish_reason == "cancelled"
    engine.submit(prompt, queue.put, Sampling(max_tokens=1))
    assert last(queue).finish_reason in ("length", "stop")


def test_too_much_is_refused(base: Base) -> None:
    engine = base.engine(limits=Limits(max_batch=1, max_waiting=1, max_answer_tokens=200))
    prompt = engine.encode([Message("user", "裙")])
    queue: SimpleQueue[Update] = SimpleQueue()
    with pytest.raises(TooLongError, match="max_tokens must be at most 200 tokens"):
        engine.submit(prompt, queue.put, Sampling(max_tokens=201))
    with pytest.raises(TooLongError, match="the prompt and max_tokens together"):
        engine.submit([5] * engine.model.config.max_position_embeddings, queue.put, Sampling(1))
    with pytest.raises(UserError, match="adapter must be one of those loaded"):
        engine.submit(prompt, queue.put, LONG, "nobody")
    with pytest.raises(BusyError, match="waiting already"):
        [engine.submit(prompt, queue.put, LONG, "p5") for _ in range(5)]
    engine.close(drain=False)
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit(prompt, queue.put, LONG)
    with pytest.raises(BusyError, match="shutting down"):
        engine.add_adapter("new", "nowhere")


def test_limits_are_at_least_one() -> None:
    with pytest.raises(UserError, match="max_batch must be at least 1, got 0"):
        Limits(max_batch=0)


def test_too_long_prompt_allows_no_answer(base: Base) -> None:
    engine = base.engine(limits=Limits(max_prompt_tokens=5))
    assert engine.longest_answer([5] * 5) > 1
    assert engine.longest_answer([5] * 6) == 0
    engine.close()


def test_bug_in_the_engine_is_told_to_whoever_waits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, queue = ask(engine, "p5", Sampling(8)), SimpleQueue[Update]()

    def fail(*args: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "_next_to_join", fail)
        engine.submit(engine.encode([Message("user", "裙")]), queue.put, LONG)
        assert last(queue).error == "RuntimeError: a bug"
    assert ask(engine, "p5", Sampling(8)) == expected


def test_close_ends_answers_that_are_joining(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, queue = base.engine(), SimpleQueue[Update]()
    read = engine._batch.join

    def join(answers: list) -> None:
        engine.give_up()
        read(answers)

    monkeypatch.setattr(engine._batch, "join", join)
    monkeypatch.setattr(type(base.template), "stop_token_ids", lambda *_: [])
    engine.submit(engine.encode([Message("user", "裙")]), queue.put, LONG, "p5")
    assert last(queue).finish_reason == "cancelled"
    engine.close()


def test_out_of_memory_ends_answers_and_not_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(engine, "p5", Sampling(8))

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as broken:
        broken.setattr("chatglm_ptuning.serving.batch.choose_tokens", fail)
        *_, update = engine.stream(engine.encode([Message("user", "裙")]), LONG)
    assert (update.finish_reason, update.error) == ("error", "out of memory")
    assert ask(engine, "p5", Sampling(8)) == expected


def test_removed_lora_finishes_its_answers(bases: dict[str, Base], saved: dict[str, Path]) -> None:
    engine = bases["glm"].engine()
    expected = ask(engine, "lora", LONG)
    queue: SimpleQueue[Update] = SimpleQueue()
    engine.submit(engine.encode([Message("user", "裙")]), queue.put, LONG, "lora")
    queue.get(timeout=60)
    engine.remove_adapter("lora")
    assert last(queue).message.content == expected
    with pytest.raises(UserError, match="adapter must be one of those loaded"):
        ask(engine, "lora", LONG)
    engine.add_adapter("other", saved["lora"])
    assert "lora" not in list_adapters(engine.model)
    assert ask(engine, "other", LONG) == expected
    engine.close()


def test_removed_lora_leaves_though_its_last_answer_ends_in_joining(
    bases: dict[str, Base], saved: dict[str, Path]
) -> None:
    engine = bases["glm"].engine(limits=Limits(max_batch=1))
    prompt, queue = engine.encode([Message("user", "裙")]), SimpleQueue[Update]()
    engine.submit(prompt, SimpleQueue().put, Sampling(20), "p5")
    engine.submit(prompt, queue.put, Sampling(1), "lora")  # waits for the first to end
    engine.remove_adapter("lora")
    last(queue)
    engine.add_adapter("lora", saved["lora"])
    engine.close()


def test_soft_prompts_and_prefixes_answer_in_one_batch_as_alone(bases: dict[str, Base]) -> None:
    base = Base(copy.deepcopy(bases["glm"].model), bases["glm"].tokenizer, bases["glm"].template)
    torch.manual_seed(1)
    for config, name in (
        (PromptTuningConfig(num_virtual_tokens=7), "soft"),
        (PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16), "mlp"),
    ):
        add_adapter(base.model, config, name)
        for parameter in prompt.parameters(base.model, name):
            torch.nn.init.normal_(parameter)
    base.model.eval()
    ids = base.template.encode_prompt(base.tokenizer, [Message("user", "裙")])
    names, expected = ["soft", "p5", "mlp", "p13", None, "lora"], []
    for name in names:
        set_adapter(base.model, name)
        expected.append(
            base.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=24,
                min_new_tokens=24,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        )
    assert len(set(map(tuple, expected))) == len(names)
    engine = base.engine()
    queues: list[SimpleQueue[Update]] = [SimpleQueue() for _ in names]
    asked = zip(names, queues, strict=True)
    answers = [engine.submit(ids, queue.put, Sampling(24), name) for name, queue in asked]
    for queue in queues:
        last(queue)
    engine.close()
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.text.ids == wanted[: answer.num_tokens]
        assert answer.num_tokens > 8


def test_soft_prompt_of_chatglm_is_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    model = copy.deepcopy(bases["chatglm"].model)
    add_adapter(model, PromptTuningConfig(num_virtual_tokens=4), "soft")
    save_adapter(model, tmp_path, "soft")
    engine = bases["chatglm"].engine()
    with pytest.raises(UserError, match="must not depend on the text behind it"):
        engine.add_adapter("soft", tmp_path)
    assert "soft" not in engine.adapters
    engine.close()


def test_adapter_that_cannot_be_loaded_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    names, expected = engine.adapters, ask(engine, "lora", Sampling(8))
    for name in ("new", "p5", "lora"):
        with pytest.raises(UserError):
            engine.add_adapter(name, tmp_path)
    assert engine.adapters == names
    assert ask(engine, "lora", Sampling(8)) == expected
