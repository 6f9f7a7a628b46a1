"""Forms in which a model is quantised while it loads, `--load-in`, as arguments of `from_pretrained`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn

from tezo_ds.launched import env_rank
from tezo_ds.quantised.forms import GROUP
from tezo_ds.quantised.packed import packed_weights

log = logging.getLogger(__name__)


PACKAGES = {"int8": "torchao", "int4": "torchao", "8bit": "bitsandbytes", "4bit": "bitsandbytes"}


def quantised_arguments(
    load_in: str | None, config: Any, dtype: torch.dtype | str, device: torch.device,
    sharded: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Returns what `from_pretrained` is told besides a name, so that weights are quantised as they load, or
    are kept so where the checkpoint's are.

    Args:
        load_in: int8 or int4 (torchao), 8bit or 4bit (bitsandbytes); None: as the checkpoint is.
        config: the model's own config.
        dtype: of what is not quantised; "auto": the checkpoint's.
        device: where the model will be.
        sharded: whether FSDP2 is to shard it.

    Raises:
        ValueError: the checkpoint is quantised already, or the dtype does not go with the form.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is not None and load_in is not None:
        raise ValueError(
            f"its weights are quantised already ({_method(stored)}), which --load-in {load_in} "
            "contradicts; leave --load-in out"
        )
    if load_in is None:
        return {} if stored is None else _as_stored(stored, device)
    if dtype == torch.float64:
        raise ValueError(
            f"--dtype float64 contradicts --load-in {load_in}, whose kernels compute in 32 bits or "
            "less; use float32 or bfloat16"
        )
    if find_spec(PACKAGES[load_in]) is None:
        package = PACKAGES[load_in]
        raise ValueError(
            f"--load-in {load_in} needs {package}, which is missing; pip install {package}"
        )
    if load_in == "int4" and device.type != "cpu" and dtype not in ("auto", torch.bfloat16):
        raise ValueError(
            f"--dtype {str(dtype).removeprefix('torch.')} contradicts --load-in int4, whose kernel on a GPU "
            "computes in bfloat16; use that, or --load-in 4bit"
        )
    computed = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None)
    place = {"device_map": {"": "cpu" if sharded else str(device)}}
    return {"quantization_config": _config(load_in, computed, device, sharded), **place}


def _method(stored: Any) -> str:
    named = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(named, "value", named))


def _as_stored(stored: Any, device: torch.device) -> dict[str, Any]:
    """Returns the arguments for a checkpoint that is quantised already. compressed-tensors' layers unpack
    their weights for good in the first forward, so better as they load."""
    given: dict[str, Any] = {"device_map": {"": str(device)}}
    if _method(stored) == "compressed-tensors":
        given["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return given


@contextmanager
def explained_forms(config: Any) -> Iterator[None]:
    """Context manager: errors over a form, as `from_pretrained` raises them inside, become a ValueError.

    Args:
        config: the model's own config, as it was before.
    """
    stored = getattr(config, "quantization_config", None)
    try:
        with warnings.catch_warnings():  # that what the checkpoint says wins, which we ask for
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    except NotImplementedError as error:
        raise ValueError(f"transformers does not load its form: {error}") from None
    except (KeyError, TypeError, AssertionError) as error:
        if stored is None:
            raise
        raise ValueError(
            f"quantization_config of its config.json is not whole ({type(error).__name__}: {error}); take "
            "that file from where the weights are from"
        ) from None


def note_unpacked(model: nn.Module, config: Any) -> None:
    """Logs, on one rank, that a quantised checkpoint's weights are plain in the model."""
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not packed_weights(model) and env_rank() == 0:
        log.warning(
            "the checkpoint's weights (%s) were unpacked as they loaded, as no layer keeps them packed here; "
            "they take the memory of plain ones",
            _method(stored),
        )


def _config(load_in: str, dtype: torch.dtype | None, device: torch.device, sharded: bool) -> Any:
    if load_in == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if load_in == "4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or torch.float32,
            # So that FSDP2 may gather weights with the rest, which is of that dtype.
            bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
        )  # fmt: skip
    return transformers.TorchAoConfig(torchao_config(load_in, device))


def torchao_config(load_in: str, device: torch.device) -> Any:
    from torchao import quantization

    if load_in == "int8":
        return quantization.Int8WeightOnlyConfig()
    if device.type == "cpu":  # each number in a byte, as torchao has no packed kernel there
        four: torch.dtype = getattr(torch, "int4")  # noqa: B009  # older torch lacks it
        return quantization.IntxWeightOnlyConfig(
            weight_dtype=four, granularity=quantization.PerGroup(GROUP)
        )
    return quantization.Int4WeightOnlyConfig(
        group_size=GROUP, int4_packing_format="tile_packed_to_4d"
    )
