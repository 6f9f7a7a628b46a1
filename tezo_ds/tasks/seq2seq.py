"""Examples for encoder-decoder models: prompts for the encoder, answers for the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import ConfigError, DataError
from tezo_ds.losses.targets import decoder_inputs
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.tasks.encoding import end_of, ids_of, special_ids, whole_prompts
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.formats import Kind


class EncoderDecoder:
    """Encoder of examples for a model whose encoder reads the prompt and whose decoder gives the answer.

    The encoder gets a prompt with the tokenizer's special tokens. The decoder begins with the model's own
    first token, and with what the tokenizer puts before a text (BART's <s>); its labels are the answer's
    tokens, by themselves, and what ends a text.

    Args:
        tokenizer: the model's.
        start: tokens that the decoder begins with, see `decoder_start`.
        ends: whether what ends a text is a label, too; not where label words alone count in the loss.
    """

    note: str | None = None

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, start: tuple[int, ...], ends: bool = True
    ) -> None:
        self._tokenizer, self.start, self._ends = tokenizer, start, ends

    def encode(self, examples: Sequence[Example], max_length: int) -> list[Encoded]:
        """Tokenises each prompt, and its answer.

        A prompt longer than `max_length` loses its beginning, an answer its end, as `Encoded` counts.

        Raises:
            DataError: an example has no prompt and answer apart, or there is no room for a prompt.
        """
        for example in examples:
            refuse_undivided(example)
        answers = [str(example.answer) for example in examples]
        return self._joined(examples, answers, max_length)

    def candidates(
        self, examples: Sequence[Example], words: Sequence[str], max_length: int
    ) -> list[list[Encoded]]:
        """Encodes each example with each of the words, or with its own candidates, as its answer:
        [example][word]."""
        of_each = [example.candidates or tuple(words) for example in examples]
        pairs = [(e, word) for e, own in zip(examples, of_each, strict=True) for word in own]
        found = iter(self._joined([e for e, _ in pairs], [word for _, word in pairs], max_length))
        return [[next(found) for _ in own] for own in of_each]

    def tokens(self, words: Sequence[str], prompts: Sequence[str]) -> list[int] | None:
        """Returns the token of each word as an answer; None where one token does not tell words apart."""
        found = ids_of(self._tokenizer, list(words))
        firsts = [ids[0] for ids in found if len(ids) == 1]
        return firsts if len(set(firsts)) == len(words) else None

    def prompts(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Returns what the encoder is given for texts, to generate answers to them."""
        return [ids for ids, _ in whole_prompts(self._tokenizer, texts, max_length)]

    def _joined(
        self, examples: Sequence[Example], answers: Sequence[str], max_length: int
    ) -> list[Encoded]:
        unlike = list(dict.fromkeys(example.prompt for example in examples))
        prompts = dict(zip(unlike, whole_prompts(self._tokenizer, unlike, max_length), strict=True))
        room = max(1, max_length - len(self.start) + 1)
        encoded = []
        tokens = ids_of(self._tokenizer, list(answers))
        for example, text, answer in zip(examples, answers, tokens, strict=True):
            (ids, cut), whole = prompts[example.prompt], [*answer, *self._end(text)]
            if not whole:
                raise DataError(
                    f"answer {text[:40]!r} has no tokens; give another, or drop its row"
                )
            encoded.append(
                Encoded(
                    ids, len(ids), example.label, cut, lost=max(0, len(whole) - room),
                    answer=tuple(whole[:room]), start=self.start,
                )
            )  # fmt: skip
        return encoded

    def _end(self, answer: str) -> list[int]:
        if not self._ends:
            return []
        _, after = special_ids(self._tokenizer)
        return after or end_of(self._tokenizer, answer)


def refuse_undivided(example: Example) -> None:
    """Raises DataError for an example that is no prompt with an answer."""
    if example.kind is Kind.MESSAGES or example.answer is None:
        what = "a conversation" if example.kind is Kind.MESSAGES else "text"
        raise DataError(
            f"{what} {example.prompt[:40]!r} is no prompt with an answer, as an encoder-decoder model takes; "
            "use a template with labels, prompt and completion, or instruction and output, or a causal model"
        )
    if example.everything:
        raise DataError(
            "--loss-on all: an encoder-decoder model's prompt is its encoder's, which predicts nothing; "
            "leave it out"
        )


def decoder_start(module: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the tokens that a model's decoder begins with: its own, and the tokenizer's before a text.

    Raises:
        ConfigError: the model does not say how its decoder begins, or by the labels' own tokens.
    """
    pad = getattr(module.config, "pad_token_id", None)
    one, two, three = [token for token in range(4) if token != pad][:3]
    shifted = decoder_inputs(module, torch.tensor([[one, two], [one, three]]))
    (first, second), (other, _) = shifted.tolist()
    if second != one or other != first:
        raise ConfigError(
            f"{type(module).__name__}: its decoder begins with the last of its labels (a language's code), "
            "which the answers of tasks are without; use a loop of your own, with such labels"
        )
    before, _ = special_ids(tokenizer)
    return (first, *before)
