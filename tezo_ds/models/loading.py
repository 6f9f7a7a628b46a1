"""Models and tokenizers, as the command line needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from tezo_ds.errors import ConfigError
from tezo_ds.kinds import read_kind
from tezo_ds.models.checkpoint import misfit_of, note_left_over, without_tables
from tezo_ds.quantised.loading import explained_forms, note_unpacked, quantised_arguments
from tezo_ds.quantised.packed import make_portable, packed_weights
from tezo_ds.sharding.world import local_device
from tezo_ds.sources import explained

if TYPE_CHECKING:  # what only some ways of sharding need is imported where it is used
    from tezo_ds.models.fsdp import FsdpPlan


_zero_configs: list[Any] = []  # transformers partitions while it loads only as long as one is alive


def load_tokenizer(
    name: str, pad: bool = True, trust: bool = False
) -> transformers.PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder or hub name.

    Args:
        name: folder or hub name.
        pad: whether to give the tokenizer a pad token where it has none.
        trust: whether to run Python code that comes with it.

    Raises:
        ConfigError: no such tokenizer.
    """
    with explained("tokenizer", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    if pad and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out, so any token would do
    return tokenizer


def load_model(
    name: str,
    dtype: str = "auto",
    deepspeed_config: dict[str, Any] | None = None,
    fsdp: FsdpPlan | None = None,
    trust: bool = False,
    load_in: str | None = None,
    attention: str | None = None,
) -> nn.Module:
    """Loads a model of one of the kinds that are served (see `ModelKind`), by `from_pretrained`.

    Args:
        name: folder or hub name.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16". Under DeepSpeed its
            bf16 and fp16 blocks decide.
        deepspeed_config: with zero_optimization, each rank keeps its partition only: the model is
            partitioned while it is built and filled.
        fsdp: each rank reads and keeps its shards only; not with a `deepspeed_config`.
        trust: whether to run Python code that comes with the model.
        load_in: form in which weights are quantised as they load; see `quantised_arguments`.
        attention: transformers' attn_implementation; None: the model's own.

    Raises:
        ConfigError: no such model, or attention; the DeepSpeed config contradicts `dtype`, or has buffers
            that are too small for the model; `fsdp` does not fit the world or the model.
    """
    given = {} if attention is None else {"attn_implementation": attention}
    if deepspeed_config is not None and "zero_optimization" in deepspeed_config:
        from transformers.integrations import HfDeepSpeedConfig

        from tezo_ds.sharding.zero3 import buffers_explained
        from tezo_ds.sharding.zero3_config import prepare

        prepared = prepare(deepspeed_config)
        dtype = deepspeed_dtype(prepared, dtype)
        _zero_configs[:] = [HfDeepSpeedConfig(prepared)]
        with buffers_explained():
            return _from_pretrained(name, dtype, None, trust, load_in, "ZeRO-3", given)
    _zero_configs.clear()
    model = _from_pretrained(name, dtype, fsdp, trust, load_in, "--fsdp" if fsdp else None, given)
    placed = fsdp is not None or hasattr(model, "hf_quantizer")  # bitsandbytes' do not move
    return model if placed else model.to(local_device())


def load_skeleton(name: str, dtype: str, trust: bool = False) -> nn.Module:
    """Makes a model without weights: names, shapes and a dtype ("auto": its config's), on the meta device.

    Raises:
        ConfigError: no such model.
    """
    with explained("model", name), torch.device("meta"):
        config, kind = read_kind(name, trust)
        chosen = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        model: nn.Module = kind.loader.from_config(config, trust_remote_code=trust, **chosen)
    return model


def _from_pretrained(
    name: str, dtype: str, fsdp: FsdpPlan | None, trust: bool, load_in: str | None, sharded: str | None,
    given: dict[str, Any],
) -> nn.Module:  # fmt: skip
    with explained("model", name):
        config, kind = read_kind(name, trust)
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        in_fours = fsdp is not None and load_in == "4bit"
        quantised = quantised_arguments(load_in, config, wanted, local_device(), in_fours)
        if quantised and sharded and not in_fours:
            raise ValueError(
                f"its weights are quantised, which {sharded} does not shard; leave {sharded} out, and each "
                "rank has a copy, or use --fsdp --load-in 4bit"
            )
        if quantised and fsdp is not None:
            from tezo_ds.models.fsdp import shard_packed

            model = _load_whole(kind.loader, config, name, wanted, trust, quantised | given)
            return shard_packed(model, local_device(), fsdp)
        if fsdp is None:
            return _load_whole(kind.loader, config, name, wanted, trust, quantised | given)
        from tezo_ds.models.fsdp import load_sharded

        return load_sharded(kind.loader, name, wanted, local_device(), fsdp, trust, given)


def _load_whole(
    loader: Any, config: Any, name: str, dtype: torch.dtype | str, trust: bool, given: dict[str, Any]
) -> nn.Module:  # fmt: skip
    """Loads a model unsharded; raises ValueError where transformers would make up missing weights."""
    with without_tables(), explained_forms(config):
        model, report = loader.from_pretrained(
            name,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust,
            **given,
        )
    if misfit := misfit_of(report):
        raise ValueError(misfit)
    note_left_over(report)
    note_unpacked(model, config)
    make_portable(packed_weights(model).values(), model.device)
    loaded: nn.Module = model
    return loaded


def deepspeed_dtype(config: dict[str, Any], asked: str) -> str:
    """Returns the dtype that a DeepSpeed config gives to the weights.

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
