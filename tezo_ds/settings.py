"""What a command is asked for besides the `tezo` block: model, data, dtypes, sharding by FSDP2."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """What both commands need to know besides the `tezo` block; kept in a run's config.json."""

    model_config = ConfigDict(extra="forbid")

    model: str
    task: str
    data: str | None = None
    test_data: str | None = None
    template: str | None = None
    verbalizers: dict[str, str] | None = None
    label_field: str | None = None
    test_fraction: float = 0.2
    train_examples: int | None = None
    test_examples: int | None = None
    data_seed: int = 0
    max_length: int = Field(512, ge=2)
    eval_batch_size: int = Field(32, ge=1)
    dtype: Literal["auto", Dtype] = "auto"
    compute_dtype: Dtype | None = None  # of a forward; None: of the weights
    factors_dtype: Dtype | None = None  # to which the run rounded U and V; None: the compute dtype
    fsdp: bool = False
    fsdp_replicas: int = Field(1, ge=1)
    fsdp_offload_params: bool = False
    fsdp_layers: tuple[str, ...] | None = None
    objective: Literal["lm", "choices"] = "lm"
