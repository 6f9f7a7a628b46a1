"""Model folders and hub names that cannot be read as they are: one line that says what to do."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Given, Run, call
from huggingface_hub import constants

from tezo_ds import sources
from tezo_ds.errors import ConfigError
from tezo_ds.models.loading import load_model, load_skeleton, load_tokenizer

pytest_plugins = ("cli_fixtures",)

LOADERS: list[Callable[[str], Any]] = [load_model, lambda name: load_skeleton(name, "auto")]
CONFIGURATION = """
from transformers import LlamaConfig
class MyConfig(LlamaConfig):
    model_type = "mymodel"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_my import MyConfig
class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""


def with_fields(given: Given, folder: Path, **fields: Any) -> Given:
    """Returns a copy of what there is, its model with other fields in config.json."""
    shutil.copytree(given.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return Given(folder, given.data)


@pytest.fixture
def own_code(given: Given, tmp_path: Path) -> Given:
    """A model with code of its own."""
    names = {"AutoConfig": "configuration_my.MyConfig"}
    names["AutoModelForCausalLM"] = "modeling_my.MyForCausalLM"
    made = with_fields(given, tmp_path / "own", model_type="mymodel", auto_map=names)
    (made.model / "configuration_my.py").write_text(CONFIGURATION)
    (made.model / "modeling_my.py").write_text(MODELING)
    return made


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("pad", [100_000, -100_000])
def test_a_pad_token_outside_of_the_vocabulary(
    given: Given, tmp_path: Path, load: Callable[[str], Any], pad: int
) -> None:
    odd = with_fields(given, tmp_path / "odd", pad_token_id=pad)
    with pytest.raises(ConfigError, match=r"pad_token_id of its config\.json is outside"):
        load(str(odd.model))


@pytest.mark.parametrize(
    ("quantised", "package", "quantizer"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "bnb_4bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", "bnb_8bit"),
        ({"quant_method": "gptq", "bits": 4}, "optimum", "gptq"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel", "awq"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            "compressed-tensors",
            "compressed_tensors",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_package(
    given: Given, tmp_path: Path, quantised: dict[str, Any], package: str, quantizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    where = (
        f"transformers.quantizers.quantizer_{quantizer}.is_{package.replace('-', '_')}_available"
    )
    monkeypatch.setattr(where, lambda *_: False)  # which it may be here
    odd = with_fields(given, tmp_path / "odd", quantization_config=quantised)
    with pytest.raises(ConfigError) as caught:
        load_model(str(odd.model))
    assert "a package is missing" in str(caught.value)
    assert f"pip install {package}" in str(caught.value).replace("-U ", "")
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("load", LOADERS)
def test_own_code_is_not_run_unasked(
    own_code: Given, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(_: str = "") -> str:
        raise AssertionError("a question on stdin")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ConfigError, match="unless --trust-remote-code is given"):
        load(str(own_code.model))


def test_own_code_that_is_trusted(
    own_code: Given, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trusted = ["--trust-remote-code"]
    for method in ("tezo", "mezo"):
        run = Run(tmp_path / method)
        assert call(*own_code.train(run.path, method=method, check_every=2), *trusted) == 0
        assert run.config["settings"]["trust_remote_code"] is True
        assert call("evaluate", "--run", run.path) == 0, capfd.readouterr().err
        assert call("export", "--run", run.path, "--merged", tmp_path / f"{method}-merged") == 0
        assert call("replay", run.path, "--verify") == 0
    assert call("evaluate", *own_code.task(), *trusted) == 0
    assert call("doctor", "--model", own_code.model, "--rank", 4, *trusted) == 0
    assert "MyForCausalLM" in capfd.readouterr().out
    plan = ["plan", "--model", own_code.model, "--world", 2, "--rank", 4]
    assert call(*plan) == 2
    assert "--trust-remote-code" in capfd.readouterr().err
    assert call(*plan, *trusted) == 0


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the hub's address."""
    sources._hub_answers.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)
    sources._hub_answers.cache_clear()


@pytest.mark.parametrize("load", [*LOADERS, load_tokenizer])
def test_a_hub_that_does_not_answer(
    online: Callable[[str], None], load: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    online("http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9 does not answer") as caught:
        load("nobody/nothing")
    assert time.monotonic() - start < 3 * sources.WAIT
    assert "\n" not in str(caught.value)
    assert not caplog.records
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_matters_to_no_folder(
    online: Callable[[str], None], given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    online("http://127.0.0.1:9")

    def asked() -> bool:
        raise AssertionError("the hub was asked")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_hub_answers", asked)
        assert isinstance(load_model(str(given.model)), torch.nn.Module)


def test_a_hub_that_answers_is_asked(online: Callable[[str], None]) -> None:
    class Empty(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{hub.server_port}")
        assert sources._hub_answers()
        hub.shutdown()
