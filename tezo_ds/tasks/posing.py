"""Posing of examples to a model of some kind: in one sequence, in an encoder and a decoder, or by classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import is_classifier, is_encoder_decoder
from tezo_ds.tasks.classes import Classes, classes_of
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.tasks.encoding import candidates, encode, first_tokens, mask_token, prompt_ids
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.seq2seq import EncoderDecoder, decoder_start
from tezo_ds.tasks.spec import TaskSpec


class Posing(Protocol):
    """What makes sequences of examples for one model.

    Attributes:
        note: what a user should know of how labels were understood, in a line.
    """

    note: str | None

    def encode(self, examples: Sequence[Example], max_length: int, /) -> list[Encoded]:
        """Tokenises each prompt with its answer or label."""

    def candidates(
        self, examples: Sequence[Example], words: Sequence[str], max_length: int, /
    ) -> list[list[Encoded]]:
        """Encodes each example with each of the words, or with its own candidates: [example][word]."""

    def tokens(self, words: Sequence[str], prompts: Sequence[str], /) -> list[int] | None:
        """Returns the place of each word's logit; None where one logit does not tell words apart."""

    def prompts(self, texts: Sequence[str], max_length: int, /) -> list[list[int]]:
        """Returns the token ids by which answers to texts are generated."""


class OneSequence:
    """Posing to a causal or masked model, see `encoding.encode`.

    Args:
        tokenizer: the model's.
        mask: token in the answer's place, see `mask_token`.
    """

    note: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask: int | None) -> None:
        self._tokenizer, self.mask = tokenizer, mask

    def encode(self, examples: Sequence[Example], max_length: int) -> list[Encoded]:
        """Tokenises each prompt with its answer."""
        return encode(self._tokenizer, examples, max_length, self.mask)

    def candidates(
        self, examples: Sequence[Example], words: Sequence[str], max_length: int
    ) -> list[list[Encoded]]:
        """Encodes each example with each of the words, or with its own candidates: [example][word]."""
        return candidates(self._tokenizer, examples, words, max_length, self.mask)

    def tokens(self, words: Sequence[str], prompts: Sequence[str]) -> list[int] | None:
        """Returns the token of each word; None where one token does not tell words apart."""
        return first_tokens(self._tokenizer, words, prompts)

    def prompts(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Returns the ids of texts that answers are to follow, without the beginning that is too much."""
        return [ids[-max_length:] for ids in prompt_ids(self._tokenizer, list(texts))]


def posing_of(
    module: Any, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec | None, words_alone: bool
) -> Posing:
    """Returns what makes sequences of a task's examples for a model.

    Args:
        module: the model.
        tokenizer: the model's.
        spec: the task; None: there are no examples, prompts alone.
        words_alone: whether label words alone count in the loss.

    Raises:
        ConfigError: the model does not say how its decoder begins, or has no mask token.
        DataError: the task's labels are not the model's classes.
    """
    if is_encoder_decoder(module):
        return EncoderDecoder(tokenizer, decoder_start(module, tokenizer), not words_alone)
    if is_classifier(module):
        if spec is None:
            raise ConfigError(
                f"{type(module).__name__} classifies and cannot generate text; take a causal or an "
                "encoder-decoder model"
            )
        return Classes(tokenizer, *classes_of(module.config, spec))
    return OneSequence(tokenizer, mask_token(module, tokenizer))
