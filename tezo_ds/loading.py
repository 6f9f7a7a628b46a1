"""Models, tokenizers and the launcher's world, as the command line needs them."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

from tezo_ds.errors import ConfigError
from tezo_ds.rendezvous import of_restart

if TYPE_CHECKING:  # what only some ways of sharding need is imported where it is used
    from tezo_ds.fsdp_loading import FsdpPlan

TIMEOUT = 1800.0  # seconds that collectives wait for the slowest rank

_zero_configs: list[Any] = []  # transformers partitions while it loads only as long as one is alive


def join_world(deepspeed: bool, fsdp: bool = False, timeout: float = TIMEOUT) -> None:
    """Joins the ranks that a launcher started; ZeRO-3 and FSDP2 need a world even if of one.

    Args:
        deepspeed, fsdp: what shards the weights.
        timeout: seconds; collectives wait so long for the slowest rank, but `TIMEOUT` at least, as
            ranks read a model at their own speed. `Liveness` shortens it for a training.
    """
    limit = timedelta(seconds=max(timeout, TIMEOUT))
    if deepspeed:
        from tezo_ds.sharding import zero3

        zero3.init_distributed(limit)
        return
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if dist.is_initialized() or not (several or fsdp):
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    if several:
        dist.init_process_group(timeout=limit, **of_restart(limit))
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


def local_device() -> torch.device:
    """This rank's accelerator, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def load_tokenizer(name: str, pad: bool = True) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name.

    Args:
        name: folder or hub name.
        pad: give it a pad token where it has none.

    Raises:
        ConfigError: there is none.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded("tokenizer", name, error)) from None
    if pad and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out, so any token would do
    return tokenizer


def load_model(
    name: str,
    dtype: str = "auto",
    deepspeed_config: dict[str, Any] | None = None,
    fsdp: FsdpPlan | None = None,
) -> nn.Module:
    """A causal or masked language model, by `from_pretrained`.

    Args:
        name: folder or hub name.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16". Under DeepSpeed its
            bf16 and fp16 blocks decide.
        deepspeed_config: with zero_optimization, each rank keeps its partition only: the model is
            partitioned while it is built and filled.
        fsdp: each rank reads and keeps its shards only; not with a `deepspeed_config`.

    Raises:
        ConfigError: no such model; the DeepSpeed config contradicts `dtype`, or has buffers that are
            too small for the model; `fsdp` does not fit the world or the model.
    """
    if deepspeed_config is not None and "zero_optimization" in deepspeed_config:
        from transformers.integrations import HfDeepSpeedConfig

        from tezo_ds.sharding import zero3

        prepared = zero3.prepare(deepspeed_config)
        dtype = _deepspeed_dtype(prepared, dtype)
        _zero_configs[:] = [HfDeepSpeedConfig(prepared)]
        with zero3.buffers_explained():
            return _from_pretrained(name, dtype)
    _zero_configs.clear()
    model = _from_pretrained(name, dtype, fsdp)
    return model.to(local_device()) if fsdp is None else model


def load_skeleton(name: str, dtype: str) -> nn.Module:
    """A model without its weights: names, shapes and a dtype, on the meta device.

    Raises:
        ConfigError: no such model.
    """
    try:
        config, loader = _kind(name)
        with torch.device("meta"):
            model: nn.Module = loader.from_config(config, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded("model", name, error)) from None
    return model


def _kind(name: str) -> tuple[Any, Any]:
    """A model's config, and the class of transformers that loads it."""
    config = transformers.AutoConfig.from_pretrained(name)
    masked = any(a.endswith("ForMaskedLM") for a in config.architectures or [])
    return config, (
        transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    )


def _from_pretrained(name: str, dtype: str, fsdp: FsdpPlan | None = None) -> nn.Module:
    try:
        config, loader = _kind(name)
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        if fsdp is None:
            model: nn.Module = loader.from_pretrained(name, dtype=wanted)
            return model
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised, which --fsdp does not shard")
        from tezo_ds.fsdp_loading import load_sharded

        return load_sharded(loader, name, wanted, local_device(), fsdp)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded("model", name, error)) from None


def _deepspeed_dtype(config: dict[str, Any], asked: str) -> str:
    enabled = {
        name
        for block, name in (("bf16", "bfloat16"), ("fp16", "float16"))
        if config.get(block, {}).get("enabled")
    }
    dtype = enabled.pop() if enabled else "float32"
    if asked not in ("auto", dtype):
        raise ConfigError(
            f"--dtype {asked} contradicts the DeepSpeed config, which means {dtype}; "
            'change its "bf16" or "fp16" block, or leave --dtype out'
        )
    return dtype


def _not_loaded(what: str, name: str, error: Exception) -> str:
    reason = str(error).split("\n")[0]
    hint = "" if Path(name).is_dir() else "; give a folder made by save_pretrained, or a hub name"
    return f"cannot load a {what} from {name!r}: {reason}{hint}"
