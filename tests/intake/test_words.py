"""Words of labels that the tokenizer knows not, or not apart: refused before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from command_line import call, flags
from task_files import TEMPLATE, WORDS, reviews, write
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tezo_ds.errors import DataError
from tezo_ds.intake.words import check_words
from tezo_ds.tasks import Example, TaskData, TaskSpec, encode

KNOWN = ["a", "film", "It", "was", "good", "bad", *map(str, range(12))]


def word_tokenizer(
    words: Sequence[str], unknown: str | None = "[UNK]", lower: bool = False
) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token a word; without `unknown` it raises on any other word."""
    names = ["[PAD]", *([unknown] if unknown else []), *words]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(names))}
    inner = Tokenizer(models.WordLevel(vocabulary, **({"unk_token": unknown} if unknown else {})))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        inner.normalizer = normalizers.Lowercase()
    given = {"unk_token": unknown} if unknown else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", **given)


def dropping_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of characters that leaves out those that it does not know, in silence."""
    inner = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate("abfilmIt wsod0123")}, merges=[])
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def task(words: dict[str, str]) -> TaskData:
    spec = TaskSpec(name="films", template=TEMPLATE, verbalizers=words)
    label = next(iter(words))
    return TaskData(spec, [Example(f"film {i} It was", label, words[label]) for i in range(6)], [])


def refusal(tokenizer: PreTrainedTokenizerBase, words: dict[str, str]) -> str:
    with pytest.raises(DataError) as caught:
        check_words(tokenizer, task(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tokenizer", "words", "named"),
    [
        (word_tokenizer(KNOWN), WORDS, "same tokens, [UNK], of the words 'terrible' and 'great'"),
        (
            word_tokenizer(KNOWN),
            {"a": "very good", "b": "good", "c": "so good"},
            "[UNK] good, of the words 'very good' and 'so good' of labels 'a' and 'c'",
        ),
        (word_tokenizer(["film", "it", "was", "good"], lower=True), {"a": "Good", "b": "good"}, "'Good' and"),
        (dropping_tokenizer(), {"neg": "bad", "pos": "xyz"}, "token of the word 'xyz' of label 'pos'"),
    ],
)  # fmt: skip
def test_words_with_equal_tokens(
    tokenizer: PreTrainedTokenizerBase, words: dict[str, str], named: str
) -> None:
    message = refusal(tokenizer, words)
    assert named in message and message.startswith("films: the tokenizer of ")
    assert "verbalizer" in message


def test_words_that_are_told_apart() -> None:
    check_words(word_tokenizer(KNOWN), task({"neg": "bad", "pos": "unknown"}))
    check_words(word_tokenizer(KNOWN), task({"neg": "good bad", "pos": "good"}))
    check_words(tiny_tokenizer(["film It was"]), task(WORDS))


def test_answers_in_free_text_may_have_equal_tokens() -> None:
    check_words(word_tokenizer(KNOWN), task({f"answer{i}": f"answer{i}" for i in range(300)}))


def test_a_tokenizer_that_raises_is_one_line() -> None:
    strict = word_tokenizer(["a", "film", "It", "was", *map(str, range(6))], unknown=None)
    message = refusal(strict, {"neg": "a", "pos": "great"})
    assert "cannot tokenise 'film 0 It was great'" in message and "[UNK]" in message
    with pytest.raises(
        DataError, match=r"cannot tokenise 'film 77' .* is it the model's tokenizer\?"
    ):
        encode(strict, [Example(f"film {i}", None, None) for i in (1, 2, 77)], 64)


@pytest.mark.parametrize("objective", ["lm", "choices"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("unknown", ["[UNK]", None])
def test_from_the_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    objective: str,
    command: str,
    unknown: str | None,
) -> None:
    tokenizer = word_tokenizer(KNOWN, unknown)
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny().config
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    given = {
        "model": tmp_path / "model", "task": write(tmp_path / "a.jsonl", reviews(12)),
        "template": TEMPLATE, "verbalizers": '{"neg": "terrible", "pos": "great"}',
        "objective": objective,
    }  # fmt: skip
    more = {"output": tmp_path / "run", "steps": 1, "batch_size": 2} if command == "train" else {}
    assert call(command, *flags({**given, **more})) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "tezo-ds" in line]
    assert len(lines) == 1 and lines[0].startswith("tezo-ds: error: ")
    assert "'terrible'" in lines[0] if unknown else "terrible" in lines[0]
