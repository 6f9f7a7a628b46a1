"""Plans of quantised weights: bits with scales, as the libraries really take them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import call
from tiny import tiny
from torch import nn

from tezo_ds.config import TezoConfig
from tezo_ds.doctor.flags import RunFlags
from tezo_ds.errors import ConfigError
from tezo_ds.plan.needs import PlannedRun, needs
from tezo_ds.quantised.forms import FORMS, form_named, form_stored
from tezo_ds.quantised.packed import packed_weights
from tezo_ds.settings import Settings

SHAPE = (192, 256)


def layers(form: str) -> nn.Module:
    """Makes a layer that is packed by a form's library."""
    model = nn.ModuleDict({"layer": nn.Linear(SHAPE[1], SHAPE[0], bias=False).bfloat16()})
    if form == "int8":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes")
    if form == "8bit":
        layer = bnb.nn.Linear8bitLt(*SHAPE[::-1], bias=False, has_fp16_weights=False)
    else:
        options = {"compress_statistics": True, "quant_type": "nf4"}
        layer = bnb.nn.Linear4bit(*SHAPE[::-1], bias=False, **options)
    layer.load_state_dict(model.layer.state_dict())
    return nn.ModuleDict({"layer": layer.to("cpu")})


@pytest.mark.parametrize("form", ["int8", "8bit", "4bit"])
def test_a_form_takes_the_bytes_that_its_library_takes(form: str) -> None:
    (weight,) = packed_weights(layers(form)).values()
    assert weight.nbytes == pytest.approx(FORMS[form].nbytes(SHAPE), rel=0.01, abs=1200)
    assert weight.nbytes < 0.6 * 2 * SHAPE[0] * SHAPE[1]


def test_needs_of_packed_weights_by_hand() -> None:
    with torch.device("meta"):
        model = tiny(tied=False)

    def of(form: str | None, **fields: Any) -> Any:
        config = TezoConfig(**(fields or {"rank": 3}))
        return needs(PlannedRun(model, config, form=form_named(form) if form else None))

    packed = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    numel, rows = sum(p.numel() for p in packed), sum(p.shape[0] for p in packed)
    plain, int8, five = of(None), of("int8"), of("5")
    assert plain.shard - int8.shard == 4 * numel - numel - 2 * rows  # scales of 16 bits
    assert plain.shard - five.shard == pytest.approx(4 * numel - numel * 5 / 8, abs=len(packed))
    assert int8.gathered == max(p.nbytes for p in packed) and plain.gathered == 0
    assert int8.probe == plain.probe  # U and V are of the logical shape, in the dtype of the rest
    with pytest.raises(ConfigError, match="weights in int8 are only read, and mezo writes them"):
        of("int8", method="mezo")


def test_30b_on_one_card(capsys: pytest.CaptureFixture[str]) -> None:
    card = ["--model", "llama-30b", "--world", "1", "--gpu", "rtx-4090", "--json"]
    flags = [*card, "--batch", "8", "--length", "256"]
    fits = {}
    for form in ("int4", "4bit", "int8"):
        assert call("plan", *flags, "--weights", form) == 0
        found = json.loads(capsys.readouterr().out)
        fits[form] = found["columns"][0]["fits"]
        assert not found["columns"][1]["fits"]  # MeZO, of plain weights
    assert fits == {"int4": True, "4bit": True, "int8": False}
    for more, why in (
        (
            ["--weights", "int4", "--sharding", "zero3"],
            "of a copy on each rank; use --sharding replicated",
        ),
        (["--weights", "fewest"], "must be one of int8, int4, 8bit, 4bit, or bits a weight"),
    ):
        assert call("plan", *flags, *more) == 2
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1


STORED: list[tuple[dict[str, Any], float | None]] = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
    ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.127),
    ({"quant_method": "fp8"}, 8.0),
    ({"quant_method": "compressed-tensors"}, None),  # which are unpacked as they load
]


@pytest.mark.parametrize(("about", "bits"), STORED)
def test_a_checkpoint_says_its_bits(about: dict[str, Any], bits: float | None) -> None:
    form = form_stored(SimpleNamespace(quantization_config=about))
    found = form and 8 * form.nbytes((4096, 4096)) / 4096**2
    assert found == (bits and pytest.approx(bits, abs=0.01))


def test_the_doctor_knows_the_form() -> None:
    with torch.device("meta"):
        model = tiny(tied=False)

    def of(**fields: Any) -> Any:
        settings = Settings(model="m", task="trec", **fields)
        return RunFlags(settings, TezoConfig(rank=3)).needs(model, 2)

    plain, int8 = of(), of(load_in="int8")
    assert int8.shard < 0.6 * plain.shard
    halves, fours = of(fsdp=True), of(fsdp=True, load_in="4bit")
    assert fours.shard < 0.6 * halves.shard and fours.gathered < 0.8 * halves.gathered
    with pytest.raises(ConfigError, match="weights in int8 are not sharded"):
        of(fsdp=True, load_in="int8")
