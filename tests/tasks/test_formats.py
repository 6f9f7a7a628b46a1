"""Files of known formats, from their rows to the tokens that train: TRL's conventions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from task_files import write
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from tezo_ds.errors import DataError
from tezo_ds.tasks import Example, TaskData, collate, encode, load_task
from tezo_ds.tasks.encoded import Encoded, labels_of, losses_of_labels
from tezo_ds.tasks.formats import Kind

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Leaves what the assistant thought out of all turns but the last, as some models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'][-3:] }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "A poet."}, {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "Long ago."},
]  # fmt: skip
TEXTS = ["Who wrote it? A poet. When? Long ago. Be short.", "one two three four"]


def tokenizer_of(template: str | None = CHATML, **more: Any) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(TEXTS, **more)
    tokenizer.chat_template = template
    return tokenizer


def loaded(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> TaskData:
    return load_task(str(write(tmp_path / "rows.jsonl", rows)), test_fraction=0.0, **options)


def trained_on(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.label_spans]


@pytest.mark.parametrize(
    ("row", "options", "note", "kind"),
    [
        ({"text": "one two"}, {}, "texts of column 'text'", Kind.TEXT),
        ({"body": "one two", "label": 1}, {"text_field": "body"}, "texts of column 'body'", Kind.TEXT),
        (
            {"prompt": "one", "completion": " two"}, {},
            "prompts with completions of columns 'prompt' and 'completion'", Kind.COMPLETION,
        ),
        (
            {"q": "one", "a": "two"}, {"prompt_field": "q", "completion_field": "a"},
            "prompts with completions of columns 'q' and 'a'", Kind.COMPLETION,
        ),
        (
            {"instruction": "one", "input": "", "output": "two"}, {},
            "prompts with completions of columns 'instruction' and 'output', 'input' behind the former where "
            "it is filled", Kind.COMPLETION,
        ),
        ({"messages": CHAT}, {}, "conversations of column 'messages'", Kind.MESSAGES),
        ({"chat": CHAT}, {"messages_field": "chat"}, "conversations of column 'chat'", Kind.MESSAGES),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}, {},
            "conversations of column 'conversations'", Kind.MESSAGES,
        ),
    ],
)  # fmt: skip
def test_a_format_is_told_by_its_columns(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], note: str, kind: Kind
) -> None:
    task = loaded(tmp_path, [row], **options)
    assert task.note == note and [e.kind for e in task.train] == [kind]
    assert task.spec.verbalizers is None


def test_a_completion_follows_as_it_is_and_ends() -> None:
    tokenizer = tokenizer_of()
    one = Example("Who wrote it?", None, " A poet.", Kind.COMPLETION)
    (encoded,) = encode(tokenizer, [one], 64)
    assert encoded.input_ids == [*tokenizer("Who wrote it? A poet.")["input_ids"], 1]
    assert trained_on(tokenizer, encoded) == [" A poet.</s>"]
    (ended,) = encode(tokenizer, [Example("Who?", None, " A poet.</s>", Kind.COMPLETION)], 64)
    assert ended.input_ids.count(1) == 1, "EOS is there already"
    (whole,) = encode(tokenizer, [Example(one.prompt, None, one.answer, one.kind, True)], 64)
    assert trained_on(tokenizer, whole) == ["Who wrote it? A poet.</s>"]  # after <s>
    (text,) = encode(tokenizer, [Example("Who wrote it?", None, None, Kind.TEXT)], 64)
    assert text.input_ids == [*tokenizer("Who wrote it?")["input_ids"], 1] and text.label_start == 1


def test_instructions_and_templates_make_prompts(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": None, "output": "Hi"},
    ]
    prompts = {e.prompt for e in loaded(tmp_path, rows).train}
    assert prompts == {"Add.\n\n1 2\n\n", "Greet.\n\n"}
    task = loaded(tmp_path, rows, template="{instruction} ->", completion_field="output")
    assert {(e.prompt, e.answer) for e in task.train} == {("Add. ->", "3"), ("Greet. ->", "Hi")}


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_of_a_conversation_train(template: str) -> None:
    tokenizer = tokenizer_of(template)
    rows = [Example(json.dumps([CHAT, None, None]), None, None, Kind.MESSAGES)]
    (encoded,) = encode(tokenizer, rows, 512)
    found = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert encoded.input_ids == list(found)
    newline = "" if template is MARKED else "\n"
    assert trained_on(tokenizer, encoded) == [f"A poet.</s>{newline}", f"Long ago.</s>{newline}"]
    batch = collate(
        [encoded, encode(tokenizer, [Example("one", None, " two", Kind.COMPLETION)], 64)[0]], 2
    )
    labels = [x for x in batch["labels"][0].tolist() if x != -100]
    assert labels == labels_of(encoded) and tokenizer.decode(labels).startswith("A poet.</s>")
    assert batch["labels"][0].eq(-100).sum() == len(batch["labels"][0]) - len(labels)
    empty = collate([], 2, filler=encoded)
    assert torch.all(empty["labels"] == -100)


def test_prompts_and_completions_may_be_messages(tmp_path: Path) -> None:
    rows = [{"prompt": CHAT[:4], "completion": CHAT[4:]}]
    for loss_on, expected in (("completion", ["Long ago.</s>\n"]), ("all", None)):
        task = loaded(tmp_path, rows, loss_on=loss_on)
        tokenizer = tokenizer_of()
        (encoded,) = encode(tokenizer, task.train, 512)
        if expected is None:
            assert encoded.label_spans == ((1, len(encoded.input_ids)),)
        else:
            assert trained_on(tokenizer, encoded) == expected


def test_a_template_that_rewrites_what_came_before_is_refused() -> None:
    row = Example(json.dumps([CHAT, None, None]), None, None, Kind.MESSAGES)
    with pytest.raises(
        DataError, match=r"'Be short\.' otherwise when more follows.* --loss-on all"
    ):
        encode(tokenizer_of(FORGETFUL), [row], 512)
    everything = Example(row.prompt, None, None, Kind.MESSAGES, everything=True)
    assert len(encode(tokenizer_of(FORGETFUL), [everything], 512)[0].label_spans) == 1
    with pytest.raises(DataError, match="has no chat template for conversations"):
        encode(tokenizer_of(None), [row], 512)
    with pytest.raises(DataError, match=r"refuses conversation 'Be short.' \(.*only two"):
        encode(tokenizer_of("{{ raise_exception('only two roles') }}"), [row], 512)
    mute = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="the chat template adds no token for the answers"):
        encode(tokenizer_of(mute), [row], 512)
    silent = MARKED.replace("m['role'] == 'assistant'", "false")
    with pytest.raises(DataError, match="marks nothing of conversation"):
        encode(tokenizer_of(silent), [row], 512)


def test_what_is_too_long_loses_no_answer_without_a_word() -> None:
    tokenizer = tokenizer_of()
    row = Example(json.dumps([CHAT, None, None]), None, None, Kind.MESSAGES)
    (whole,) = encode(tokenizer, [row], 512)
    cut = len(whole.input_ids) - whole.label_spans[0][1] + 2
    (short,) = encode(tokenizer, [row], cut)
    assert short.input_ids == whole.input_ids[-cut:] and short.lost == len(labels_of(whole)) - len(
        labels_of(short)
    )
    assert losses_of_labels([whole, short]) == 1 and short.truncated > 0
    assert trained_on(tokenizer, short)[-1] == "Long ago.</s>\n"
    marked = tokenizer_of(MARKED)  # which begins with <s>
    (kept,) = encode(marked, [row], 12)
    assert kept.input_ids[0] == 0 and len(kept.input_ids) == 12
    one = Example("Who wrote it?", None, " A poet. Long ago.", Kind.COMPLETION)
    (fits,) = encode(tokenizer, [one], 64)
    answer = fits.input_ids[fits.label_start :]
    (cut_answer,) = encode(tokenizer, [one], len(answer))
    # <s>, one token of the prompt, and as much of the answer as there is room for.
    assert cut_answer.input_ids[2:] == answer[:-2] and (
        cut_answer.label_start,
        cut_answer.lost,
    ) == (2, 2)
    ends_with_user = Example(json.dumps([CHAT[:4], None, None]), None, None, Kind.MESSAGES)
    with pytest.raises(DataError, match="max_length 4 leaves no answer of a conversation of"):
        encode(tokenizer, [ends_with_user], 4)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"a": "x", "b": "y"}], {}, "columns a, b are none of the formats that are known (text; prompt and"),
        ([{"messages": "hello"}], {}, "row 1, column 'messages': is no list of messages"),
        ([{"messages": []}], {}, "row 1, column 'messages': is no list of messages"),
        ([{"messages": ["hi"]}], {}, "message 1: is a str, not an object with a role and content"),
        ([{"messages": [{"content": "hi"}]}], {}, "message 1: has no role; give it one of system,"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], {}, "message 1: role 'bot' is not known"),
        ([{"messages": [{"role": "user"}]}], {}, "message 1: has no content"),
        (
            [{"messages": [CHAT[1], {"role": "assistant", "content": " "}]}], {},
            "message 2: an empty answer; fill it in",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]}], {},
            "message 1: content of type 'image'; only text can be trained on",
        ),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}], {}, "half of a surrogate pair"),
        ([{"prompt": "x", "completion": None}], {}, "row 1, column 'completion': missing or empty"),
        ([{"prompt": "x", "completion": float("nan")}], {}, "column 'completion': missing or empty"),
        ([{"prompt": CHAT, "completion": "x"}], {}, "column 'completion': is no list of messages"),
        ([{"prompt": {"a": 1}, "completion": "x"}], {}, "column 'prompt': holds a dict; only text"),
        ([{"text": "x"}], {"prompt_field": "text"}, "names column 'completion'; there are: text"),
        ([{"text": "x"}], {"text_field": "text", "messages_field": "m"}, "do not go together"),
        ([{"text": "x"}], {"template": "{text}", "text_field": "text"}, "both say what a prompt is"),
        (
            [{"text": "x"}], {"verbalizers": {"a": "b", "c": "d"}},
            "which have no labels; leave verbalizers, label_field and choices_field out",
        ),
        ([{"q": "x", "a": "y"}], {"template": "{q", "completion_field": "a"}, "template: template '{q'"),
        ([{"messages": CHAT, "tools": "{"}], {}, "column 'tools': is no list of functions"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        loaded(tmp_path, rows, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path / "rows.jsonl") in str(caught.value)


def test_parts_of_text_are_joined_and_tools_pass_through(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "wrote it?"}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    rows = [{"messages": [{"role": "user", "content": parts}, call], "tools": '[{"name": "look"}]'}]
    template = (
        "{% if tools %}<tools>{{ tools[0]['name'] }}</tools>{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'] or m['tool_calls'][0]['function']['name'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = tokenizer_of(template)
    (encoded,) = encode(tokenizer, loaded(tmp_path, rows).train, 512)
    text = tokenizer.decode(encoded.input_ids)
    assert text == "<tools>look</tools><|user|>Who wrote it?<|assistant|>look"
    assert trained_on(tokenizer, encoded) == ["look"]


def test_prompts_may_come_again_with_other_completions(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "completion": f" {word}"} for word in ("two", "three", "two")]
    task = loaded(tmp_path, rows)
    assert len(task.train) == 2 and task.duplicates == 1
