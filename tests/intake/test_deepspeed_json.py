"""DeepSpeed JSON as users of transformers' Trainer have it: what is dropped, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tezo_ds import ConfigError
from tezo_ds.intake.deepspeed_json import IDLE, MICRO, fit
from tezo_ds.models.loading import deepspeed_dtype
from tezo_ds.sharding.zero3_config import prepare

STAGE3 = {"zero_optimization": {"stage": 3}}
FIT = prepare(STAGE3)


@pytest.mark.parametrize(
    "idle",
    [
        {
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
            "scheduler": {"type": "WarmupLR"},
        },
        {"train_batch_size": 32, MICRO: 4, "gradient_accumulation_steps": 1},
        {"wandb": {"enabled": True}, "tensorboard": {"enabled": True}},
        {"elasticity": {"enabled": True}, "curriculum_learning": {"enabled": True}},
        {"compile": {"enabled": True, "backend": "eager"}},
        {"amp": {"enabled": False}, "tensor_parallel": {"autotp_size": 1}},
        {name: "anything" for name in IDLE},
    ],
)
def test_idle_blocks_are_dropped_and_named_once(
    idle: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(fit({**STAGE3, **idle})) == FIT
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("tezo")]
    assert said.endswith(": " + ", ".join(sorted(idle)))
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    fit({**STAGE3, **idle})
    assert not [record for record in caplog.records if record.name.startswith("tezo")]


def test_what_the_user_left_to_auto_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    auto = {"train_batch_size": "auto", "gradient_clipping": "auto", MICRO: 1}
    assert fit({**STAGE3, **auto}) == FIT
    assert not [record for record in caplog.records if record.name.startswith("tezo")]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bfloat16 and fp16"),
        ({"bfloat16": {"enabled": True}, "fp16": {"enabled": True}}, "bfloat16 and fp16"),
        ({"amp": {"enabled": True}}, "AMP"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"zero_optimization": {"stage": "2"}}, "stage is 2"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "x"}}, "zero_optimization.reduce_b"),
        ({"fp16": {"enabled": "maybe"}}, "fp16.enabled"),
        ({"bf16": {"enabled": 7}}, "bf16.enabled"),
        ({"aio": "x"}, "aio: must be an object"),
        ({"torch_autocast": 3}, "torch_autocast: must be an object"),
        ({"communication_data_type": "x"}, "communication_data_type"),
    ],
)  # fmt: skip
def test_wrong_blocks_are_named_in_one_line(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        fit({**STAGE3, **wrong})
    assert "\n" not in str(caught.value) and "model" not in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "dtype"),
    [
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"bfloat16": {"enabled": True}}, "bfloat16"),
        ({"bfloat16": {"enabled": "auto"}, "fp16": {"enabled": "true"}}, "float16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "float32"),
        ({"bf16": {"enabled": "false"}}, "float32"),
        ({"bf16": "auto"}, "float32"),
    ],
)
def test_precision_means_the_same_each_time_it_is_read(blocks: dict[str, Any], dtype: str) -> None:
    once = fit({**STAGE3, **blocks})
    assert deepspeed_dtype(once, dtype) == deepspeed_dtype(prepare(once), dtype) == dtype


def test_a_stage_in_words_is_a_number_afterwards() -> None:
    assert fit({"zero_optimization": {"stage": "3"}}) == FIT
