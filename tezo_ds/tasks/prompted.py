"""Examples as prompts that a model completes: token ids, and the columns that completions are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import DataError
from tezo_ds.rollouts.prompts import PROMPT
from tezo_ds.tasks.chat import opening, unanswered
from tezo_ds.tasks.encoded import Encoded, collate
from tezo_ds.tasks.encoding import prompt_ids
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.formats import Conversation, Kind

ANSWER = "answer"  # column of the right answer


@dataclass(frozen=True)
class Prompted(Encoded):
    """One prompt: the whole of `input_ids`, which has no labels.

    Attributes:
        text: the prompt as a text; a conversation as the chat template writes it.
        columns: of the example's row, and its answer.
    """

    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)


class Prompting:
    """Posing to a causal model that is to go on by itself, see `posing.Posing`.

    Args:
        tokenizer: the model's.
        most: tokens of a completion, at most.
    """

    note: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most

    def encode(self, examples: Sequence[Example], max_length: int) -> list[Encoded]:
        """Tokenises each prompt, less the beginning that leaves no room for a completion.

        Raises:
            DataError: there is no room at all.
        """
        room = max_length - self._most
        if room < 1:
            raise DataError(
                f"--max-new-tokens {self._most} leaves no room for a prompt within --max-length "
                f"{max_length}; lower the former or raise the latter"
            )
        texts = [e.prompt for e in examples if e.kind is not Kind.MESSAGES]
        ids_of_texts = iter(prompt_ids(self._tokenizer, texts))
        found: list[Encoded] = []
        for example in examples:
            text, answer = example.prompt, example.answer
            if example.kind is Kind.MESSAGES:
                ids, answer = self._of_conversation(Conversation.of_text(text))
                text = str(self._tokenizer.decode(ids))
            else:
                ids = next(ids_of_texts)
            if not ids:
                raise DataError("a prompt is empty, so there is nothing to go on from; fill it in")
            cut = max(0, len(ids) - room)
            columns = dict(example.columns or {})
            if answer is not None:
                columns.setdefault(ANSWER, answer.strip())
            kept = ids[cut:]
            found.append(Prompted(kept, len(kept), None, cut, text=text, columns=columns))
        return found

    def _of_conversation(self, conversation: Conversation) -> tuple[list[int], str | None]:
        """Returns what comes before the last answer, and that; of one that ends in a question the whole."""
        if conversation.messages[-1]["role"] != "assistant":
            return unanswered(self._tokenizer, conversation), None
        return opening(self._tokenizer, conversation)

    def candidates(
        self, examples: Sequence[Example], words: Sequence[str], max_length: int
    ) -> list[list[Encoded]]:
        """Returns none: completions are not picked from."""
        return [[] for _ in examples]

    def tokens(self, words: Sequence[str], prompts: Sequence[str]) -> list[int] | None:
        """Returns None: completions are not picked from."""
        return None

    def prompts(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Returns the ids of texts that answers are to follow, without the beginning that is too much."""
        return [ids[-max_length:] for ids in prompt_ids(self._tokenizer, list(texts))]


def collate_prompts(batch: Sequence[Encoded], pad: int, filler: Prompted) -> dict[str, Any]:
    """Returns a batch for a reward objective.

    Args:
        batch: this rank's prompts; none give one row whose mask is 0 throughout.
        pad: token that pads.
        filler: any prompt, whose columns those of all are.
    """
    rows = [row for row in batch if isinstance(row, Prompted)] or [filler]
    tensors = collate(rows, pad)
    mask = tensors["attention_mask"]
    columns = {name: [row.columns.get(name) for row in rows] for name in filler.columns}
    return {
        **columns, "input_ids": tensors["input_ids"], "attention_mask": mask if batch else 0 * mask,
        PROMPT: [row.text for row in rows],
    }  # fmt: skip
