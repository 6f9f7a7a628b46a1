"""Tasks: loading and its errors, encoding, batches. No network, no downloaded model."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from tezo_ds.errors import DataError
from tezo_ds.tasks import (
    BUILTIN_TASKS,
    Encoded,
    Example,
    TaskSpec,
    batch_indices,
    candidates,
    collate,
    encode,
    first_tokens,
    load_task,
    rounds,
    shard_range,
    truncations,
)

Rows = list[dict[str, Any]]
TEMPLATE = "{text} It was"
WORDS = {"neg": "terrible", "pos": "great"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("this test must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reviews(n: int) -> Rows:
    return [{"text": f"film {i}", "label": ("neg", "pos")[i % 2]} for i in range(n)]


def prompts(examples: list[Example]) -> list[str]:
    return [e.prompt for e in examples]


# ---- loading


def test_a_file_becomes_prompts_labels_and_words(tmp_path: Path) -> None:
    path = write(tmp_path / "films.jsonl", reviews(3))
    data = load_task(path, template=TEMPLATE, verbalizers=WORDS, test_fraction=0)
    assert data.train == [
        Example("film 0 It was", "neg", "terrible"),
        Example("film 1 It was", "pos", "great"),
        Example("film 2 It was", "neg", "terrible"),
    ]
    assert data.test == []
    assert data.spec.name == "films"


def test_json_array_and_csv_read_like_jsonl(tmp_path: Path) -> None:
    rows = reviews(4)
    expected = load_task(write(tmp_path / "a.jsonl", rows), template=TEMPLATE, test_fraction=0)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows)
    )
    for name in ("a.json", "a.csv"):
        data = load_task(str(tmp_path / name), template=TEMPLATE, test_fraction=0)
        assert data.train == expected.train


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    """Hazard: pandas reads 01 as 1 and NA as null; a byte-order mark joins the first name."""
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,label\nNA,01\n"a, ""b""\nc",NA\n', encoding="utf-8")
    data = load_task(str(path), template=TEMPLATE, test_fraction=0)
    assert data.train == [
        Example("NA It was", "01", "01"),
        Example('a, "b"\nc It was', "NA", "NA"),
    ]


def test_numbers_and_truth_values_are_labels(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    words = {0: "terrible", 1: "great"}
    data = load_task(
        write(tmp_path / "a.jsonl", rows), template=TEMPLATE, verbalizers=words, test_fraction=0
    )
    assert [(e.label, e.answer) for e in data.train] == [("0", "terrible"), ("1", "great")]
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    data = load_task(write(tmp_path / "b.jsonl", rows), template=TEMPLATE, test_fraction=0)
    assert [e.answer for e in data.train] == ["True", "False"]


def test_without_a_label_column_it_is_a_language_model_task(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "  once upon"}, {"text": "a time"}])
    data = load_task(path, template="{text}", test_fraction=0)
    assert data.spec.verbalizers is None
    assert data.train == [Example("  once upon", None, None), Example("a time", None, None)]


def test_a_template_that_shows_the_label_is_a_language_model_task(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", reviews(2))
    data = load_task(path, template="{text}: {label}", test_fraction=0)
    assert data.train == [Example("film 0: neg", None, None), Example("film 1: pos", None, None)]


def test_builtin_task_from_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "Who ?", "label": "HUM"}])
    (tmp_path / "test.csv").write_text("text,label\nWhere ?,LOC\n")
    data = load_task("trec", data=str(tmp_path))
    kinds = "(abbreviation, description, thing, person, place or number)"
    assert data.train == [Example(f"Question: Who ?\nAnswer type {kinds}:", "HUM", "person")]
    assert data.test == [Example(f"Question: Where ?\nAnswer type {kinds}:", "LOC", "place")]


def test_a_builtin_can_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"t": "bad ", "y": 0}, {"t": "good", "y": 1}])
    data = load_task(
        "sst2",
        data=path,
        template="Review: {t}\nVerdict:",
        verbalizers={0: "no", 1: "yes"},
        label_field="y",
        test_fraction=0,
    )
    assert data.train[0] == Example("Review: bad\nVerdict:", "0", "no")
    assert data.spec.hub_id == "nyu-mll/glue"


def test_hub_class_numbers_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "coarse_label": datasets.ClassLabel(names=["ABBR", "HUM"]),
        }
    )
    calls = []

    def fake(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        rows = {"text": [f"Who is in {kwargs['split']} ?"], "coarse_label": [1]}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = load_task("trec")
    assert [e.label for e in data.train + data.test] == ["HUM", "HUM"]
    assert "Who is in test ?" in data.test[0].prompt
    wanted = {"split": "train", "revision": "refs/convert/parquet"}
    assert calls[0] == (("CogComp/trec", None), wanted)


def test_quick_edits_are_seen(tmp_path: Path) -> None:
    """Hazard: a cache that goes by the file's time stamp brings back the old rows."""
    path = tmp_path / "a.jsonl"
    for text in ("old", "new"):
        write(path, [{"text": text}])
        data = load_task(str(path), template="{text}", test_fraction=0)
        assert prompts(data.train) == [text]


def test_odd_file_names(tmp_path: Path) -> None:
    """Hazard: `datasets` takes file names for glob patterns."""
    path = write(tmp_path / "a[1]*?.jsonl", [{"text": "x"}])
    assert prompts(load_task(path, template="{text}", test_fraction=0).train) == ["x"]


def test_ranks_may_load_at_once(tmp_path: Path) -> None:
    import datasets

    path = write(tmp_path / "a.jsonl", reviews(50))
    verbosity = datasets.logging.get_verbosity()
    with ThreadPoolExecutor(4) as pool:  # threads stand in for the processes
        loaded = list(pool.map(lambda _: load_task(path, template=TEMPLATE), range(4)))
    datasets.logging.set_verbosity(verbosity)  # which threads, unlike processes, share
    assert all(data == loaded[0] for data in loaded)


def test_progress_bars_are_as_before(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import datasets

    path = write(tmp_path / "a.jsonl", reviews(4))
    datasets.enable_progress_bars()
    load_task(path, template=TEMPLATE, test_fraction=0)
    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    load_task(path, template=TEMPLATE, test_fraction=0)
    assert datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    assert capfd.readouterr() == ("", "")


# ---- duplicates and splits


def test_duplicates_go_before_the_split_and_are_counted(tmp_path: Path) -> None:
    rows = reviews(40) * 3
    data = load_task(write(tmp_path / "a.jsonl", rows), template=TEMPLATE, test_fraction=0.5)
    together = prompts(data.train) + prompts(data.test)
    assert sorted(together) == sorted(f"film {i} It was" for i in range(40))
    assert data.duplicates == 80
    assert data.leaked == 0


def test_test_prompts_are_removed_from_train(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", reviews(10))
    test = write(tmp_path / "test.jsonl", reviews(4))
    data = load_task(train, test_data=test, template=TEMPLATE)
    assert prompts(data.train) == [f"film {i} It was" for i in range(4, 10)]
    assert prompts(data.test) == [f"film {i} It was" for i in range(4)]
    assert data.leaked == 4


def test_split_depends_on_seed_and_prompt_only(tmp_path: Path) -> None:
    rows = reviews(400)
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    first = load_task(write(tmp_path / "a.jsonl", rows), template=TEMPLATE)
    other_order = load_task(write(tmp_path / "b.jsonl", shuffled), template=TEMPLATE)
    fewer_rows = load_task(write(tmp_path / "c.jsonl", rows[:200]), template=TEMPLATE)
    other_seed = load_task(str(tmp_path / "a.jsonl"), template=TEMPLATE, seed=1)
    held_out = set(prompts(first.test))
    assert set(prompts(other_order.test)) == held_out
    assert set(prompts(fewer_rows.test)) < held_out
    assert set(prompts(other_seed.test)) != held_out
    assert 60 <= len(held_out) <= 100  # 80 expected, standard deviation 8
    assert prompts(first.test)[:3] == GOLDEN_TEST_PROMPTS


GOLDEN_TEST_PROMPTS = ["film 7 It was", "film 12 It was", "film 16 It was"]


def test_subsets_are_seeded_nested_and_in_row_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", reviews(100))

    def subset(count: int, seed: int = 0) -> list[str]:
        data = load_task(path, template=TEMPLATE, train_examples=count, test_examples=3, seed=seed)
        assert len(data.test) == 3
        return prompts(data.train)

    ten, twenty = subset(10), subset(20)
    assert len(ten) == 10
    assert len(twenty) == 20
    assert set(ten) < set(twenty)
    assert ten == [p for p in twenty if p in ten]
    assert ten != [f"film {i} It was" for i in range(10)]
    assert set(subset(10, seed=1)) != set(ten)
    everything = load_task(path, template=TEMPLATE)
    assert subset(10_000) == prompts(everything.train)


# ---- errors: the whole message, so that each says what, where and what to do


def failure(task: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_task(task, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", "", ": the file is empty"),
        ("blank.jsonl", " \n\n", ": the file is empty"),
        ("header.csv", "text,label\n", ": the file has a header and no rows"),
        ("array.json", "[]", ": the file is empty"),
        (
            "broken.jsonl",
            '{"text": "a"}\n{"text": "b"\n',
            ", line 2: not valid JSON: Expecting ',' delimiter",
        ),
        ("list.jsonl", '{"text": "a"}\n[1]\n', ", line 2: not a JSON object"),
        (
            "broken.json",
            '[{"text": "a"},\n{"text": }]',
            ", line 2: not valid JSON: Expecting value",
        ),
        (
            "latin.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            ", line 2: not UTF-8; save the file as UTF-8",
        ),
        ("twice.csv", "text,text\na,b\n", ", line 1: column 'text' is there twice; rename one"),
        (
            "commas.csv",
            "text,label\na,b,x\nc,d,y\n",
            ": the first row has 3 fields, the header 2; quote fields with commas",
        ),
        (
            "null.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n',
            ", row 2, column 'label': missing or empty; fill it in or remove the row",
        ),
        (
            "short.csv",
            "text,label\na,x\nb\n",
            ", row 2, column 'label': missing or empty; fill it in or remove the row",
        ),
        (
            "spaces.csv",
            "text,label\na,x\nb, \n",
            ", row 2, column 'label': missing or empty; fill it in or remove the row",
        ),
        (
            "notext.jsonl",
            '{"text": "a"}\n{"text": ""}\n',
            ", row 2, column 'text': missing or empty; fill it in or remove the row",
        ),
        (
            "nested.jsonl",
            '{"text": ["a"]}\n',
            ", row 1, column 'text': holds a list; only text and numbers can be used",
        ),
        (
            "other.csv",
            "body,label\na,x\nb,y\n",
            ": the template names column 'text'; there are: body, label",
        ),
    ],
)
def test_bad_files(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: str | bytes,
    expected: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert failure(str(path), template="{text}") == f"{path}{expected}"
    assert capfd.readouterr() == ("", "")  # the message is the only thing that is said


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    known = "trec, rotten-tomatoes, sst2, boolq, rte, cb"
    expected = f"unknown task 'imdb'; known: {known}, or a .jsonl, .json, .csv file"
    assert failure("imdb") == expected
    missing = str(tmp_path / "no.jsonl")
    assert failure(missing, template="{text}") == f"{missing}: no such file or folder"
    assert failure("trec", data=missing) == f"{missing}: no such file or folder"
    expected = f"{tmp_path}: no train.jsonl, train.json or train.csv in this folder"
    assert failure("trec", data=str(tmp_path)) == expected
    path = write(tmp_path / "train.jsonl", reviews(2))
    assert failure(path, template="{text}", test_data=missing) == f"{missing}: no such file"
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    expected = f"{tmp_path}: train.jsonl, train.csv are all there; keep one of them"
    assert failure("trec", data=str(tmp_path)) == expected
    text = tmp_path / "a.txt"
    text.write_text("x")
    assert failure("trec", data=str(text)) == f"{text}: not a .jsonl, .json, .csv file"


def test_labels_without_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*reviews(2), {"text": "meh", "label": "mixed"}])
    expected = f"{path}, row 3: label 'mixed' has no word; known: neg, pos"
    assert failure(path, template=TEMPLATE, verbalizers=WORDS) == expected
    same = write(tmp_path / "same.jsonl", reviews(1))
    expected = f"{same}: all labels in column 'label' are 'neg'; a task needs two"
    assert failure(same, template=TEMPLATE) == expected
    expected = f"{path}: label_field names column 'stars'; there are: text, label"
    assert failure(path, template=TEMPLATE, verbalizers=WORDS, label_field="stars") == expected
    assert failure(path, template=TEMPLATE, label_field="stars") == expected
    test = write(tmp_path / "test.jsonl", [{"text": "a"}])
    expected = f"{test}: label_field names column 'label'; there are: text"
    assert failure(path, template=TEMPLATE, test_data=test) == expected


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", reviews(3))
    test = write(tmp_path / "b.jsonl", reviews(5))
    expected = f"{path}: every prompt is also in {test}"
    assert failure(path, template=TEMPLATE, test_data=test) == expected
    expected = (
        f"{path}: 3 prompts split into 3 for training and 0 for test;"
        " change test_fraction (1e-09) or pass test_data"
    )
    assert failure(path, template=TEMPLATE, test_fraction=1e-9) == expected


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", reviews(4))
    expected = f"{path}: a task from a file needs a template, such as '{{text}} It was'"
    assert failure(path) == expected
    expected = f"data is given, but the task is itself a file ({path}); drop one of them"
    assert failure(path, template=TEMPLATE, data=path) == expected
    expected = "test_data is given for task 'trec' without data; pass both"
    assert failure("trec", test_data=path) == expected
    expected = "test_fraction is 1; it must be at least 0 and below 1"
    assert failure(path, template=TEMPLATE, test_fraction=1) == expected
    expected = "train_examples is 0; it must be at least 1"
    assert failure(path, template=TEMPLATE, train_examples=0) == expected


@pytest.mark.parametrize(
    ("template", "verbalizers", "expected"),
    [
        ("{text", WORDS, "template: template '{text': expected '}' before end of string"),
        ("{}", WORDS, "template: template '{}': only plain {column} fields can be used"),
        (
            "{text!r}",
            WORDS,
            "template: template '{text!r}': only plain {column} fields can be used",
        ),
        ("text", WORDS, "template: template 'text' names no column; write one as {column}"),
        (
            "{text} ",
            WORDS,
            "task: the template ends in whitespace; the answer follows after one space",
        ),
        ("{text} {label}", WORDS, "task: the template shows the label column 'label'"),
        (
            "{text}",
            {"pos": "good"},
            "verbalizers: verbalizers need at least two labels, got ['pos']",
        ),
        ("{text}", {}, "verbalizers: verbalizers need at least two labels, got []"),
        (
            "{text}",
            {"neg": "ok", "pos": "ok"},
            "verbalizers: labels 'neg' and 'pos' share the word 'ok'",
        ),
        (
            "{text}",
            {"neg": " bad", "pos": "ok"},
            "verbalizers: verbalizer ' bad' of label 'neg' is blank or padded",
        ),
        ("{text}", {"neg": 0, "pos": "ok"}, "verbalizers.neg: Input should be a valid string"),
    ],
)
def test_malformed_specs(
    tmp_path: Path, template: str, verbalizers: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", reviews(4))
    message = failure(path, template=template, verbalizers=verbalizers)
    assert message == f"{path}: {expected}"


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        # The error is said once, by us: datasets' own log is silent meanwhile.
        assert datasets.logging.get_verbosity() == datasets.logging.CRITICAL
        raise ConnectionError("no route\nto host")

    verbosity = datasets.logging.get_verbosity()
    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert failure("boolq") == (
        "cannot reach google/boolq on the Hugging Face hub (ConnectionError: no route);"
        " pass --data FOLDER, a folder with train.jsonl and test.jsonl"
    )
    assert datasets.logging.get_verbosity() == verbosity < datasets.logging.CRITICAL


def test_builtin_specs() -> None:
    labels = {name: set(spec.verbalizers or ()) for name, spec in BUILTIN_TASKS.items()}
    assert labels == {
        "trec": {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"},
        "rotten-tomatoes": {"neg", "pos"},
        "sst2": {"negative", "positive"},
        "boolq": {"True", "False"},
        "rte": {"entailment", "not_entailment"},
        "cb": {"entailment", "contradiction", "neutral"},
    }
    assert BUILTIN_TASKS["cb"].columns == ["premise", "hypothesis"]
    spec = TaskSpec(name="x", template="{{{a b}}} {a b} {c.d}")
    assert spec.columns == ["a b", "c.d"]
    assert spec.fill({"a b": "{1}", "c.d": "2"}) == "{{1}} {1} 2"


# ---- encoding

FILM = Example("a film It was", "pos", "great")
CORPUS = (
    ["a film It was great"] * 9 + ["a film It was terrible"] * 9 + ["a film It was greater"] * 9
)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_answer_follows_the_prompt(bos: bool, eos: bool) -> None:
    tokenizer = tiny_tokenizer(CORPUS, bos=bos, eos=eos)
    (encoded,) = encode(tokenizer, [FILM], max_length=64)
    ids = encoded.input_ids
    assert ids[:1] == [0] if bos else ids[0] != 0
    assert 1 not in ids  # no </s> between prompt and answer, nor after it
    assert tokenizer.decode(ids[bos : encoded.label_start]) == "a film It was"
    assert tokenizer.decode(ids[encoded.label_start :]) == " great"
    assert (encoded.label, encoded.truncated) == ("pos", 0)


def test_language_model_text_trains_all_but_the_first_token() -> None:
    tokenizer = tiny_tokenizer(CORPUS, bos=True, eos=True)
    (encoded,) = encode(tokenizer, [Example("a film It", None, None)], max_length=64)
    assert encoded.input_ids == tokenizer("a film It")["input_ids"]
    assert encoded.input_ids[0] == 0
    assert encoded.input_ids[-1] == 1
    assert (encoded.label_start, encoded.label) == (1, None)


def test_mixed_examples_keep_their_order() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    lm = Example("It was terrible", None, None)
    mixed = encode(tokenizer, [lm, FILM, lm, FILM], max_length=64)
    alone = [encode(tokenizer, [e], max_length=64)[0] for e in (lm, FILM, lm, FILM)]
    assert mixed == alone
    assert encode(tokenizer, [], max_length=64) == []


def test_truncation_keeps_bos_the_prompts_end_and_the_answer() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    (whole,) = encode(tokenizer, [FILM], max_length=64)
    assert len(whole.input_ids) == 6  # <s> a film It was | great
    (cut,) = encode(tokenizer, [FILM], max_length=4)
    assert cut.input_ids == whole.input_ids[:1] + whole.input_ids[3:]
    assert (cut.label_start, cut.truncated) == (3, 2)
    (fits,) = encode(tokenizer, [FILM], max_length=6)
    assert fits == whole
    assert truncations([whole, cut, cut]) == 2
    with pytest.raises(DataError) as caught:
        encode(tokenizer, [FILM], max_length=2)
    expected = (
        "max_length 2 leaves no room for a prompt beside 1 special and 1 answer tokens; raise it"
    )
    assert str(caught.value) == expected


def test_truncated_language_model_text() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    ids = tokenizer("a film It was great")["input_ids"]
    (cut,) = encode(tokenizer, [Example("a film It was great", None, None)], max_length=3)
    assert cut == Encoded([0, *ids[-2:]], 1, None, 3)
    bare = tiny_tokenizer(CORPUS, bos=False)
    with pytest.raises(DataError, match="^text 'a' is a single token: nothing to predict$"):
        encode(bare, [Example("a", None, None)], max_length=8)


def test_candidates_share_the_prompt_even_when_cut() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    words = ["great", "terrible indeed"]
    ((short, long),) = candidates(tokenizer, [FILM], words, max_length=64)
    assert tokenizer.decode(short.input_ids[short.label_start :]) == " great"
    assert tokenizer.decode(long.input_ids[long.label_start :]) == " terrible indeed"
    assert short == encode(tokenizer, [FILM], max_length=64)[0]
    tight = len(long.input_ids) - 2
    ((short_cut, long_cut),) = candidates(tokenizer, [FILM], words, max_length=tight)
    assert (
        short_cut.input_ids[: short_cut.label_start] == long_cut.input_ids[: long_cut.label_start]
    )
    assert short_cut.truncated == long_cut.truncated == 2
    assert len(long_cut.input_ids) == tight


def test_first_tokens() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    found = first_tokens(tokenizer, ["great", "terrible"], ["a film It was"])
    assert found is not None
    assert [tokenizer.decode([i]) for i in found] == [" great", " terrible"]
    (encoded,) = encode(tokenizer, [FILM], max_length=64)
    assert encoded.input_ids[encoded.label_start :] == [found[0]]
    assert first_tokens(tokenizer, ["great", "unheard"], ["a film It was"]) is None
    assert first_tokens(tokenizer, ["great", "great"], ["a film It was"]) is None


class MergingTokenizer:
    """One token a word, but `: no` is one token: the answer's form depends on what precedes it."""

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        def ids(text: str) -> list[int]:
            return [sum(map(ord, w)) for w in text.replace(": no", " :no").split()]

        return {"input_ids": ids(texts) if isinstance(texts, str) else [ids(t) for t in texts]}


def test_prompts_end_that_merges_with_the_answer() -> None:
    tokenizer: Any = MergingTokenizer()
    (encoded,) = encode(tokenizer, [Example("is it so :", "n", "no")], max_length=9)
    assert encoded.input_ids == tokenizer("is it so : no")["input_ids"]
    assert encoded.label_start == 3  # the merged token is the answer's
    assert first_tokens(tokenizer, ["yes", "no"], ["is it so ?"]) is not None
    assert first_tokens(tokenizer, ["yes", "no"], ["is it so ?", "is it so :"]) is None


def test_collate_pads_on_the_right() -> None:
    batch = [Encoded([5, 6, 7], 2, "a"), Encoded([8, 9], 1, "b")]
    out = collate(batch, pad_id=2, multiple=4)
    assert {t.dtype for t in out.values()} == {torch.int64}
    assert out["input_ids"].tolist() == [[5, 6, 7, 2], [8, 9, 2, 2]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert out["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, -100, -100]]
    assert collate(batch, pad_id=2)["input_ids"].shape == (2, 3)


def test_a_pad_id_that_is_also_a_token_keeps_its_label() -> None:
    """Hazard: many models pad with EOS, so that `labels == pad` is no way to find the padding."""
    out = collate([Encoded([5, 2, 2], 1, "a"), Encoded([5], 1, "b")], pad_id=2)
    assert out["labels"].tolist() == [[-100, 2, 2], [-100, -100, -100]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collate_of_nothing_takes_the_filler() -> None:
    out = collate([], pad_id=2, filler=Encoded([5, 6], 1, "a"))
    assert out["input_ids"].tolist() == [[5, 6]]
    assert out["attention_mask"].tolist() == [[1, 1]]
    assert out["labels"].tolist() == [[-100, -100]]
    with pytest.raises(ValueError, match="no filler"):
        collate([], pad_id=2)


# ---- batches


def sequence(n: int, batch_size: int, world_size: int, steps: int, seed: int = 0) -> list[int]:
    return [
        i
        for step in range(steps)
        for rank in range(world_size)
        for i in batch_indices(n, batch_size, step, seed, rank, world_size)
    ]


@pytest.mark.parametrize("n", [37, 16, 5])  # more than, as many as, fewer than a global batch
def test_the_order_of_examples_does_not_depend_on_the_world(n: int) -> None:
    expected = sequence(n, batch_size=16, world_size=1, steps=7)
    assert sequence(n, batch_size=8, world_size=2, steps=7) == expected
    assert sequence(n, batch_size=4, world_size=4, steps=7) == expected
    for start in range(0, len(expected) - n + 1, n):  # each epoch has each example once
        assert sorted(expected[start : start + n]) == list(range(n))


def test_order_is_shuffled_seeded_and_the_same_for_ever() -> None:
    first = sequence(10, batch_size=10, world_size=1, steps=2)
    assert first[:10] != first[10:]
    assert first != sequence(10, batch_size=10, world_size=1, steps=2, seed=1)
    assert first == GOLDEN_ORDER
    assert batch_indices(10, 4, step=3, seed=0, rank=1, world_size=2) == sequence(10, 4, 2, 4)[-4:]


GOLDEN_ORDER = [5, 0, 7, 9, 4, 1, 2, 8, 6, 3, 3, 8, 4, 2, 0, 6, 7, 9, 5, 1]


def test_order_is_uniform() -> None:
    firsts = Counter(batch_indices(4, 4, step, 0, 0, 1)[0] for step in range(400))
    assert all(70 <= firsts[i] <= 130 for i in range(4))  # 100 expected, standard deviation 9


@pytest.mark.parametrize(("n", "world_size"), [(10, 4), (3, 4), (0, 2), (8, 1)])
def test_shard_ranges_cover_each_example_once(n: int, world_size: int) -> None:
    shares = [shard_range(n, rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rounds_is_what_the_largest_share_needs() -> None:
    assert rounds(10, batch_size=2, world_size=4) == 2  # shares of 2, 3, 2, 3
    assert rounds(8, batch_size=2, world_size=4) == 1
    assert rounds(3, batch_size=2, world_size=4) == 1
    assert rounds(0, batch_size=2, world_size=4) == 0
    for n in range(1, 40):
        largest = max(len(shard_range(n, rank, 3)) for rank in range(3))
        assert rounds(n, 4, 3) == -(-largest // 4)


def test_senseless_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 0 examples; at least 1 needed"):
        batch_indices(0, 4, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        batch_indices(8, 4, 0, 0, 2, 2)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        batch_indices(8, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        rounds(8, 0, 1)
