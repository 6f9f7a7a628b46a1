"""Examples as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import ConfigError, DataError, one_line
from tezo_ds.models.structure import is_masked_lm
from tezo_ds.tasks.chat import tokenised
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.formats import Conversation, Kind

_TAIL = 32  # characters of a prompt's end that can matter to how the next word is tokenised


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

    A completion follows its prompt as it is, a text or completion ends in EOS, and a conversation is what
    the chat template makes of it, see `chat.tokenised`.

    A sequence longer than `max_length` loses the beginning of its prompt (not BOS, nor any of the
    answer) and says so in `truncated`; if a completion is longer by itself, its end, which `lost` counts,
    as it does the answers in what a conversation loses, which is its beginning. Raises DataError where no
    prompt token would be left, where there is nothing to predict, or no answer for a masked model.
    """
    before, after = special_ids(tokenizer)
    end = [] if mask is None else after
    joined = [
        (e.prompt, e.answer, " ")
        for e in examples
        if e.kind is Kind.TEMPLATE and e.answer is not None
    ]
    joined += [(e.prompt, str(e.answer), "") for e in examples if e.kind is Kind.COMPLETION]
    ids = dict(zip(joined, _prompt_and_answer_ids(tokenizer, joined), strict=True))
    alone = [e.prompt for e in examples if e.answer is None and e.kind is not Kind.MESSAGES]
    texts = iter(ids_of(tokenizer, alone))
    encoded = []
    for example in examples:
        if mask is not None and (example.kind is not Kind.TEMPLATE or example.answer is None):
            raise DataError(
                f"text {example.prompt[:40]!r} has no answer for a masked model to fill in; use a task "
                "with answers, or a causal model"
            )
        if example.kind is Kind.MESSAGES:
            encoded.append(_conversation(tokenizer, example, before, max_length))
        elif example.kind is Kind.COMPLETION:
            prompt, answer = ids[example.prompt, str(example.answer), ""]
            answer = [*answer, *end_of(tokenizer, str(example.answer))]
            encoded.append(_completion(before, prompt, answer, example, max_length))
        elif example.answer is not None:
            prompt, answer = ids[example.prompt, example.answer, " "]
            whole = _fit(before, prompt, answer, example, max_length, len(answer), end)
            encoded.append(replace(whole, mask=mask))
        else:
            text, ending = next(texts), after
            if example.kind is Kind.TEXT and not after:
                ending = end_of(tokenizer, example.prompt)
            whole = _fit(before, text, ending, example, max_length, len(ending))
            if len(whole.input_ids) < 2:
                raise DataError(
                    f"text {example.prompt[:40]!r} is a single token: nothing to predict"
                )
            encoded.append(Encoded(whole.input_ids, 1, example.label, whole.truncated))
    return encoded


def end_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns what ends a text that the model is to end: EOS, unless there is none or the text has it."""
    token, number = tokenizer.eos_token, tokenizer.eos_token_id
    return [] if number is None or text.endswith(str(token)) else [int(number)]


def _completion(
    before: list[int], prompt: list[int], answer: list[int], example: Example, max_length: int
) -> Encoded:
    """Joins a prompt and its completion, which loses its end where it alone is too long."""
    room = max(1, max_length - len(before) - 1)
    kept = answer[:room]
    whole = _fit(before, prompt, kept, example, max_length, len(kept))
    return replace(
        whole,
        label_start=1 if example.everything else whole.label_start,
        lost=len(answer) - len(kept),
    )


def _conversation(
    tokenizer: PreTrainedTokenizerBase, example: Example, before: list[int], max_length: int
) -> Encoded:
    """Tokenises a conversation, which loses its beginning, but for BOS, where it is too long.

    Raises:
        DataError: none of its answers would be left.
    """
    conversation = Conversation.of_text(example.prompt)
    ids, spans = tokenised(tokenizer, conversation, example.everything)
    cut = max(0, len(ids) - max_length)
    kept = len(before) if cut and ids[: len(before)] == before else 0
    # What comes first has nothing before it to be predicted by.
    left = [(max(1, kept, start - cut), end - cut) for start, end in spans]
    left = [(start, end) for start, end in left if start < end]
    labels, remaining = (sum(end - start for start, end in part) for part in (spans, left))
    if not labels:
        raise DataError("the chat template adds no token for the answers of a conversation")
    if not remaining:
        raise DataError(
            f"max_length {max_length} leaves no answer of a conversation of {len(ids)} tokens; raise it"
        )
    shorter = ids[:kept] + ids[cut + kept :]
    return Encoded(
        shorter, left[0][0], None, cut, len(shorter), spans=tuple(left), lost=labels - remaining
    )


def candidates(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    words: Sequence[str],
    max_length: int,
    mask: int | None = None,
) -> list[list[Encoded]]:
    """Encodes each example with each of the words, or with its own candidates, as its answer, as `encode`
    does: [example][word].

    All candidates of an example see the same prompt, cut to fit the longest of them; a masked model gets
    as many masks as the candidate has tokens.
    """
    before, after = special_ids(tokenizer)
    end = [] if mask is None else after
    of_each = [example.candidates or words for example in examples]
    triples = [
        (e.prompt, word, " ") for e, own in zip(examples, of_each, strict=True) for word in own
    ]
    pairs = iter(_prompt_and_answer_ids(tokenizer, triples))
    rows = []
    for example, own in zip(examples, of_each, strict=True):
        row = [next(pairs) for _ in own]
        longest = max(len(answer) for _, answer in row)
        fits = [_fit(before, p, a, example, max_length, longest, end) for p, a in row]
        rows.append([replace(fit, mask=mask) for fit in fits])
    return rows


def whole_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int
) -> list[tuple[list[int], int]]:
    """Tokenises prompts that nothing follows, with all default special tokens; each comes with the number of
    tokens that its beginning has lost.

    Raises:
        DataError: `max_length` leaves no room for a prompt.
    """
    before, after = special_ids(tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise DataError(
            f"max_length {max_length} leaves no room for a prompt beside {len(before) + len(after)} special "
            "tokens; raise it"
        )
    cuts = [(ids, max(0, len(ids) - room)) for ids in ids_of(tokenizer, list(prompts))]
    return [([*before, *ids[cut:], *after], cut) for ids, cut in cuts]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """Returns the ids of prompts that answers are to follow: special tokens before them, none behind."""
    before, _ = special_ids(tokenizer)
    return [[*before, *ids] for ids in ids_of(tokenizer, prompts)]


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, words: Sequence[str]
) -> list[list[int]]:
    """Returns the token ids of each word as an answer to the prompt, whose end alone is looked at."""
    pairs = [(prompt[-_TAIL:], word, " ") for word in words]
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
    pairs = _prompt_and_answer_ids(
        tokenizer, [(tail, word, " ") for word in words for tail in tails]
    )
    found = []
    for i in range(len(words)):
        answers = [answer for _, answer in pairs[i * len(tails) : (i + 1) * len(tails)]]
        if len(answers[0]) != 1 or any(answer != answers[0] for answer in answers):
            return None
        found.append(answers[0][0])
    return found if len(set(found)) == len(words) else None


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


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Returns token ids without special tokens. `verbose` is off, as `_fit` deals with length."""
    if not texts:
        return []
    try:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # tokenizers' own have no common base
        if len(texts) > 1:  # one of them is at fault: name it
            return [ids for text in texts for ids in ids_of(tokenizer, [text])]
        raise DataError(
            f"{type(tokenizer).__name__} cannot tokenise {texts[0][:80]!r} ({one_line(error)}); "
            "is it the model's tokenizer?"
        ) from None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the ids that the tokenizer puts before and after a text by default."""
    (bare,) = ids_of(tokenizer, ["a"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise DataError(f"{type(tokenizer).__name__} cannot tokenise 'a'; is it the model's tokenizer?")


def _prompt_and_answer_ids(
    tokenizer: PreTrainedTokenizerBase, triples: Sequence[tuple[str, str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Returns ids of a prompt and its answer, tokenised as one text and split where the prompt's own ids end.

    One text, because the model meets it so, and because some tokenizers give a text's first word
    another token than the same word after a space. If the end of a prompt merges with its answer,
    the merged token is the answer's.

    Args:
        tokenizer: the tokenizer.
        triples: prompt, answer and what stands between them.
    """
    prompts = sorted({prompt for prompt, _, _ in triples})
    alone = dict(zip(prompts, ids_of(tokenizer, prompts), strict=True))
    parted = []
    wholes = ids_of(
        tokenizer, [f"{prompt}{between}{answer}" for prompt, answer, between in triples]
    )
    for (prompt, _, _), whole in zip(triples, wholes, strict=True):
        start = 0
        while start < min(len(alone[prompt]), len(whole)) and alone[prompt][start] == whole[start]:
            start += 1
        parted.append((whole[:start], whole[start:]))
    return parted
