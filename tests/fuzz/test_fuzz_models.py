"""Damaged model folders: the right result, or one line that names the folder; and no half-written result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import WORDS, Given, Run, call
from fuzzing import assert_one_line, changed, damaged, examples, outcome
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from task_files import TEMPLATE

from tezo_ds.config import TezoConfig
from tezo_ds.export.merged import is_complete
from tezo_ds.models.loading import load_model
from tezo_ds.run.folder import CONFIG
from tezo_ds.settings import Settings
from tezo_ds.training.session import open_session

pytest_plugins = ("cli_fixtures",)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


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
    """Weights that do not fit are refused, where transformers would make up what is missing and go on."""
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
    given: Given, model: Path, plain: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(given, model, "model.safetensors", b"\x00" * 99)
    copy, out = Path(shutil.copytree(plain.path, tmp_path / "copy")), tmp_path / "out"
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
