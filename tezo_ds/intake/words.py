"""Check of a task's words against the tokenizer: each has tokens, and no two have the same."""

from __future__ import annotations

from itertools import chain, islice

from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import DataError
from tezo_ds.tasks import TaskData, answer_tokens

_PROMPTS = 4  # after which the words are looked at: what precedes a word may change its tokens


def check_words(tokenizer: PreTrainedTokenizerBase, task: TaskData) -> None:
    """Raises DataError if the tokenizer cannot tell a task's words apart: nothing could be learnt of them.

    A task of free text is not asked: nobody picks among its answers.
    """
    spec = task.spec
    if not spec.verbalizers or spec.is_free_text:
        return
    for example in islice(chain(task.train, task.test), _PROMPTS):
        labels: dict[tuple[int, ...], str] = {}
        tokens = answer_tokens(tokenizer, example.prompt, list(spec.verbalizers.values()))
        for (label, word), ids in zip(spec.verbalizers.items(), map(tuple, tokens), strict=True):
            if not str(tokenizer.decode(list(ids))).strip():  # none, or of the space alone
                raise DataError(
                    f"{spec.name}: {_name(tokenizer)} makes no token of the word {word!r} of label "
                    f"{label!r}; give another word as verbalizer, or take the model's own tokenizer"
                )
            if ids in labels:
                other = labels[ids]
                raise DataError(
                    f"{spec.name}: {_name(tokenizer)} makes the same tokens, {_shown(tokenizer, ids)}, of "
                    f"the words {spec.verbalizers[other]!r} and {word!r} of labels {other!r} and {label!r}; "
                    "give other words as verbalizers, or take the model's own tokenizer"
                )
            labels[ids] = label


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__}"


def _shown(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return " ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
