"""One conversation to one training example: what is asked, what is learned, what did not fit."""

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation
from chatglm_ptuning.data.report import DataReport
from chatglm_ptuning.data.template import IGNORED, Example, Template, Tokenizer
from chatglm_ptuning.data.truncation import Fit, fit_prompt, without
from chatglm_ptuning.errors import UserError


def encode_example(
    conversation: Conversation,
    template: Template,
    tokenizer: Tokenizer,
    config: DataConfig,
    report: DataReport,
) -> Example | None:
    """Encode one conversation within the limits; None where it is skipped (the report says why).

    Raises:
        UserError: The template cannot hold the conversation, with `file:line:`.
    """
    ended = end_with_answer(conversation, report)
    if ended is None:
        return None
    try:
        example = template.encode_conversation(tokenizer, ended, config.loss_on)
        report.source_lengths[example.prompt_length] += 1
        report.target_lengths[len(example.input_ids) - example.prompt_length] += 1
        prompt = example.input_ids[: example.prompt_length + template.prompt_targets]
        fit = fit_row(ended, prompt, template, tokenizer, config, report)
        if fit is None:
            return None
        if fit.dropped_tokens:
            ended = Conversation((*fit.messages, ended.messages[-1]), ended.tools, ended.source)
            example = template.encode_conversation(tokenizer, ended, config.loss_on)
    except UserError as error:
        raise UserError(f"{conversation.source}: {error}") from error
    if fit.removed is not None:
        example = cut(example, fit.removed)
    surplus = len(example.input_ids) - example.prompt_length - config.max_target_length
    if surplus > 0:
        if config.truncation == "drop":
            report.skip(
                f"answer over data.max_target_length={config.max_target_length}",
                conversation.source,
            )
            return None
        report.change(
            f"answer cut to data.max_target_length={config.max_target_length}",
            conversation.source,
            surplus,
        )
        end = len(example.input_ids) - 1  # the token that ends the answer stays
        example = cut(example, slice(end - surplus, end))
    if example.labels.count(IGNORED) == len(example.labels):
        report.skip("nothing in it to learn", conversation.source)
        return None
    return example


def end_with_answer(conversation: Conversation, report: DataReport) -> Conversation | None:
    """The conversation up to its last answer; None, reported, where there is no question or no answer."""
    messages = conversation.messages
    last = len(messages) - 1
    while last >= 0 and messages[last].role != "assistant":
        last -= 1
    if last < 0:
        report.skip("no answer", conversation.source)
    elif messages[last].is_empty:
        report.skip("empty answer", conversation.source)
    elif last == 0 or all(message.is_empty for message in messages[:last]):
        report.skip("empty question", conversation.source)
    elif last < len(messages) - 1:
        report.change("messages after the last answer left out", conversation.source, 0)
        return Conversation(messages[: last + 1], conversation.tools, conversation.source)
    else:
        return conversation
    return None


def fit_row(
    conversation: Conversation,
    prompt: list[int],
    template: Template,
    tokenizer: Tokenizer,
    config: DataConfig,
    report: DataReport,
) -> Fit | None:
    """Fit the prompt of a conversation into its limit and report what it lost; None where the row is skipped."""
    limit = f"data.max_source_length={config.max_source_length}"
    *messages, _ = conversation.messages
    fit = fit_prompt(
        template,
        tokenizer,
        messages,
        conversation.tools,
        prompt,
        config.max_source_length,
        config.truncation,
    )
    if not fit.fits:
        report.skip(f"prompt over {limit}", conversation.source)
        return None
    if fit.dropped_tokens:
        report.change(
            f"oldest turns dropped to fit {limit}", conversation.source, fit.dropped_tokens
        )
    if fit.removed is not None:
        tokens = fit.removed.stop - fit.removed.start
        report.change(f"prompt cut ({config.truncation}) to {limit}", conversation.source, tokens)
    return fit


def cut(example: Example, removed: slice) -> Example:
    """An example without a part that lies wholly in its prompt or wholly in its answer."""
    tokens = removed.stop - removed.start
    return Example(
        without(example.input_ids, removed),
        without(example.labels, removed),
        example.prompt_length - (tokens if removed.start < example.prompt_length else 0),
    )
