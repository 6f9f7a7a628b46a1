"""The benchmark of quantised bases, at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parts.methods.data import read_splits
from task_files import WORDS, reviews, write
from tiny_tokenizer import save_tiny_llama

import tezo_ds

pytest.importorskip("torchao")
import quantised

TASK = "rotten-tomatoes"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Makes the command line of a tiny model, and its data."""
    folder = tmp_path_factory.mktemp("benchmark")
    rows = reviews(60)
    (folder / TASK).mkdir()
    for name, part in (("train", slice(0, 40)), ("valid", slice(40, 48)), ("test", slice(48, 60))):
        write(folder / TASK / f"{name}.jsonl", rows[part])
    texts = [f"{row['text']} It was {word}" for row in rows for word in WORDS.values()]
    save_tiny_llama(folder / "model", texts)
    given = ["--model", str(folder / "model"), "--cache", str(folder), "--forms", "int8"]
    given += ["--queries", "3", "--examples", "2", "--rank", "2", "--dtypes", "float32"]
    return [*given, "--steps", "2", "--seeds", "1", "--test-examples", "6", "--learns", "*v_proj*"]


@pytest.fixture(autouse=True)
def own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(task: str, cache: Path, *counts: int) -> object:
        return read_splits(TASK, cache / TASK, *counts)

    monkeypatch.setattr(quantised, "load_splits", load)


def test_the_tables(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    quantised.main([*words, "--parts", "slopes", "rounding", "learning"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    plain, int8, tezo, mezo, learnt, packed = cells
    assert plain[2].startswith("0.0") and int8[2].startswith("0.0")  # of κ, in float32
    assert not int8[3].startswith("0.00%")
    assert (tezo[:2], mezo[:2]) == (["int8", "TeZO"], ["int8", "MeZO"])
    assert learnt[0] == "plain float32" and packed[0] == "int8" and learnt[2].endswith("%")


def test_what_rounds_away_and_what_does_not(words: list[str]) -> None:
    args = quantised.arguments().parse_args(words)
    found = {}
    for rho in (1e-6, 1.0):
        args.rho = rho
        model = quantised.loaded(args, "int8", "float32")
        grid = quantised.steps_of(model)
        plain = quantised.unpacked(model, torch.float32)
        name = "model.layers.0.mlp.down_proj.weight"
        unit, most = grid[name]
        integers = dict(plain.named_parameters())[name] / unit
        assert most == 127 and (integers - integers.round()).abs().max() < 1e-3
        engine = tezo_ds.initialize(plain, quantised.fields_of(args))
        rounded = quantised.Rounded(plain, engine, grid, quantised.batch_of(args, 2), rho)
        with torch.no_grad():
            found[rho] = (*rounded.slopes("MeZO", 1), rounded)
    away, (_, _, there) = found[1e-6], found[1.0]
    assert away[2].changed == 0 and away[0].abs().max() == 0 < away[1].abs().max()
    assert there.changed > 0.9 * there.total
