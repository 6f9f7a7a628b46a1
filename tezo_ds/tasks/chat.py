"""Conversations as token ids: the tokenizer's chat template, and which of its tokens are answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import DataError, one_line
from tezo_ds.tasks.formats import Conversation

Spans = tuple[tuple[int, int], ...]
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # of a template that tells answers by itself


def tokenised(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, everything: bool
) -> tuple[list[int], Spans]:
    """Returns the ids of a whole conversation, those of `apply_chat_template`, and the spans to train on.

    Answers are told by the template's generation mask where it has one, and else by what each turn adds to
    the text before it.

    Args:
        tokenizer: with a chat template.
        conversation: the messages.
        everything: whether all tokens train, and not the answers alone.

    Raises:
        DataError: there is no template, it refuses the messages, or its answers cannot be told apart.
    """
    _check_template(tokenizer)
    whole = _ids(tokenizer, conversation, len(conversation.messages))
    if everything:
        return whole, ((1, len(whole)),)
    if conversation.asked is not None:
        return whole, _joined(
            [_added(tokenizer, conversation, whole, conversation.asked, len(conversation.messages))]
        )
    turns = [i for i, one in enumerate(conversation.messages) if one["role"] == "assistant"]
    if not turns:
        raise DataError(
            f"conversation {_shown(conversation)} has no turn of the assistant to train on"
        )
    if _MARK.search(tokenizer.get_chat_template(tools=conversation.tools)):
        return whole, _masked(tokenizer, conversation)
    return whole, _joined([_added(tokenizer, conversation, whole, i, i + 1) for i in turns])


def opening(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> tuple[list[int], str]:
    """Returns the ids of what comes before the last answer, up to where the model would begin it, and the
    answer.

    Raises:
        DataError: there is no turn of the assistant with text.
    """
    turns = [
        i for i, one in enumerate(conversation.messages)
        if one["role"] == "assistant" and one.get("content") and i
    ]  # fmt: skip
    if not turns:
        raise DataError(f"conversation {_shown(conversation)} has no answer to compare with")
    last = turns[-1]
    ids = _ids(tokenizer, conversation, last, add_generation_prompt=True)
    return ids, str(conversation.messages[last]["content"]).strip()


def unanswered(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Returns the ids of a whole conversation, up to where the model would begin to answer.

    Raises:
        DataError: there is no chat template, or it refuses the messages.
    """
    _check_template(tokenizer)
    return _ids(tokenizer, conversation, len(conversation.messages), add_generation_prompt=True)


def asking(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a user's message, up to where the model would begin to answer.

    Raises:
        DataError: there is no chat template, or it refuses the message.
    """
    _check_template(tokenizer)
    conversation = Conversation([{"role": "user", "content": text}])
    return _ids(tokenizer, conversation, 1, add_generation_prompt=True)


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template for conversations; take an instruct model, or data "
            "with prompt and completion"
        )


def _ids(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, count: int, **more: Any
) -> list[int]:
    """Returns the ids of the first messages."""
    try:
        found: Any = tokenizer.apply_chat_template(
            conversation.messages[:count],
            tools=conversation.tools,
            tokenize=True,
            return_dict=True,
            **more,
        )
    except Exception as error:  # a template's own have no common base
        raise DataError(
            f"the chat template refuses conversation {_shown(conversation)} ({one_line(error)})"
        ) from None
    return list(found["assistant_masks" if "return_assistant_tokens_mask" in more else "input_ids"])


def _added(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    whole: Sequence[int],
    first: int,
    end: int,
) -> tuple[int, int]:
    """Returns the span of what messages first … end - 1 add, from where the model would begin to answer.

    Raises:
        DataError: the template writes what comes before otherwise once there is more, as some leave thoughts
            of earlier turns out.
    """
    before = _ids(tokenizer, conversation, first, add_generation_prompt=True) if first else []
    after = list(whole) if end == len(conversation.messages) else _ids(tokenizer, conversation, end)
    if list(whole[: len(after)]) != after or after[: len(before)] != before:
        raise DataError(
            f"the chat template writes the beginning of conversation {_shown(conversation)} otherwise when "
            "more follows, so its answers cannot be told apart; use --loss-on all, or a template that marks "
            "them by {% generation %}"
        )
    return len(before), len(after)


def _masked(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Spans:
    mask = _ids(
        tokenizer, conversation, len(conversation.messages), return_assistant_tokens_mask=True
    )
    edges = [
        i
        for i in range(len(mask) + 1)
        if bool(i and mask[i - 1]) != bool(i < len(mask) and mask[i])
    ]
    if not edges:
        raise DataError(
            f"the chat template marks nothing of conversation {_shown(conversation)} as an answer; use "
            "--loss-on all"
        )
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _joined(spans: Sequence[tuple[int, int]]) -> Spans:
    return tuple(span for span in spans if span[0] < span[1])


def _shown(conversation: Conversation) -> str:
    """Returns how a conversation begins, for an error."""
    first = next((m["content"] for m in conversation.messages if m.get("content")), "")
    return repr(first[:40])
