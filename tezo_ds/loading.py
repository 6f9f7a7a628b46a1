"""Models, tokenizers and the launcher's world, as the command line needs them."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from tezo_ds.errors import ConfigError, TezoError
from tezo_ds.rendezvous import of_restart

if TYPE_CHECKING:  # what only some ways of sharding need is imported where it is used
    from tezo_ds.fsdp_loading import FsdpPlan

log = logging.getLogger(__name__)

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
    with _damage_explained("tokenizer", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
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
        dtype = deepspeed_dtype(prepared, dtype)
        _zero_configs[:] = [HfDeepSpeedConfig(prepared)]
        with zero3.buffers_explained():
            return _from_pretrained(name, dtype)
    _zero_configs.clear()
    model = _from_pretrained(name, dtype, fsdp)
    return model.to(local_device()) if fsdp is None else model


def load_skeleton(name: str, dtype: str) -> nn.Module:
    """A model without its weights: names, shapes and a dtype ("auto": its config's), on the meta device.

    Raises:
        ConfigError: no such model.
    """
    with _damage_explained("model", name), torch.device("meta"):
        config, loader = _kind(name)
        chosen = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        model: nn.Module = loader.from_config(config, **chosen)
    return model


def _kind(name: str) -> tuple[Any, Any]:
    """A model's config, and the class of transformers that loads it."""
    config = transformers.AutoConfig.from_pretrained(name)
    masked = any(a.endswith("ForMaskedLM") for a in config.architectures or [])
    return config, (
        transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    )


def _from_pretrained(name: str, dtype: str, fsdp: FsdpPlan | None = None) -> nn.Module:
    with _damage_explained("model", name):
        config, loader = _kind(name)
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        if fsdp is None:
            return _load_whole(loader, name, wanted)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised, which --fsdp does not shard")
        from tezo_ds.fsdp_loading import load_sharded

        return load_sharded(loader, name, wanted, local_device(), fsdp)


def _load_whole(loader: Any, name: str, dtype: torch.dtype | str) -> nn.Module:
    """Raises ValueError where transformers would make up weights that the checkpoint lacks."""
    with without_tables():
        model, report = loader.from_pretrained(
            name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    if misfit := misfit_of(report):
        raise ValueError(misfit)
    note_left_over(report)
    loaded: nn.Module = model
    return loaded


def misfit_of(report: Mapping[str, Any]) -> str | None:
    """What transformers' report of a loading says is missing or of another shape; None if nothing is."""
    different = sorted(name for name, *_ in report["mismatched_keys"])
    for names, what in ((sorted(report["missing_keys"]), "no"), (different, "another shape of")):
        if names:
            return (
                f"it has {what} {names[0]} ({len(names)} such); is it whole, and does config.json "
                "fit it?"
            )
    return None


def note_left_over(report: Mapping[str, Any]) -> None:
    """Says on one rank what the checkpoint has and the model does not."""
    if (left := sorted(report["unexpected_keys"])) and os.environ.get("RANK", "0") == "0":
        log.warning("left over in the checkpoint: %s (%d such)", left[0], len(left))


@contextmanager
def without_tables() -> Iterator[None]:
    """Keeps transformers from printing on all ranks what it thinks of the checkpoint."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def _damage_explained(what: str, name: str) -> Iterator[None]:
    """Within it, what is raised over a folder's files is a ConfigError that names the folder. A ValueError's
    or OSError's words are for users; transformers, tokenizers and safetensors raise much else over damaged
    files, with no common base."""
    try:
        yield
    except (TezoError, AssertionError, dist.DistError, torch.OutOfMemoryError):
        raise  # not of the files
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(what, name, str(error).split("\n")[0])) from None
    except Exception as error:
        cause = error.__cause__ or error
        reason = textwrap.shorten(f"{type(cause).__name__}: {cause}", 300, placeholder=" …")
        raise ConfigError(_not_loaded(what, name, f"its files are damaged ({reason})")) from error


def deepspeed_dtype(config: dict[str, Any], asked: str) -> str:
    """What a DeepSpeed config makes of the weights.

    Raises:
        ConfigError: another dtype was asked for.
    """
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


def _not_loaded(what: str, name: str, reason: str) -> str:
    hint = "" if os.path.isdir(name) else "; give a folder made by save_pretrained, or a hub name"
    return f"cannot load a {what} from {name!r}: {reason}{hint}"
