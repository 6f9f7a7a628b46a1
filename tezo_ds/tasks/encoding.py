"""Examples as token ids, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import ConfigError, DataError
from tezo_ds.losses.objective import IGNORE
from tezo_ds.models.structure import is_masked_lm
from tezo_ds.tasks.data import Example
from tezo_ds.tasks.reading import one_line

_TAIL = 32  # characters of a prompt's end that can matter to how the next word is tokenised


@dataclass(frozen=True)
class Encoded:
    """One sequence of token ids; `input_ids[label_start:label_end]` are its labels, `label` is the
    example's."""

    input_ids: list[int]
    label_start: int
    label: str | None
    truncated: int = 0
    """How many tokens of the prompt's beginning were cut away; 0 for a whole prompt."""
    label_end: int | None = None
    """Where the labels end; None: with the sequence."""
    mask: int | None = None
    """The token that a masked model gets in the place of each label; None: the model gets the labels."""


def labels_of(encoded: Encoded) -> list[int]:
    """Returns a sequence's labels; the first token of all has nothing before it to be predicted by, but for
    a masked model."""
    start = encoded.label_start if encoded.mask is not None else max(1, encoded.label_start)
    return encoded.input_ids[start : encoded.label_end]


def truncations(encoded: Sequence[Encoded]) -> int:
    """Returns how many sequences lost a part of their prompt, to be reported to the user."""
    return sum(e.truncated > 0 for e in encoded)


def mask_token(module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that stands in the answer's place before a masked model; None for a causal model.

    Raises:
        ConfigError: a masked model's tokenizer has no such token.
    """
    if not is_masked_lm(module):
        return None
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            f"{type(module).__name__} is a masked model, and its tokenizer has no mask token to put in "
            "the answer's place; use the tokenizer that the model was trained with"
        )
    return int(tokenizer.mask_token_id)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    mask: int | None = None,
) -> list[Encoded]:
    """Tokenises each prompt with its answer, joined by a space; the answer's tokens are the labels.

    Special tokens that the tokenizer puts first by default (BOS) are there; nothing stands between
    prompt and answer, nor after the answer. A language-model example (answer None) is its prompt
    with all default special tokens, and all tokens but the first are labels.

    For a masked model `mask` (see `mask_token`) takes the place of each of the answer's tokens, and the
    tokenizer's special tokens follow, as such models were trained.

    A sequence longer than `max_length` loses the beginning of its prompt (not BOS, nor any of the
    answer) and says so in `truncated`. Raises DataError where no prompt token would be left, where
    a language-model text is a single token, with nothing to predict, or is for a masked model.
    """
    before, after = _special_ids(tokenizer)
    end = [] if mask is None else after
    answered = [e for e in examples if e.answer is not None]
    pairs = iter(_prompt_and_answer_ids(tokenizer, [(e.prompt, str(e.answer)) for e in answered]))
    texts = iter(_ids(tokenizer, [e.prompt for e in examples if e.answer is None]))
    encoded = []
    for example in examples:
        if example.answer is not None:
            prompt, answer = next(pairs)
            whole = _fit(before, prompt, answer, example, max_length, len(answer), end)
            encoded.append(replace(whole, mask=mask))
            continue
        if mask is not None:
            raise DataError(
                f"text {example.prompt[:40]!r} has no answer for a masked model to fill in; use a task "
                "with answers, or a causal model"
            )
        whole = _fit(before, next(texts), after, example, max_length, len(after))
        if len(whole.input_ids) < 2:
            raise DataError(f"text {example.prompt[:40]!r} is a single token: nothing to predict")
        encoded.append(Encoded(whole.input_ids, 1, example.label, whole.truncated))
    return encoded


def candidates(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    words: Sequence[str],
    max_length: int,
    mask: int | None = None,
) -> list[list[Encoded]]:
    """Encodes each example with each of the words as its answer, as `encode` does: [example][word].

    All candidates of an example see the same prompt, cut to fit the longest of them; a masked model gets
    as many masks as the candidate has tokens.
    """
    before, after = _special_ids(tokenizer)
    end = [] if mask is None else after
    pairs = _prompt_and_answer_ids(tokenizer, [(e.prompt, w) for e in examples for w in words])
    rows = []
    for i, example in enumerate(examples):
        row = pairs[i * len(words) : (i + 1) * len(words)]
        longest = max(len(answer) for _, answer in row)
        fits = [_fit(before, p, a, example, max_length, longest, end) for p, a in row]
        rows.append([replace(fit, mask=mask) for fit in fits])
    return rows


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, words: Sequence[str]
) -> list[list[int]]:
    """Returns the token ids of each word as an answer to the prompt, whose end alone is looked at."""
    pairs = [(prompt[-_TAIL:], word) for word in words]
    return [answer for _, answer in _prompt_and_answer_ids(tokenizer, pairs)]


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], prompts: Sequence[str]
) -> list[int] | None:
    """Returns the token id of each word; None where one token does not tell words apart: use `candidates`.

    One token does when, after each of the prompts, every word is a single token, the same one after all
    prompts, and no two words share one. `prompts` are real ones: what precedes a word may change
    how it is tokenised. Only their ends are looked at, so any number of them is cheap.
    """
    if not words or not prompts:
        raise ValueError("first_tokens needs at least one word and one prompt")
    tails = sorted({prompt[-_TAIL:] for prompt in prompts})
    if len(tails) > 1 and first_tokens(tokenizer, words, tails[:1]) is None:
        return None  # found at once, however many words and prompts there are
    pairs = _prompt_and_answer_ids(tokenizer, [(t, w) for w in words for t in tails])
    found = []
    for i in range(len(words)):
        answers = [answer for _, answer in pairs[i * len(tails) : (i + 1) * len(tails)]]
        if len(answers[0]) != 1 or any(answer != answers[0] for answer in answers):
            return None
        found.append(answers[0][0])
    return found if len(set(found)) == len(words) else None


def collate(
    batch: Sequence[Encoded], pad_id: int, multiple: int = 1, filler: Encoded | None = None
) -> dict[str, torch.Tensor]:
    """Pads a batch on the right to its longest sequence, rounded up to a multiple of `multiple`.

    Returns int64 tensors (B, T): input_ids, attention_mask, and labels, which are aligned with
    input_ids (the loss does the shifting) and -100 where nothing is to be predicted. In input_ids a
    masked model's mask stands where its labels are.

    A rank with nothing to do must still take part in a sharded forward: an empty batch gives one
    row of `filler` whose labels are all -100. Raises ValueError when batch and filler are missing.
    """
    rows = list(batch)
    if not rows:
        if filler is None:
            raise ValueError("collate: the batch is empty and there is no filler")
        rows = [replace(filler, label_start=len(filler.input_ids), label_end=None)]
    longest = max(len(e.input_ids) for e in rows)
    shape = (len(rows), -(-longest // multiple) * multiple)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for i, e in enumerate(rows):
        length = len(e.input_ids)
        ids = torch.tensor(e.input_ids, dtype=torch.int64)
        input_ids[i, :length] = ids
        attention_mask[i, :length] = 1
        answer = slice(e.label_start, length if e.label_end is None else e.label_end)
        labels[i, answer] = ids[answer]
        if e.mask is not None:
            input_ids[i, answer] = e.mask
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _fit(
    before: list[int],
    prompt: list[int],
    answer: list[int],
    example: Example,
    max_length: int,
    longest_answer: int,
    after: Sequence[int] = (),
) -> Encoded:
    """Joins the parts, the prompt cut from the left to leave room for `longest_answer` tokens."""
    room = max_length - len(before) - longest_answer - len(after)
    if room < 1:
        raise DataError(
            f"max_length {max_length} leaves no room for a prompt beside {len(before) + len(after)} special"
            f" and {longest_answer} answer tokens; raise it"
        )
    cut = max(0, len(prompt) - room)
    ids = before + prompt[cut:] + answer
    start, end = len(ids) - len(answer), len(ids) if after else None
    return Encoded([*ids, *after], start, example.label, cut, end)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Returns token ids without special tokens. `verbose` is off, as `_fit` deals with length."""
    if not texts:
        return []
    try:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # tokenizers' own have no common base
        if len(texts) > 1:  # one of them is at fault: name it
            return [ids for text in texts for ids in _ids(tokenizer, [text])]
        raise DataError(
            f"{type(tokenizer).__name__} cannot tokenise {texts[0][:80]!r} ({one_line(error)}); "
            "is it the model's tokenizer?"
        ) from None


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the ids that the tokenizer puts before and after a text by default."""
    (bare,) = _ids(tokenizer, ["a"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise DataError(f"{type(tokenizer).__name__} cannot tokenise 'a'; is it the model's tokenizer?")


def _prompt_and_answer_ids(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Returns ids of "prompt answer", tokenised as one text and split where the prompt's own ids end.

    One text, because the model meets it so, and because some tokenizers give a text's first word
    another token than the same word after a space. If the end of a prompt merges with its answer,
    the merged token is the answer's.
    """
    prompts = sorted({prompt for prompt, _ in pairs})
    alone = dict(zip(prompts, _ids(tokenizer, prompts), strict=True))
    parted = []
    wholes = _ids(tokenizer, [f"{prompt} {answer}" for prompt, answer in pairs])
    for (prompt, _), whole in zip(pairs, wholes, strict=True):
        start = 0
        while start < min(len(alone[prompt]), len(whole)) and alone[prompt][start] == whole[start]:
            start += 1
        parted.append((whole[:start], whole[start:]))
    return parted
