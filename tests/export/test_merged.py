"""An exported model: loaded by transformers, it is the very model that the run reached."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from command_line import Given, Run, call
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny
from torch import Tensor, nn
from trained import logits, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import tezo_ds
from tezo_ds.errors import StorageError
from tezo_ds.export import merged
from tezo_ds.export.adapter import save_adapter
from tezo_ds.export.merged import save_merged

pytest_plugins = ("cli_fixtures",)

INDEX = "model.safetensors.index.json"


def published(model: nn.Module, folder: Path) -> nn.Module:
    """Saves a model as others publish it, and loads it by from_pretrained."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    """Loads an export by from_pretrained, every name of it known and none missing."""
    found, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return found.eval()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of an export from the files where its index says they are."""
    index = json.loads((folder / INDEX).read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert {(n, file) for file in files for n in files[file]} == set(index["weight_map"].items())
    tensors = {name: tensor for file in files.values() for name, tensor in file.items()}
    assert sum(t.nbytes for t in tensors.values()) == index["metadata"]["total_size"]
    return tensors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "exclude"),
    [
        ("llama", []),
        ("opt", ["*embed_positions*"]),
        ("neox", []),
        ("roberta", ["*token_type*"]),
    ],
)
def test_reloaded_it_gives_the_logits_of_the_run_and_of_its_adapter(
    kind: str, exclude: list[str], tied: bool, tmp_path: Path
) -> None:
    base = published(tiny(kind, tied), tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    engine = trained(base, exclude)
    coefficients = engine.coefficients()
    save_merged(engine, tmp_path / "merged")
    save_adapter(engine, tmp_path / "adapter", "the base")

    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        assert tensors_in(tmp_path / "merged").keys() == set(file.keys())  # tied ones once
    found = logits(reloaded(base, tmp_path / "merged"))
    with engine.applied():
        torch.testing.assert_close(found, logits(base), rtol=0, atol=1e-5)
    adapted = PeftModel.from_pretrained(tiny(kind, tied), tmp_path / "adapter")
    torch.testing.assert_close(found, logits(adapted), rtol=0, atol=1e-5)
    assert float((found - logits(tiny(kind, tied))).abs().max()) > 0.3

    assert all(torch.equal(tensor, before[n]) for n, tensor in base.state_dict().items())
    after = engine.coefficients()
    assert all(torch.equal(after[n], part) for n, part in coefficients.items())


def test_buffers_that_models_do_not_save_are_left_out(tmp_path: Path) -> None:
    model = tiny()
    assert any("inv_freq" in name for name, _ in model.named_buffers())
    model.register_buffer("kept", torch.arange(3))
    save_merged(trained(model), tmp_path / "merged")
    tensors = tensors_in(tmp_path / "merged")
    assert not any("inv_freq" in name for name in tensors)
    assert torch.equal(tensors["kept"], torch.arange(3))


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(  # sizes as its kernel for experts wants them, in steps of 16 bytes
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, eos_token_id=2,
        initializer_range=0.1,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def test_experts_go_by_the_names_of_published_checkpoints(tmp_path: Path) -> None:
    """An export has one tensor an expert, as other programs read; transformers stacks experts while
    loading."""
    base = published(mixtral(), tmp_path / "base")
    assert "model.layers.1.mlp.experts.gate_up_proj" in base.state_dict()
    engine = trained(base)
    save_merged(engine, tmp_path / "merged")
    names = tensors_in(tmp_path / "merged").keys()
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in names
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        assert names == set(file.keys())
    found = logits(reloaded(base, tmp_path / "merged"))
    with engine.applied():
        torch.testing.assert_close(found, logits(base), rtol=0, atol=1e-5)


def test_float32_keeps_what_bfloat16_rounds_away(tmp_path: Path) -> None:
    base = tiny().to(torch.bfloat16)
    engine = trained(base)
    engine.method.coefficients.mul_(1e-3)  # updates of some 1e-5 in weights of 0.1
    folders = {dtype: tmp_path / str(dtype) for dtype in (None, torch.float32, torch.float16)}
    for dtype, folder in folders.items():
        save_merged(engine, folder, dtype=dtype)
        for tensor in tensors_in(folder).values():
            assert tensor.dtype == (dtype or torch.bfloat16)
        assert reloaded(base, folder).dtype == (dtype or torch.bfloat16)
    exact = base.double().state_dict()
    parts = engine.coefficients()
    for matrix in engine.space.matrices:
        U, V = (f.bfloat16().double() for f in tezo_ds.factors(matrix.name, matrix.shape, 3, 0))
        exact[matrix.name] = exact[matrix.name] + (U * parts[matrix.name]) @ V.t()
    written = {dtype: tensors_in(folder) for dtype, folder in folders.items()}
    for name, tensor in written[torch.float32].items():
        torch.testing.assert_close(tensor, exact[name].float(), rtol=1e-6, atol=1e-7)
        half = written[torch.float16][name]
        torch.testing.assert_close(half, tensor.half(), rtol=0, atol=0)  # rounded once

    def moved(dtype: torch.dtype | None) -> float:
        """Returns the share of weights in matrices that the update moved."""
        equal = [(written[dtype][m.name] == base.get_parameter(m.name)) for m in
                 engine.space.matrices]  # fmt: skip
        return 1 - torch.cat([part.flatten() for part in equal]).double().mean().item()

    assert moved(torch.float32) > 0.99
    assert moved(None) < 0.2


def test_a_file_holds_no_more_than_the_largest_layer() -> None:
    names = ["model.embed.weight", *[f"model.layers.{i}.{m}" for i in range(12) for m in "ab"]]
    for embedding, layers in ((100, [5, 5, 2]), (45, [2] * 6), (15, [1] * 12)):
        sizes = {**dict.fromkeys(names, 10), names[0]: embedding}
        files = merged._plan(sizes)
        assert [name for file in files for name in file] == names
        assert [len(file) for file in files] == [1, *[2 * n for n in layers]]
    assert merged._plan({"a.weight": 3, "a.bias": 1}) == [["a.weight", "a.bias"]]


def broken_at(call_number: int, error: BaseException) -> Callable[..., None]:
    """Makes a save_file that fails half-way through one file."""
    calls = 0

    def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal calls
        calls += 1
        save_file(tensors, path, metadata)
        if calls == call_number:
            path.write_bytes(path.read_bytes()[:-5])
            raise error

    return save


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        monkeypatch.setattr(merged, "save_file", broken_at(2, error))
        with pytest.raises((KeyboardInterrupt, StorageError)) as stopped:
            save_merged(trained(tiny()), tmp_path / "merged")
        if isinstance(error, OSError):
            expected = (
                f"{tmp_path / 'merged'}: cannot be written (No space left on device); make room"
            )
            assert str(stopped.value) == expected
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [1, 4])
def test_what_a_killed_export_leaves_is_no_model(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that is killed outright cannot clean up: all files may be there but for the index."""
    monkeypatch.setattr(merged, "save_file", broken_at(at, KeyboardInterrupt()))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        save_merged(trained(tiny()), tmp_path / "merged")
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {f"model-0000{i}-of-00004.safetensors" for i in range(1, at + 1)} < found
    assert INDEX not in found
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with pytest.raises(tezo_ds.ConfigError, match="is not an empty folder"):
        save_merged(trained(tiny()), tmp_path / "merged")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    engine = trained(tiny())
    engine.sharding.quantised = "zero_quantized_weights"
    for refuse in (lambda: save_merged(engine, folder), engine.state_dict):
        with pytest.raises(tezo_ds.ShardingError, match="zero_quantized_weights"):
            refuse()
    with pytest.raises(tezo_ds.ConfigError, match="Sequential is no transformers model"):
        save_merged(trained(nn.Sequential(nn.Linear(5, 4))), folder)
    assert not folder.exists()
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(tezo_ds.ConfigError, match="is not an empty folder"):
            save_merged(trained(tiny()), taken)
    with pytest.raises(StorageError, match="cannot be written"):
        save_merged(trained(tiny()), tmp_path / "file" / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_settings_of_generation_that_transformers_would_not_save(tmp_path: Path) -> None:
    """Settings of generation that transformers would refuse to save, as many published models have, must
    not cost an hour's export."""
    model = tiny()
    model.generation_config.temperature = 0.5  # without sampling
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path)
    save_merged(trained(model), tmp_path / "merged")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "merged")
    assert found.temperature == 0.5


def test_a_run_exports_what_it_reached(
    given: Given, plain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, adapter = tmp_path / "new" / "merged", tmp_path / "adapter"
    (tmp_path / "new" / "merged").mkdir(parents=True)  # an empty folder will do
    assert call("export", "--run", plain.path, "--merged", folder, "--adapter", adapter) == 0
    assert str(folder) in capsys.readouterr().out
    tensors_in(folder)
    for name, tensor in load_file(plain.path / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(adapter / "adapter_model.safetensors")[name], tensor)

    assert call("evaluate", *Given(folder, given.data).task()) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["accuracy"] == plain.summary["accuracy_after"]
    assert score["loss"] == pytest.approx(plain.summary["test_loss_after"], rel=1e-5)
    assert abs(score["loss"] - plain.summary["test_loss_before"]) > 0.1
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, given.model))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_the_tokenizer_gets_no_pad_token_that_it_had_not(
    given: Given, plain: Run, tmp_path: Path
) -> None:
    """Training pads with the end token where there is no pad token; the exported tokenizer gets none."""
    shutil.copytree(given.model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copytree(plain.path, tmp_path / "run")
    config = plain.config
    config["settings"]["model"] = str(tmp_path / "model")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert call("export", "--run", tmp_path / "run", "--merged", tmp_path / "merged") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token is None


def test_a_signal_while_writing(
    plain: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    hearing_again: None,
) -> None:
    monkeypatch.setattr(merged, "save_file", lambda *a, **k: signal.raise_signal(signal.SIGTERM))
    assert call("export", "--run", plain.path, "--merged", tmp_path / "merged") == 130
    said = f"tezo-ds: stopped by SIGTERM; nothing is left in {tmp_path / 'merged'}\n"
    assert capfd.readouterr().err == said
    assert not list(tmp_path.iterdir())
