"""A run's result as a whole model for `from_pretrained`, written to disk while it is gathered."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, TRANSFORMERS_DYNAMIC_MODULE_NAME

from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.export.output_layer import save_biases
from tezo_ds.export.tokenizer import save_tokenizer
from tezo_ds.files.text import writing
from tezo_ds.patterns import numbered_module
from tezo_ds.sharding.base import named_state


def refuse_filled(folder: Path) -> None:
    """Raises ConfigError unless a folder is empty or new; to be called before a model is loaded."""
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; choose another, or remove it")


def is_complete(folder: Path) -> bool:
    """Returns whether `save_merged` came to its end in a folder."""
    return (folder / SAFE_WEIGHTS_INDEX_NAME).exists()


def save_merged(
    engine: Engine,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[float], None] | None = None,
    card: str = "",
) -> None:
    """Writes a folder that transformers' `from_pretrained` loads. Every rank calls this, rank 0 writes.

    One tensor is gathered at a time, and a file holds no more than the largest layer does, so rank 0
    never holds more than its shard and two layers (an embedding is one). The index comes last:
    without it nothing takes the folder for a model. An export that fails removes what it wrote.

    Args:
        engine: an engine of a transformers model; its weights and coefficients stay as they are.
        folder: the folder to write; empty or new.
        tokenizer: the tokenizer to put beside the weights.
        dtype: dtype of the written weights, see `Engine.merged_tensors`.
        progress: called with the fraction done.
        card: text of README.md.

    Raises:
        ConfigError: not a transformers model, or the folder is filled.
        StorageError: the folder cannot be written.
        ShardingError: the weights are quantised on their way to the forward.
    """
    folder, module = Path(folder), engine.sharding.module
    if not isinstance(module, PreTrainedModel):
        raise ConfigError(
            f"{type(module).__name__} is no transformers model, so from_pretrained cannot load it; "
            "use Engine.merged_tensors"
        )
    sizes = _sizes(engine, dtype)
    tensors = _kept(engine.merged_tensors(dtype), sizes, progress)
    first = next(tensors, None)
    if first is None:  # on the other ranks, once all is gathered
        return
    refuse_filled(folder)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write_configs(module, folder, tokenizer, dtype)
            if not engine.output_layer.has_bias:
                save_biases(engine, folder)
            if card:
                (folder / "README.md").write_text(card, encoding="utf-8")
        _write_weights(module, chain([first], tensors), _plan(sizes), folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sizes(engine: Engine, dtype: torch.dtype | None) -> dict[str, int]:
    """Returns the bytes of each tensor to write. Tied weights go by the first of their names, which is the
    one that transformers keeps as well."""
    sizes: dict[str, int] = {}
    for names, tensor in named_state(engine.sharding.module, engine.sharding.packed):
        shape = tensor.shape
        if isinstance(tensor, nn.Parameter):  # a partition does not show it
            shape = engine.sharding.shape(tensor)
        written = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        sizes[names[0]] = shape.numel() * written.itemsize
    return sizes


def _kept(
    tensors: Iterator[tuple[list[str], Tensor | None]],
    sizes: dict[str, int],
    progress: Callable[[float], None] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor of all that this rank is given: everything on rank 0, nothing elsewhere."""
    total, done = sum(sizes.values()), 0
    for names, tensor in tensors:
        if tensor is not None:
            yield names[0], tensor
        done += sizes[names[0]]
        if progress is not None:
            progress(done / total)


def _plan(sizes: dict[str, int]) -> list[list[str]]:
    """Returns the tensor names of each file: whole layers in order, no file larger than the largest layer."""
    layers = [list(names) for _, names in groupby(sizes, _layer)]
    bytes_of = [sum(sizes[name] for name in layer) for layer in layers]
    files: list[list[str]] = []
    filled = limit = max(bytes_of)
    for layer, size in zip(layers, bytes_of, strict=True):
        if filled + size > limit:
            files.append([])
            filled = 0
        files[-1] += layer
        filled += size
    return files


def _layer(name: str) -> str:
    """Returns the outermost numbered module that a tensor is in; its own module where there is none."""
    return numbered_module(name) or name.rpartition(".")[0]


def _write_configs(
    module: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
) -> None:
    config = copy.deepcopy(module.config)
    config.dtype = dtype or module.dtype
    if getattr(config, "quantization_config", None) is not None:  # of weights that are unpacked now
        del config.quantization_config
    config.architectures = [type(module).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    _copy_code(module, folder)
    if module.can_generate() and module.generation_config is not None:
        # Its save_pretrained would refuse what many published models have, e.g. a temperature
        # without sampling.
        module.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def _copy_code(module: PreTrainedModel, folder: Path) -> None:
    """Copies the Python code that a model brought along, without which nothing loads what is written."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
            code = str(sys.modules[kind.__module__].__file__)
            for file in (code, *get_relative_import_files(code)):
                shutil.copy(file, folder)


def _write_weights(
    module: PreTrainedModel,
    tensors: Iterator[tuple[str, Tensor]],
    files: list[list[str]],
    folder: Path,
) -> None:
    total, weight_map = 0, {}
    for number, names in enumerate(files, start=1):
        held = dict(islice(tensors, len(names)))
        assert list(held) == names, f"planned {names}, gathered {list(held)}"
        # Whole layers are at hand, so names and shapes can be those of published checkpoints, e.g.
        # one tensor for each expert.
        original = revert_weight_conversion(module, held)
        original = {name: tensor.contiguous() for name, tensor in original.items()}
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with writing(folder):
            save_file(original, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(original, file))
        total += sum(tensor.nbytes for tensor in original.values())
        for tensor in held.values():  # whoever made the last one holds it until after the next
            tensor.untyped_storage().resize_(0)
    next(tensors, None)  # so that all ranks end the gathering
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    partial = folder / f".{SAFE_WEIGHTS_INDEX_NAME}"
    with writing(folder):
        partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        partial.replace(folder / SAFE_WEIGHTS_INDEX_NAME)
