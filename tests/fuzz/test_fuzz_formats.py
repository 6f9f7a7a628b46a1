"""Random and damaged conversations and completions: tokens with something to train on, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fuzzing import VALUES, damaged, examples, outcome
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from tezo_ds.tasks import encode, load_task
from tezo_ds.tasks.encoded import labels_of

TOKENIZER = tiny_tokenizer(["Who are you? I am Ann."])
TOKENIZER.chat_template = CHAT_TEMPLATE
CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Ann."}]
ROWS = [
    {"messages": CHAT, "tools": None}, {"messages": [*CHAT, *CHAT], "tools": []},
    {"messages": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]},
]  # fmt: skip
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
KEYS = st.sampled_from(["role", "content", "from", "value", "tool_calls", "type", "text"])
WORDS = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "text"])
MESSAGES = st.lists(st.dictionaries(KEYS, WORDS | VALUES, max_size=3) | VALUES, max_size=3)
COLUMNS = st.sampled_from(
    ["messages", "prompt", "completion", "text", "tools", "instruction", "output", "input"]
)


def read(path: Path) -> None:
    """Reads and tokenises examples, and checks that each has labels within it."""
    task = load_task(str(path), test_fraction=0.0)
    for encoded in encode(TOKENIZER, task.train, 64):
        assert labels_of(encoded) and len(encoded.input_ids) <= 64
        spans = encoded.label_spans
        assert all(0 <= start < end <= len(encoded.input_ids) for start, end in spans)


@examples(60)
@given(damaged(LINES))
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    # What is only wrong once it is tokenised names the conversation.
    outcome(lambda: read(path), str(path), "conversation", "text ")


@examples(80)
@given(st.lists(st.dictionaries(COLUMNS, MESSAGES | VALUES, max_size=4), min_size=1, max_size=3))
def test_random_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome(lambda: read(path), str(path), "conversation", "text ")
