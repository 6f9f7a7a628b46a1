"""Random and damaged data files, templates and words: the right result, or one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import WORDS
from fuzzing import TEXTS, VALUES, damaged, examples, outcome
from hypothesis import example, given
from hypothesis import strategies as st
from task_files import TEMPLATE

from tezo_ds.cli.options import settings_from
from tezo_ds.tasks import load_task

ROWS = [{"text": f"film {i}", "label": list(WORDS)[i % 3], "n": i} for i in range(12)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = "text,label,n\r\n" + "".join(f"{r['text']},{r['label']},{r['n']}\r\n" for r in ROWS)
CELLS = VALUES | st.sampled_from(["2020-01-01", "2020-01-01T00:00:00Z", "NA", 2**64, "x" * 200_000])
COLUMNS = st.sampled_from(["text", "label", "a\nb", ""])
ODD = [
    b"",
    b"null",
    b"\n",
    b"{}",
    b"[{}]",
    b"[]\n[]",
    b"\x1c",
    b",\n,\n",
    b'"',
    b"\x00",
    b"[" * 100_000,
]
ODD += [b"\xef\xbb\xbf" + LINES, LINES.replace(b"\n", b"\r"), LINES.replace(b"\n", b"\r\n\n")]


def read(path: Path, **options: Any) -> None:
    """Reads examples, and checks that all of them are well-formed."""
    task = load_task(str(path), **{"template": TEMPLATE, **options})
    for one in [*task.train, *task.test]:
        assert one.prompt.strip() and one.prompt.encode()
        assert (one.label is None) == (one.answer is None)
    assert task.train


@examples(60)
@given(st.sampled_from(["a.jsonl", "a.json"]), damaged(LINES) | st.sampled_from(ODD))
def test_json_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    outcome(lambda: read(tmp_path / name, verbalizers=WORDS), str(tmp_path / name))


@examples(25)
@given(damaged(TABLE.encode()) | st.sampled_from(ODD) | st.binary(max_size=20))
def test_csv_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    outcome(lambda: read(tmp_path / "a.csv", verbalizers=WORDS), str(tmp_path / "a.csv"))


@examples(60)
@given(st.lists(st.dictionaries(COLUMNS, CELLS, max_size=4), min_size=1, max_size=4))
def test_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome(lambda: read(path), str(path))


def test_a_text_that_looks_like_a_date_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "dates.jsonl"
    path.write_text("".join(json.dumps({"text": f"2024-05-0{i}"}) + "\n" for i in range(1, 9)))
    task = load_task(str(path), template=TEMPLATE)
    assert task.train[0].prompt.startswith("2024-05-0")


PLACES = st.text(st.sampled_from("{}!:[].text \n\ud800é"), max_size=9) | TEXTS
BRACES = st.sampled_from(["{text!}", "{text[0]}", "{text.x}", "{0}", "{{text}}", "{text:{n}}"])


@examples(60)
@given(
    PLACES | BRACES,
    st.none() | st.dictionaries(TEXTS | st.sampled_from(list(WORDS)), TEXTS | VALUES, max_size=3),
    st.none() | st.sampled_from(["label", "n"]) | PLACES,
)
def test_templates_and_words(tmp_path: Path, template: str, words: Any, label: str | None) -> None:
    path = tmp_path / "good.jsonl"
    path.write_bytes(LINES)
    outcome(lambda: read(path, template=template, verbalizers=words, label_field=label), str(path))


@examples(60)
@example('{"a": "x", "a": "y"}')
@example("[" * 100_000)
@example('{"a": null, "b": "y"}')
@given(PLACES | VALUES.map(json.dumps))
def test_words_as_flags(text: str) -> None:
    flags = {"model": "m", "task": "t", "verbalizers": text}
    found = outcome(lambda: settings_from(flags, {}), "--verbalizers")
    assert found is None or all(isinstance(w, str) for w in (found.verbalizers or {}).values())


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a" * 5000 + ".jsonl", "\n.jsonl", "no\x00.jsonl"):
        assert outcome(lambda name=name: read(Path(name)), "no such file") is None
