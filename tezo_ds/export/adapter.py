"""LoRA adapters: a run whose result is its coefficients is exactly a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tezo_ds.adapters.tt import TensorTrainAdapter
from tezo_ds.config import TezoConfig
from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.export.beside import peft_pairs, peft_tensors, save_tensor_trains
from tezo_ds.export.output_layer import not_in_weights, pairs_of, save_biases
from tezo_ds.export.servers import fitted, refuse_unfit
from tezo_ds.export.tokenizer import save_tokenizer
from tezo_ds.files.text import writing
from tezo_ds.models.structure import (
    is_classifier,
    is_encoder_decoder,
    is_masked_lm,
    kind_of,
    uncovered,
    users,
)

CHECKSUMS = "SHA256SUMS"
INSTEAD = "write the merged model (tezo-ds export --merged)"


def lora_tensors(engine: Engine) -> dict[str, Tensor]:
    """Returns PEFT's tensors: B = U diag(a), A = Vᵀ for a Linear; A = (U diag(a))ᵀ, B = V for an Embedding or
    GPT-2's Conv1D, which are used transposed. U, V and a of several periods lie side by side.

    No communication: U and V come from the seed. All pairs are of one rank, the largest, with zeros beside
    what is smaller: llama.cpp divides one alpha, the file's, by the rank of each pair. A tied matrix gives
    one pair for each module that uses it, so the adapter is for adding on the side, see `not_to_merge`.
    Fitted terms, of the output layer and of inner ones, are pairs of their own, beside that of a matrix that
    trains.

    Raises:
        ConfigError: what was learnt has no place in an adapter.
    """
    if reason := no_adapter_because(engine):
        raise ConfigError(reason)
    if engine.config.adapter == "lora":
        return peft_tensors(engine)
    coefficients, owners = engine.coefficients(), _owners(engine.sharding.module)
    tensors: dict[str, Tensor] = {}
    rank = _rank(engine)
    for matrix in engine.space.matrices:
        a = coefficients[matrix.name].view(-1, matrix.rank)  # (periods, rank)
        make = (FixedFactors(engine.space, period) for period in range(len(a)))
        pairs = [factors.of(matrix.name) for factors in make]
        scaled = torch.cat([U.double() * c for (U, _), c in zip(pairs, a, strict=True)], dim=1)
        scaled = scaled.float()  # (m, periods * rank)
        V = torch.cat([V.float() for _, V in pairs], dim=1)  # (n, periods * rank)
        unused = rank - V.shape[1]
        scaled, V = (nn.functional.pad(part, (0, unused)) for part in (scaled, V))
        for path, kind in owners[matrix.name]:
            prefix = f"base_model.model.{path}.lora_"
            if kind == "embedding":
                tensors[f"{prefix}embedding_A"] = scaled.t().contiguous()
                tensors[f"{prefix}embedding_B"] = V.clone()
            else:
                inner, outer = (scaled, V) if kind == "conv1d" else (V, scaled)
                tensors[f"{prefix}A.weight"] = inner.t().contiguous()
                tensors[f"{prefix}B.weight"] = outer.clone()
    for path, (outer, inner) in pairs_of(engine).items():
        prefix, width = f"base_model.model.{path}.lora_", len(inner)
        A, B = tensors.get(f"{prefix}A.weight"), tensors.get(f"{prefix}B.weight")
        A = inner.new_zeros(rank, inner.shape[1]) if A is None else A
        B = outer.new_zeros(outer.shape[0], rank) if B is None else B
        A[rank - width :], B[:, rank - width :] = inner, outer  # of no use to a matrix that trains
        tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] = A, B
    return tensors


def _rank(engine: Engine) -> int:
    """Returns the one rank of all pairs: room for the largest, and for fitted terms beside them."""
    module, coefficients = engine.sharding.module, engine.coefficients()
    ranks = [part.numel() for part in coefficients.values()]
    own = dict(module.named_parameters(remove_duplicate=False))
    for path, (_, inner) in pairs_of(engine).items():
        weight = own[f"{path}.weight"]
        beside = [part.numel() for name, part in coefficients.items() if own[name] is weight]
        ranks.append(len(inner) + sum(beside))
    return max(ranks)


def not_low_rank(config: TezoConfig) -> str | None:
    """Returns what stands against an adapter of any run of this method, in one line; None if nothing does."""
    if config.facts.learns_coefficients:
        return None
    return f"what {config.method} learns is no low-rank change, as a LoRA adapter is; {INSTEAD}"


def no_adapter_because(engine: Engine) -> str | None:
    """Returns what stands against an adapter of this run, in one line; None if nothing does."""
    module = engine.sharding.module
    vectors = engine.space.vectors[len(engine.selection.adapters.vectors) :]
    if reason := not_low_rank(engine.config):
        return reason
    if vectors:
        return (
            f"{vectors[0].name} ({len(vectors)} such) is a vector, which has no place in an "
            f"adapter; leave train_vectors off{'' if engine.config.adapter != 'none' else f', or {INSTEAD}'}"
        )
    names = {matrix.name for matrix in engine.space.matrices}
    gaps = {**uncovered(module, names), **_offset_embeddings(module, names)}
    if not gaps:
        return None
    name, where = next(iter(gaps.items()))
    return f"{name} ({where}) has no place in a LoRA adapter; exclude it, or {INSTEAD}"


def _offset_embeddings(module: nn.Module, names: set[str]) -> dict[str, str]:
    """Returns embeddings that do not look up their first argument as peft would (OPT's positions); peft
    knows of embeddings that scale what they looked up."""
    return {
        name: f"weight of {type(owner).__name__}"
        for name, owner, _ in users(module, names)
        if isinstance(owner, nn.Embedding)
        and type(owner).forward is not nn.Embedding.forward
        and not hasattr(owner, "embed_scale")
    }


def _owners(module: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Returns (path, kind) of the modules that use each weight, by the weight's name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    owners: dict[str, list[tuple[str, str]]] = {}
    for path, owner in module.named_modules():
        if kind := kind_of(owner):
            name = names.get(id(getattr(owner, "weight", None)), f"{path}.weight")
            owners.setdefault(name, []).append((path, kind))
    return owners


def not_to_merge(engine: Engine) -> str | None:
    """Returns why other tools must not merge this run's adapter, in one line; None if they may."""
    owners = _owners(engine.sharding.module)
    if engine.output_layer.state and (tied := engine.output_layer.tied):
        return (
            f"{tied} and {engine.output_layer.path} are tied, and peft's merge_and_unload would add the "
            "output layer's update to both; load the adapter without merging"
        )
    for matrix in engine.space.matrices:
        if len(used := owners.get(matrix.name, [])) > 1:
            paths = " and ".join(path for path, _ in used)
            return (
                f"{paths} are tied, and peft's merge_and_unload would add the update of each to the one "
                f"weight; load the adapter without merging, or {INSTEAD}"
            )
    return None


def to_know(engine: Engine) -> str | None:
    """Returns all that users of this run's adapter have to know, in one line; None if there is nothing."""
    nonlinear = TensorTrainAdapter.no_merge if engine.config.adapter == "tt" else None
    reasons = (nonlinear, not_to_merge(engine), not_in_weights(engine), beside_packed(engine))
    return "; ".join(filter(None, reasons)) or None


def beside_packed(engine: Engine) -> str | None:
    """Returns which form of the base an adapter was trained beside; None for plain weights."""
    if not engine.sharding.packed:
        return None
    return (
        f"it was trained beside quantised weights ({engine.sharding.quantised}); load the base model in "
        "the same form"
    )


def lora_config(engine: Engine, base_model: str) -> dict[str, Any]:
    """Returns the content of adapter_config.json: scaling lora_alpha / r = 1, module paths in full."""
    if engine.config.adapter == "lora":
        return {**_lora_config(engine, base_model), **peft_pairs(engine)}
    module = engine.sharding.module
    owners = _owners(module)
    used = [use for matrix in engine.space.matrices for use in owners[matrix.name]]
    targets, rank = [path for path, _ in used], _rank(engine)
    targets += [path for path in pairs_of(engine) if path not in targets]
    return {
        **_lora_config(engine, base_model),
        "r": rank,
        "lora_alpha": rank,
        "fan_in_fan_out": any(kind_of(module.get_submodule(path)) == "conv1d" for path in targets),
        "target_modules": targets,
    }


def refuse_server(engine: Engine, server: str, embeddings: bool) -> None:
    """Checks that a server takes this run's adapter, without making it; see `servers.refuse_unfit`.

    Raises:
        ConfigError: it does not.
    """
    if engine.config.adapter == "tt":
        raise ConfigError(f"--for {server}: it reads no tensor trains; train with --adapter lora")
    refuse_unfit(
        engine.sharding.module, lora_config(engine, "")["target_modules"], server, embeddings
    )


def _lora_config(engine: Engine, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": _task_type(engine.sharding.module),
        "base_model_name_or_path": os.path.abspath(base_model)
        if os.path.isdir(base_model)
        else base_model,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _task_type(module: nn.Module) -> str | None:
    """Returns the kind of task that peft is told; for masked models it has none, and for classification one
    by which it would train a head of its own, in the place of what has learnt."""
    if is_masked_lm(module) or is_classifier(module):
        return None
    return "SEQ_2_SEQ_LM" if is_encoder_decoder(module) else "CAUSAL_LM"


def save_adapter(
    engine: Engine,
    folder: Path | str,
    base_model: str | None = None,
    card: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    server: str | None = None,
    embeddings: bool = False,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads, or `tezo_ds.adapters.load` where tensor
    trains have trained. For one rank; replaces the folder whole or not at all. peft takes changed weights
    for good ones: `sha256sum -c SHA256SUMS` tells.

    Args:
        engine: an engine after training.
        folder: the folder to write.
        base_model: name or path of the model that the adapter is for; None: as the model's own config says.
        card: text of README.md.
        tokenizer: the tokenizer to put beside the adapter.
        server: the server that will read it, one of `servers.SERVERS`; None: peft.
        embeddings: whether a server's adapter may have pairs of embeddings.

    Raises:
        ConfigError: see `lora_tensors` and `refuse_server`.
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    if base_model is None:
        base_model = getattr(getattr(engine.sharding.module, "config", None), "_name_or_path", "")
    if reason := no_adapter_because(engine):
        raise ConfigError(reason)
    if server is not None:
        refuse_server(engine, server, embeddings)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            if engine.config.adapter == "tt":
                save_tensor_trains(engine, partial, base_model)
            else:
                _save_for_peft(engine, partial, base_model, server)
            if card:
                (partial / "README.md").write_text(card, encoding="utf-8")
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
            _write_checksums(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_for_peft(engine: Engine, folder: Path, base_model: str, server: str | None) -> None:
    tensors, config = lora_tensors(engine), lora_config(engine, base_model)
    if server is not None:
        tensors, config = fitted(tensors, config, server)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_biases(engine, folder)


def _write_checksums(folder: Path) -> None:
    """Writes the checksums of a folder's files, in the format of sha256sum."""
    hashed = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text("".join(f"{h}  {name}\n" for name, h in hashed.items()))
