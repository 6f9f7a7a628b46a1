"""Tasks from files, folders and the hub: what is read, left out, and split off. No network."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from task_files import TEMPLATE, WORDS, prompts, reviews, write

from tezo_ds.tasks import BUILTIN_TASKS, Example, TaskSpec, load_task

pytest_plugins = ("offline",)
pytestmark = pytest.mark.usefixtures("no_network")


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


def test_builtin_specs() -> None:
    labels = {name: set(spec.verbalizers or ()) for name, spec in BUILTIN_TASKS.items()}
    assert labels == {
        "trec": {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"},
        "rotten-tomatoes": {"neg", "pos"},
        "sst2": {"negative", "positive"},
        "boolq": {"True", "False"},
        "rte": {"entailment", "not_entailment"},
        "cb": {"entailment", "contradiction", "neutral"},
        "sst5": {"very negative", "negative", "neutral", "positive", "very positive"},
        "snli": {"entailment", "contradiction", "neutral"},
        "mnli": {"entailment", "contradiction", "neutral"},
        "qnli": {"entailment", "not_entailment"},
        "wic": {"True", "False"},
        "wsc": {"True", "False"},
        "multirc": {"True", "False"},
        "copa": set(),  # answers of each example's own
        "record": set(),
        "squad": set(),
        "drop": set(),
    }
    assert BUILTIN_TASKS["cb"].columns == ["premise", "hypothesis"]
    spec = TaskSpec(name="x", template="{{{a b}}} {a b} {c.d}")
    assert spec.columns == ["a b", "c.d"]
    assert spec.fill({"a b": "{1}", "c.d": "2"}) == "{{1}} {1} 2"
