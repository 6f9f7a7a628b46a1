"""Rows that stay on disk: the same examples in the same order, splits, errors, and token ids."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from task_files import TEMPLATE, WORDS, Rows, reviews, write
from tiny_tokenizer import tiny_tokenizer

from tezo_ds.errors import DataError
from tezo_ds.tasks import encode, load_task
from tezo_ds.tasks.baselines import majority_accuracy
from tezo_ds.tasks.data import TaskData
from tezo_ds.tasks.lazy import LazyEncoded, LazyExamples, pick
from tezo_ds.tasks.posing import OneSequence
from tezo_ds.tasks.sources import Hub

NAMED: dict[str, Any] = {"template": TEMPLATE, "verbalizers": WORDS}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keeps what `datasets` caches in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield tmp_path / "cache"


def both(source: str | Path, **options: Any) -> tuple[TaskData, TaskData]:
    """Returns a task in memory and streamed, after comparing the two."""
    plain = load_task(str(source), **options)
    lazy = load_task(str(source), **options, streaming=True)
    assert isinstance(lazy.train, LazyExamples) and len(lazy.train) == len(plain.train)
    assert list(lazy.train) == plain.train and lazy.train[-1] == plain.train[-1]
    assert (lazy.test, lazy.validation) == (plain.test, plain.validation)
    assert (lazy.spec, lazy.duplicates, lazy.leaked) == (plain.spec, plain.duplicates, plain.leaked)
    assert lazy.note == plain.note
    assert majority_accuracy(lazy.train, lazy.test) == majority_accuracy(plain.train, plain.test)
    return plain, lazy


def chats(n: int) -> Rows:
    """Rows of conversations with tools and keys that differ, which pyarrow would make equal."""
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "say", "arguments": {"what": "2024-05-01"}}}
    return [
        {
            "messages": [
                {"role": "user", "content": f"ask {i}"},
                {"role": "assistant", "tool_calls": [call if i % 2 else other]},
                {"role": "tool", "content": "2024-05-01"},
                {"role": "assistant", "content": f"tell {i}"},
            ],
            **({"tools": [{"name": "add"}]} if i > 9 else {}),
        }
        for i in range(n)
    ]


FORMATS: dict[str, Rows] = {
    "text": [{"text": f"on 2024-05-{i % 17:02}\u2028\x85 it\r\nwas {i % 17}"} for i in range(40)],
    "completions": [{"prompt": f"p{i % 25}", "completion": f"0{i}"} for i in range(40)],
    "messages": chats(30),
    "asked": [
        {"prompt": [{"role": "user", "content": f"{i}"}],
         "completion": [{"role": "assistant", "content": "x"}]}
        for i in range(20)
    ],
    "instruction": [
        {"instruction": f"do {i}", "input": "" if i % 3 else f"with {i}", "output": f"done {i}"}
        for i in range(30)
    ],
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"loss_on": "all", "test_fraction": 0.0},
    "bounded": {"train_examples": 5, "test_examples": 3, "validation_examples": 4, "seed": 3},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_examples_are_those_without_streaming(kind: str, options: str, tmp_path: Path) -> None:
    both(write(tmp_path / "a.jsonl", FORMATS[kind]), **OPTIONS[options])


def test_test_and_validation_files_and_templates(tmp_path: Path) -> None:
    rows = [*reviews(40), *reviews(3)]
    data = write(tmp_path / "a.jsonl", rows)
    test = write(tmp_path / "t.jsonl", [*rows[:9], rows[8]])
    valid = write(tmp_path / "v.jsonl", [*rows[6:14], {"text": "new", "label": "neg"}])
    _, lazy = both(data, test_data=test, validation_data=valid, validation_examples=5, **NAMED)
    assert lazy.leaked and lazy.duplicates and len(lazy.validation) == 5
    _, lazy = both(data, template=TEMPLATE)  # labels are words
    assert lazy.spec.verbalizers == {"neg": "neg", "pos": "pos"}
    both(data, template=TEMPLATE, completion_field="label", test_data=test)
    same = [{"text": f"{i}", "label": "a", "own": ["a", "b"]} for i in range(20)]
    both(write(tmp_path / "own.jsonl", same), template=TEMPLATE, choices_field="own")


def test_files_of_every_kind(tmp_path: Path) -> None:
    rows = [{"text": f'01 {i}, "NA"\nend', "label": ("neg", "pos")[i % 2]} for i in range(20)]
    lines = "".join(json.dumps(row) + ("\r\n" if i % 3 else "\n\n") for i, row in enumerate(rows))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + lines.encode())
    quoted = [f'"{r["text"].replace(chr(34), chr(34) * 2)}",{r["label"]}' for r in rows]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *quoted, ""]))
    (tmp_path / "b.csv").write_text(
        "sep=;\n,text;label\n".replace(",text", "text") + "a;neg\n01;pos\n"
    )
    (tmp_path / "a.tsv").write_text("text\tlabel\tmore\n01\tneg\nNA\tpos\n1.0\tpos\tx\n")
    features = Features(text=Value("string"), label=ClassLabel(names=["neg", "pos"]))
    data = Dataset.from_dict(
        {"text": [r["text"] for r in rows], "label": [i % 2 for i in range(20)]}, features=features
    )
    data.to_parquet(str(tmp_path / "a.parquet"))
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        for suffix, compress in packed.items() if name != "a.parquet" else ():
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(compress((tmp_path / name).read_bytes()))
            both(path, test_fraction=0.2, **NAMED)
        plain, _ = both(tmp_path / name, test_fraction=0.2, **NAMED)
        assert len(plain.train) + len(plain.test) == 20, name
    for name in ("b.csv", "a.tsv"):
        both(tmp_path / name, test_fraction=0.0, **NAMED)
    DatasetDict(train=data, test=data.select([0, 1])).save_to_disk(str(tmp_path / "saved"))
    both(tmp_path / "saved", **NAMED)


def test_several_files_folders_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl", reviews(20))
    write(tmp_path / "test.jsonl", reviews(4))
    write(tmp_path / "validation.jsonl", reviews(8))
    both(tmp_path, hub=Hub(validation_split="validation"), **NAMED)
    write(tmp_path / "more.jsonl", [{"text": "m", "label": "pos", "odd": [1]}])
    _, lazy = both(tmp_path / "*.jsonl", test_fraction=0.3, **NAMED)
    assert isinstance(lazy.train, LazyExamples)
    assert lazy.train.at(0).startswith(f"{tmp_path}/") and ", row " in lazy.train.at(0)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, split, **__: Dataset.from_list(reviews(20 if split == "train" else 5)),
    )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "test"])
    both("org/films", **NAMED)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": ""}\n', r"a\.jsonl, row 2, column 'text': missing"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\nnull\n', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.jsonl", "  \n", r"a\.jsonl: the file is empty"),
        ("a.json", '[{"text": "a"}]', r"a\.json: is one JSON array, .* write it as lines"),
        ("a.csv", "text\n", r"a\.csv: the file has no rows"),
        ("a.csv", "text,b\nx,y\nx,y,z\n", r"a\.csv: cannot be read \(.*line 3"),
        ("a.csv", "text,b\nx,y,z\n", r"a\.csv, line 2: the row has 3 fields, the header 2"),
        ("a.parquet.gz", "", r"a\.parquet\.gz: is a packed Parquet file; unpack it, or leave"),
        ("a.parquet", "PAR1", r"a\.parquet: cannot be read"),
        ("a.jsonl.gz", "no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.xml", "", r"a\.xml: not a \.jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    name: str, content: str | bytes, words: str, tmp_path: Path
) -> None:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=words) as found:
        load_task(str(tmp_path / name), streaming=True)
    assert "\n" not in str(found.value)


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    both(write(path, reviews(12)), **NAMED)
    both(write(path, reviews(14)), **NAMED)


def test_what_cannot_stream_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", reviews(20))
    with pytest.raises(DataError, match="shots chooses among the examples of a label; leave it or"):
        load_task(data, shots=2, streaming=True, **NAMED)
    many = write(tmp_path / "b.jsonl", [{"text": f"{i}", "label": f"{i}"} for i in range(300)])
    with pytest.raises(DataError, match="has above 256 different labels, too many for streaming"):
        load_task(many, template=TEMPLATE, streaming=True)
    row = {"premise": "a", "question": "cause", "choice1": "B", "choice2": "C", "label": 0}
    copa = write(tmp_path / "c.jsonl", [row])
    with pytest.raises(DataError, match="rows of copa are changed as they are read; leave stream"):
        load_task("copa", data=copa, streaming=True)


def test_token_ids_are_those_without_streaming_and_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"p{i} " * (i % 5 + 1), "completion": f"c{i}" * (9 if i % 7 else 2)}
        for i in range(30)
    ]
    plain, lazy = both(write(tmp_path / "a.jsonl", rows))
    tokenizer = tiny_tokenizer([row["prompt"] for row in rows])
    assert isinstance(lazy.train, LazyExamples)
    expected = encode(tokenizer, plain.train, 12)
    found = LazyEncoded(lazy.train, tokenizer, OneSequence(tokenizer, None), 12)
    assert (
        pick(found, [3, 0, 3]) == pick(expected, [3, 0, 3])
        and found[-1 + len(found)] == expected[-1]
    )
    assert list(found) == expected
    assert any(e.truncated for e in found) and any(e.lost for e in found)
    monkeypatch.setattr("tezo_ds.tasks.lazy.KEPT", 4)
    assert found.pick(range(9)) == expected[:9] and len(found._kept) == 4
    few = LazyEncoded(
        lazy.train, tokenizer, OneSequence(tokenizer, None), 12, rows=max(expected[0].input_ids)
    )
    where = lazy.train.at(0)
    with pytest.raises(DataError, match=rf"{where}: has token .* the model's embedding has"):
        few.pick([0])
    with pytest.raises(DataError, match=rf"{where}: max_length 2 leaves no room"):
        LazyEncoded(lazy.train, tokenizer, OneSequence(tokenizer, None), 2).pick([0, 1])
