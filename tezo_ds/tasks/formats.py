"""Formats of training files, told by their columns, as TRL has them: texts, prompts with completions,
conversations, instructions."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tezo_ds.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT = {"human": "user", "gpt": "assistant", "function_response": "tool"}  # roles in its words


class Kind(str, Enum):
    """What an example is: a filled template with a label's word or none, a text, a prompt with its
    completion, or a conversation."""

    TEMPLATE = "template"
    TEXT = "text"
    COMPLETION = "completion"
    MESSAGES = "messages"


@dataclass(frozen=True)
class Format:
    """Columns of one format.

    Attributes:
        kind: what its examples are.
        columns: what it needs, in order: the text's column, prompt's and completion's, or the messages'.
        context: column that is put behind an instruction, where there is one and it is filled.
    """

    kind: Kind
    columns: tuple[str, ...]
    context: str | None = None

    def told(self) -> str:
        """Returns a phrase for the user."""
        names = " and ".join(repr(column) for column in self.columns)
        what = {
            Kind.TEXT: "texts",
            Kind.COMPLETION: "prompts with completions",
            Kind.MESSAGES: "conversations",
        }
        more = f", {self.context!r} behind the former where it is filled" if self.context else ""
        return f"{what[self.kind]} of column{'s' * (len(self.columns) > 1)} {names}{more}"


KNOWN = "text; prompt and completion; messages; instruction (and input) and output"


def format_of(
    columns: Collection[str], text: str | None = None, prompt: str | None = None,
    completion: str | None = None, messages: str | None = None,
) -> Format | None:  # fmt: skip
    """Returns the format of a file with these columns; None where it is none that is known.

    Args:
        columns: names that the file has.
        text, prompt, completion, messages: names of columns that the user gave, which decide.
    """
    if messages is not None:
        return Format(Kind.MESSAGES, (messages,))
    if prompt is not None or completion is not None:
        return Format(Kind.COMPLETION, (prompt or "prompt", completion or "completion"))
    if text is not None:
        return Format(Kind.TEXT, (text,))
    for name in ("messages", "conversations"):
        if name in columns:
            return Format(Kind.MESSAGES, (name,))
    if {"prompt", "completion"} <= set(columns):
        return Format(Kind.COMPLETION, ("prompt", "completion"))
    if {"instruction", "output"} <= set(columns):
        context = "input" if "input" in columns else None
        return Format(Kind.COMPLETION, ("instruction", "output"), context)
    return Format(Kind.TEXT, ("text",)) if "text" in columns else None


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, kept as JSON so that equal ones are equal.

    Attributes:
        messages: dicts with a role, and content or tool calls.
        asked: how many of the first messages are the prompt, none of which is trained on; None: the
            assistant's turns train, wherever they are.
        tools: JSON schemas of functions that the template shows.
    """

    messages: list[dict[str, Any]]
    asked: int | None = None
    tools: list[Any] | None = None

    def to_text(self) -> str:
        """Returns JSON that `of_text` reads."""
        return json.dumps([self.messages, self.asked, self.tools], ensure_ascii=False, default=str)

    @classmethod
    def of_text(cls, text: str) -> Conversation:
        """Returns what `to_text` wrote."""
        return cls(*json.loads(text))


def is_conversation(value: Any) -> bool:
    """Returns whether a cell holds messages rather than text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Returns the messages of a cell, content of several parts of text joined.

    Args:
        value: list of dicts with role and content, or of ShareGPT's from and value.
        where: file, row and column, for errors.

    Raises:
        DataError: in one line, what is wrong with which message.
    """
    if not is_conversation(value) or not value:
        raise DataError(f"{where}: is no list of messages, each with a role and content")
    return [_message(one, f"{where}, message {number}") for number, one in enumerate(value, 1)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: is a {type(value).__name__}, not an object with a role and content"
        )
    found = {name: part for name, part in value.items() if part is not None}
    if "role" not in found and "from" in found:  # ShareGPT's words
        found = {
            "role": _SHAREGPT.get(str(found["from"]), str(found["from"])),
            "content": found.get("value"),
        }
    role = found.get("role")
    if role is None:
        raise DataError(f"{where}: has no role; give it one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is not known; it is one of {', '.join(ROLES)}")
    content = found.get("content")
    if content is None and not (found.get("tool_calls") or found.get("function_call")):
        raise DataError(f"{where}: has no content; fill it in or remove the message")
    if content is not None:
        found["content"] = _content(content, where)
    if (
        role == "assistant"
        and content is not None
        and not found["content"].strip()
        and len(found) == 2
    ):
        raise DataError(f"{where}: an empty answer; fill it in or remove the message")
    return found


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return _sound(content, where)
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content is a {type(content).__name__}, not text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: content of type {kind!r}; only text can be trained on")
        parts.append(_sound(part["text"], where))
    return "".join(parts)


def _sound(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair; write the character") from None
    return text


def with_context(instruction: str, context: str) -> str:
    """Returns the prompt of an instruction: itself, its input behind an empty line, and an empty line before
    the answer."""
    return f"{instruction}\n\n{context}\n\n" if context else f"{instruction}\n\n"
