"""Random and damaged input at every door: the right result, or one line that names the file or field; and no
half-written result. `pytest tests/test_fuzz.py --hypothesis-profile=long` looks further."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import WORDS, Given, Run, call
from fuzzing import NUMBERS, TEXTS, VALUES, assert_one_line, changed, damaged, outcome
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from task_files import TEMPLATE

from tezo_ds.card import model_card
from tezo_ds.config import TezoConfig, build, resolve
from tezo_ds.curve import draw_curve
from tezo_ds.flags import settings_from
from tezo_ds.loading import load_model
from tezo_ds.merged import is_complete
from tezo_ds.queries import queries_at
from tezo_ds.results import read_result
from tezo_ds.resuming import look
from tezo_ds.runfolder import COEFFICIENTS, CONFIG, JOURNAL, METRICS, SUMMARY, RunFolder
from tezo_ds.session import Settings, open_session, read_run
from tezo_ds.sharding import zero3
from tezo_ds.tasks import load_task

pytest_plugins = ("cli_fixtures",)

ALIKE = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", derandomize=True, **ALIKE)
settings.register_profile("long", **ALIKE)
_named = settings.get_current_profile_name() == "long"
settings.load_profile("long" if _named else "short")


def examples(count: int) -> settings:
    """So many of them; fifty times as many in the long profile."""
    return settings(max_examples=50 * count if _named else count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# The tezo block and the DeepSpeed JSON

FIELDS = sorted(TezoConfig.model_fields)
CHOICES = st.sampled_from(["auto", "lozo", "mezo-adam", "adazeta", "adaptive", "linear", "cosine"])
BLOCK = {"method": "tezo", "rank": 16, "betas": [0.9, 0.99], "include": ["*"], "rho": 1e-3}
ZERO = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 9}
DEEPSPEED = {"zero_optimization": ZERO, "bf16": {"enabled": True}}


def used(config: TezoConfig) -> TezoConfig:
    """Which survives a round trip, and has a rate and directions for any step."""
    assert build(config.model_dump(mode="json"), "again") == config
    config = config.model_copy(update={"steps_per_epoch": config.steps_per_epoch or 3})
    for step in (0, 7, 10**6):
        config.lr_at(step)
        assert queries_at(config, step) >= 1
    return config


@examples(120)
@example({"warmup_steps": 10**400, "total_steps": 10**401})
@example({"query_schedule": "adazeta", "queries_max": 3, "query_beta": 1e300})
@example({"query_schedule": "adazeta", "queries_max": 3, "query_alpha": 1e308, "query_beta": 9.0})
@given(st.dictionaries(st.sampled_from(FIELDS), NUMBERS | CHOICES | VALUES, max_size=3))
def test_blocks(block: dict[str, Any]) -> None:
    outcome(lambda: used(build(block, "here")), *block)


@examples(60)
@given(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=2))
def test_unknown_fields(block: dict[str, Any]) -> None:
    assert outcome(lambda: build(block, "here"), "unknown field", "unicode") is None


@examples(120)
@example(b"\xff{}")
@example(b'{"tezo": {"rho": NaN}}')
@example(b'{"tezo": {"rho": 1e999}}')
@example(b"[" * 100_000)
@example(b'{"tezo": {"seed": ' + b"9" * 5000 + b"}}")
@given(damaged(json.dumps({**DEEPSPEED, "tezo": BLOCK}, indent=1).encode()))
def test_deepspeed_files(folder: Path, content: bytes) -> None:
    path = folder / "ds.json"
    path.write_bytes(content)
    outcome(lambda: used(resolve(path)[0]), str(path))


@examples(60)
@given(changed(DEEPSPEED))
def test_zero_blocks(config: dict[str, Any]) -> None:
    outcome(lambda: zero3.prepare(config), "zero_optimization", "offload_param", "bf16")


def test_what_is_no_config_file(folder: Path) -> None:
    for path in (folder, folder / "none.json", folder / ("a" * 5000), folder / "line\nbreak.json"):
        assert outcome(lambda path=path: resolve(path), "cannot be read") is None
    twice = folder / "twice.json"
    twice.write_text('{"tezo": {"rank": 3, "rank": 4}}')
    assert outcome(lambda: resolve(twice), "'rank' is there twice") is None


# Data files, templates, words

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
    """Examples, all of them well-formed."""
    task = load_task(str(path), **{"template": TEMPLATE, **options})
    for one in [*task.train, *task.test]:
        assert one.prompt.strip() and one.prompt.encode()
        assert (one.label is None) == (one.answer is None)
    assert task.train


@examples(60)
@given(st.sampled_from(["a.jsonl", "a.json"]), damaged(LINES) | st.sampled_from(ODD))
def test_json_files(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    outcome(lambda: read(folder / name, verbalizers=WORDS), str(folder / name))


@examples(25)
@given(damaged(TABLE.encode()) | st.sampled_from(ODD) | st.binary(max_size=20))
def test_csv_files(folder: Path, content: bytes) -> None:
    (folder / "a.csv").write_bytes(content)
    outcome(lambda: read(folder / "a.csv", verbalizers=WORDS), str(folder / "a.csv"))


@examples(60)
@given(st.lists(st.dictionaries(COLUMNS, CELLS, max_size=4), min_size=1, max_size=4))
def test_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome(lambda: read(path), str(path))


def test_a_text_that_looks_like_a_date_is_a_text(folder: Path) -> None:
    path = folder / "dates.jsonl"
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
def test_templates_and_words(folder: Path, template: str, words: Any, label: str | None) -> None:
    path = folder / "good.jsonl"
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


def test_names_that_no_file_can_have(folder: Path) -> None:
    for name in ("a" * 5000 + ".jsonl", "\n.jsonl", "no\x00.jsonl"):
        assert outcome(lambda name=name: read(Path(name)), "no such file") is None


# Run folders

PARTS = [CONFIG, METRICS, SUMMARY, COEFFICIENTS]


@pytest.fixture(scope="module")
def others(given: Given, plain: Run, folder: Path) -> list[Path]:
    """Runs of the same model: that begins anew every few steps, with ranks of its own."""
    runs = [folder / "other", folder / "auto"]
    for run, options in zip(runs, ({"seed": 9, "refresh_every": 2}, {"rank": "auto"}), strict=True):
        assert call(*given.train(run, **options)) == 0
    return [plain.path, *runs]


def copied(run: Path, folder: Path) -> Path:
    shutil.rmtree(folder / "copy", ignore_errors=True)
    return Path(shutil.copytree(run, folder / "copy"))


def looked_at(run: Path, about: dict[str, Any]) -> None:
    """All that reads a run's small files, one after the other."""
    ways: list[Callable[[], Any]] = [
        lambda: read_result(run, read_run(run)[1]),
        lambda: model_card(run, 6, adapter=True),
        lambda: taken(run, about),
    ]
    for way in ways:
        outcome(way, str(run))


def taken(run: Path, about: dict[str, Any]) -> None:
    folder = RunFolder(run)
    try:
        look(folder, None, about)
    finally:
        folder.close()


@examples(70)
@given(st.data())
def test_a_config_with_another_field(others: list[Path], folder: Path, data: st.DataObject) -> None:
    run = data.draw(st.sampled_from(others))
    about = json.loads((run / CONFIG).read_text())
    copy = copied(run, folder)
    (copy / CONFIG).write_text(json.dumps(data.draw(changed(about))))
    looked_at(copy, about)


@examples(70)
@given(st.data())
def test_damaged_parts_of_runs(others: list[Path], folder: Path, data: st.DataObject) -> None:
    run, part = data.draw(st.sampled_from(others)), data.draw(st.sampled_from(PARTS))
    copy = copied(run, folder)
    content = data.draw(damaged((run / part).read_bytes()))
    (copy / part).write_bytes(content)
    if part == SUMMARY:
        (copy / COEFFICIENTS).unlink()  # else nobody reads it
    looked_at(copy, json.loads((run / CONFIG).read_text()))
    if part == COEFFICIENTS:
        config = read_run(copy)[1]
        found = outcome(lambda: read_result(copy, config).coefficients, str(copy))
        whole = load_file(run / part)
        assert found is None or all(torch.equal(found[name], whole[name]) for name in whole)


@examples(50)
@given(st.data())
def test_lines_of_metrics(others: list[Path], folder: Path, data: st.DataObject) -> None:
    score = {"step": 0, "test_accuracy": 0.5, "test_loss": 1.0, "test_examples": 5}
    lines = data.draw(
        st.lists(changed(score) | changed({"step": 0, "loss": 1.0}) | VALUES, max_size=3)
    )
    copy = copied(others[0], folder)
    (copy / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    looked_at(copy, json.loads((copy / CONFIG).read_text()))


def test_a_curve_of_damaged_lines(folder: Path) -> None:
    lines = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": {}}, {"step": 10**400, "loss": 1}]
    lines += [{"step": 2, "test_loss": 1.0}, {"step": 2, "test_loss": 1.0, "test_accuracy": []}]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(folder / METRICS, folder / "curve.png")
    assert (folder / "curve.png").stat().st_size


@pytest.mark.parametrize("part", [*PARTS, JOURNAL])
@pytest.mark.parametrize("what", ["folder", "empty", "gone"])
def test_no_file_at_all(others: list[Path], folder: Path, part: str, what: str) -> None:
    about = json.loads((others[0] / CONFIG).read_text())
    copy = copied(others[0], folder)
    (copy / part).unlink()
    if what == "folder":
        (copy / part).mkdir()
    elif what == "empty":
        (copy / part).touch()
    looked_at(copy, about)


@pytest.mark.parametrize("part", [CONFIG, JOURNAL, COEFFICIENTS])
def test_parts_of_another_run_are_refused(
    given: Given, others: list[Path], folder: Path, part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two runs of the same shapes: without a check they would give a result of neither."""
    out = folder / "out"
    commands: dict[str, Callable[[Path], list[object]]] = {
        "evaluate": lambda run: ["evaluate", "--run", run],
        "export": lambda run: ["export", "--run", run, "--merged", out],
        "replay": lambda run: ["replay", run, "--coefficients", folder / "a.safetensors"],
        "train": lambda run: given.train(run, steps=8),
    }
    reads = {COEFFICIENTS: ["evaluate", "export"], JOURNAL: ["export", "replay", "train"]}
    for name in reads.get(part, list(commands)):
        copy = copied(others[0], folder)
        shutil.copy(others[1] / part, copy / part)
        capfd.readouterr()
        assert call(*commands[name](copy)) == 2, name
        assert_one_line(capfd.readouterr().err[:-1], str(copy))
        assert not out.exists() and not (folder / "a.safetensors").exists()


# Model folders


@pytest.fixture
def model(given: Given, folder: Path) -> Iterator[Path]:
    yield folder / "model"
    shutil.rmtree(folder / "model", ignore_errors=True)


def opened(given: Given, model: Path) -> None:
    named = {"model": str(model), "task": str(given.data), "template": TEMPLATE}
    asked = Settings(**named, verbalizers=WORDS, test_fraction=0.4)
    open_session(asked, TezoConfig(rank=2), None)


def put(given: Given, model: Path, name: str, content: bytes | None) -> None:
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(given.model, model)
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)


@examples(25)
@given(st.data())
def test_a_model_config_with_another_field(given: Given, model: Path, data: st.DataObject) -> None:
    whole = json.loads((given.model / "config.json").read_text())
    small = {**whole, "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}
    # Sizes that are merely large are no damage, and would be taken from memory.
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"}
    damage = data.draw(changed(small).filter(lambda c: all(c.get(n) == whole[n] for n in sizes)))
    put(given, model, "config.json", json.dumps(damage).encode())
    outcome(lambda: opened(given, model), str(model))


@examples(25)
@given(st.data())
def test_damaged_model_files(given: Given, model: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in given.model.iterdir())))
    content = (given.model / name).read_bytes()
    head = content[:2000] if name.endswith("safetensors") else content
    put(given, model, name, data.draw(st.none() | damaged(head)))
    outcome(lambda: opened(given, model), str(model))


@pytest.mark.parametrize("damage", ["shape", "missing", "index", "no map", "list"])
def test_weights_that_do_not_fit(given: Given, model: Path, damage: str) -> None:
    """transformers would make up what is missing, and go on."""
    weights = load_file(given.model / "model.safetensors")
    name = min(weights)
    if damage == "shape":
        weights[name] = weights[name][:-1].clone()
    elif damage == "missing":
        del weights[name]
    put(given, model, "model.safetensors", None)
    if damage in ("shape", "missing"):
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    else:
        named = {
            "index": {"metadata": {}, "weight_map": dict.fromkeys(weights, "gone.safetensors")}
        }
        index = named.get(damage, {} if damage == "no map" else [])
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert outcome(lambda: load_model(str(model)), str(model)) is None


def test_a_run_that_is_refused_leaves_no_result(
    given: Given, model: Path, others: list[Path], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(given, model, "model.safetensors", b"\x00" * 99)
    copy, out = copied(others[0], folder), folder / "out"
    about = json.loads((copy / CONFIG).read_text())
    about["settings"]["model"] = str(model)
    (copy / CONFIG).write_text(json.dumps(about))
    broken = Given(model, given.data)
    for command in (
        broken.train(out),
        ["export", "--run", copy, "--merged", out],
        ["export", "--run", copy, "--adapter", out],
    ):
        capfd.readouterr()
        assert call(*command) == 2
        assert_one_line(capfd.readouterr().err[:-1], str(model))
        assert not out.exists() and not is_complete(out)
