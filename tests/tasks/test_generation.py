"""Generated answers: greedy by hand, whatever else is in the batch; their metrics."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

import tezo_ds
from tezo_ds.errors import ConfigError, DataError
from tezo_ds.tasks import Example
from tezo_ds.tasks.formats import Conversation, Kind
from tezo_ds.tasks.generation import Generated, Generator, asked
from tezo_ds.tasks.metrics import metric_of

TEXTS = ["one two three four five six", "a film It was great"]
PROMPTS = ["one", "a film It was", "three four five"]
NEW = 6


def parts() -> tuple[tezo_ds.Engine, PreTrainedTokenizerFast]:
    tokenizer = tiny_tokenizer(TEXTS)
    model = tiny("llama", tied=False)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    engine = tezo_ds.initialize(model.eval(), {"rank": 2, "seed": 3})
    noise = torch.randn(engine.space.numel, generator=torch.manual_seed(1))
    engine.method.coefficients.copy_(0.3 * noise)
    return engine, tokenizer


def greedy(engine: tezo_ds.Engine, ids: list[int], new: int) -> list[int]:
    """Continues a prompt by hand, without a cache and without padding."""
    ids = list(ids)
    with engine.applied():
        for _ in range(new):
            logits = engine.sharding.module(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == 1:
                break
    return ids


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_those_of_each_prompt_alone(batch_size: int) -> None:
    engine, tokenizer = parts()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    found = Generator(engine, tokenizer, 2, NEW, (), batch_size)(prompts)
    expected = [
        tokenizer.decode(greedy(engine, ids, NEW)[len(ids) :], skip_special_tokens=True)
        for ids in prompts
    ]
    assert found == expected and any(found)
    assert len(set(found)) > 1, "or the prompts would not matter"
    engine.method.coefficients.zero_()
    assert Generator(engine, tokenizer, 2, NEW)(prompts) != found, "the coefficients ride along"


def test_an_answer_ends_before_a_stop_string() -> None:
    engine, tokenizer = parts()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    (whole, *_) = Generator(engine, tokenizer, 2, NEW)(prompts)
    stop = whole[2:4]
    (cut, *_) = Generator(engine, tokenizer, 2, NEW, (stop,))(prompts)
    assert cut == whole[: whole.index(stop)]


def test_a_model_that_cannot_generate_is_refused() -> None:
    engine = tezo_ds.initialize(tiny("roberta"), {"rank": 2})
    with pytest.raises(
        ConfigError, match="RobertaForMaskedLM cannot generate text; leave --metric"
    ):
        Generator(engine, tiny_tokenizer(TEXTS), 2, NEW)


def test_prompts_and_answers_of_examples() -> None:
    _, tokenizer = parts()
    tokenizer.chat_template = CHAT_TEMPLATE
    chat = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": " four "},
    ]  # fmt: skip
    examples = [
        Example("a film It was", "pos", "great"), Example("one", None, " two ", Kind.COMPLETION),
        Example(Conversation(chat).to_text(), None, None, Kind.MESSAGES),
    ]  # fmt: skip
    prompts, right = asked(tokenizer, examples, 128, 8)
    assert right == ["great", "two", "four"]
    assert [tokenizer.decode(ids) for ids in prompts] == [
        "<s>a film It was", "<s>one", "<|user|>one</s><|assistant|>two</s><|user|>three</s><|assistant|>",
    ]  # fmt: skip
    (short, *_), _ = asked(tokenizer, examples, 11, 8)
    assert short == prompts[0][-3:]
    with pytest.raises(DataError, match="--max-new-tokens 8 leaves no room"):
        asked(tokenizer, examples, 8, 8)
    with pytest.raises(DataError, match="has no answer to compare with; leave --metric out"):
        asked(tokenizer, [Example("one", None, None, Kind.TEXT)], 64, 8)
    with pytest.raises(DataError, match="has no answer to compare with"):
        asked(
            tokenizer, [Example(Conversation(chat[:1]).to_text(), None, None, Kind.MESSAGES)], 64, 8
        )


@pytest.mark.parametrize(
    ("name", "said", "right", "expected"),
    [
        ("exact", "The poet!", "a poet", 1.0),
        ("exact", "poet one", "poet", 0.0),
        ("f1", "the old poet", "poet", 2 / 3),
        ("f1", "none", "poet", 0.0),
        ("f1", "the", "a", 1.0),
        (r"regex:\d+", "is it 3? no, 12.", "12", 1.0),
        (r"regex:(\d+) apples", "3 apples", "33 apples", 0.0),
        (r"regex:\d", "none", "none", 0.0),
    ],
)
def test_metrics(name: str, said: str, right: str, expected: float) -> None:
    assert metric_of(name)([said], [right]) == pytest.approx(expected)
    both = metric_of(name)([said, said], [right, said if name != r"regex:\d" else right])
    assert both >= expected / 2


def test_a_users_metric_and_what_is_no_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def ours(said, right):\n    return sum(map(len, said)) / len(right)\n"
    (tmp_path / "users_metric.py").write_text(
        text + "def fails(said, right):\n    raise KeyError('x')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("users_metric", tmp_path / "users_metric.py"):
        assert metric_of(f"{module}:ours")(["ab", "abcd"], ["", ""]) == 3.0
    with pytest.raises(ConfigError, match="users_metric:fails: raised KeyError"):
        metric_of("users_metric:fails")(["a"], ["a"])
    for name, words in (
        ("bleu", "--metric bleu: is not known; name exact, f1, rouge-l, regex:PATTERN"),
        ("regex:(", r"--metric regex:\(: is no regular expression"),
        (
            "users_metric:none",
            "--metric users_metric:none: .*users_metric.py has no 'none'; its functions: ours",
        ),
        ("no_module:f", "--metric no_module:f: there is no module 'no_module'"),
        ("none.py:f", "--metric none.py:f: there is no file none.py"),
    ):
        with pytest.raises(ConfigError, match=words):
            metric_of(name)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(ConfigError, match="needs the package rouge-score; pip install rouge-score"):
        metric_of("rouge-l")


def test_a_metric_is_over_all_prompts() -> None:
    engine, tokenizer = parts()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    generator = Generator(engine, tokenizer, 2, NEW)
    answers = generator(prompts)
    right = [answers[0], "no", answers[2]]
    value, made = Generated(metric_of("exact"), generator, prompts, right)()
    assert made == answers and value == pytest.approx(2 / 3)
