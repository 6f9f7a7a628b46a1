"""Models that are read shard by shard for FSDP2: equal to `from_pretrained`, in a shard's memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, make_batch, tiny
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from world_fsdp2 import blocks_of
from world_hazards import assert_write_was_seen, refusal
from world_replicated import FIELDS
from worlds import World, case

import tezo_ds
from tezo_ds.models import checkpoint, fsdp
from tezo_ds.models.fsdp import FsdpPlan
from tezo_ds.models.loading import load_model
from tezo_ds.sharding import sharding_of

Tensors = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def saved(world: World, name: str, write: Callable[[Path], object]) -> Path:
    """Returns a folder that rank 0 has written for all ranks."""
    folder = world.folder / name
    if world.rank == 0 and not folder.exists():
        write(folder)
    dist.barrier()
    return folder


def tiny_checkpoint(world: World, kind: str = "llama", tied: bool = True) -> Path:
    """Saves a tiny model in several files."""
    model = tiny(kind, tied)
    return saved(
        world, f"{kind}-{tied}", lambda path: model.save_pretrained(path, max_shard_size="8KB")
    )


def whole(path: Path, dtype: str | torch.dtype = "auto") -> nn.Module:
    """Loads a whole model by transformers alone."""
    loader = AutoModelForMaskedLM if "roberta" in path.name else AutoModelForCausalLM
    model: nn.Module = loader.from_pretrained(path, dtype=dtype)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Returns the logits of the third forward, as the hazards of sharding may take that many to show."""
    sharding, batch = sharding_of(model), make_batch(3)
    for _ in range(3):
        found: Tensor = sharding.forward(**batch).logits
    return found


@case(worlds=(1, 2, 3))
def models_read_by_shards_are_those_of_from_pretrained(world: World) -> None:
    kinds = ("llama", True), ("llama", False), ("opt", True), ("neox", False), ("roberta", True)
    for kind, tied in kinds:
        path = tiny_checkpoint(world, kind, tied)
        assert len(list(path.glob("*.safetensors"))) > 3
        model, reference = load_model(str(path), fsdp=FsdpPlan()), whole(path)
        names = [name for name, _ in reference.named_parameters()]
        assert [name for name, _ in model.named_parameters()] == names
        assert all(isinstance(block, FSDPModule) for block in blocks_of(model))
        assert torch.equal(logits(model), logits(reference)), kind
        before, after = reference.config.to_dict(), model.config.to_dict()
        assert before == {**after, "architectures": before["architectures"]}


@case(worlds=(2, 3))
def hybrid_offloaded_and_cast_models_are_as_well(world: World) -> None:
    path = tiny_checkpoint(world)
    reference, bf16 = logits(whole(path)), logits(whole(path, torch.bfloat16))
    for plan in (
        FsdpPlan(replicas=world.size),
        FsdpPlan(offload=True),
        FsdpPlan(layers=("LlamaMLP", "LlamaAttention")),
    ):
        model = load_model(str(path), fsdp=plan)
        assert torch.equal(logits(model), reference), plan
    model = load_model(str(path), "bfloat16", fsdp=FsdpPlan())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), bf16)
    model = load_model(str(path), fsdp=FsdpPlan(compute_dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), bf16)  # to which `evaluate` in one process owes its agreement


@case(worlds=(2, 3))
def experts_that_a_checkpoint_holds_one_by_one_are_joined(world: World) -> None:
    """Experts are joined on loading, each rank reading those of its rows alone."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=5,
    )  # fmt: skip
    path = saved(world, "experts", MixtralForCausalLM(config).save_pretrained)
    assert any("experts.4" in name for name in load_file(path / "model.safetensors"))
    model = load_model(str(path), fsdp=FsdpPlan())
    assert torch.equal(logits(model), logits(whole(path)))


@case(worlds=(4,))
def each_copy_of_a_hybrid_model_is_read_by_its_own_ranks(world: World) -> None:
    path = tiny_checkpoint(world)
    model = load_model(str(path), fsdp=FsdpPlan(replicas=2))
    assert torch.equal(logits(model), logits(whole(path)))
    rows = model.get_input_embeddings().weight.to_local().shape[0]
    assert rows == (31 if world.rank % 2 == 0 else 30)


def variant(world: World, name: str, change: Callable[[Tensors], Tensors], tied: bool) -> Path:
    """Saves a tiny Llama's checkpoint with other tensors."""
    base = saved(world, f"whole-{tied}", tiny("llama", tied).save_pretrained)

    def write(folder: Path) -> None:
        shutil.copytree(base, folder)
        changed = change(load_file(folder / "model.safetensors"))
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    return saved(world, f"{name}-{tied}", write)


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@case(worlds=(1, 2))
def names_that_differ_from_the_models_are_understood(world: World) -> None:
    for name, change in {
        "prefix": renamed(lambda name: name.removeprefix("model.")),
        "head": renamed(lambda name: HEAD if name == EMBEDDING else name),
        "both": lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()},
        "more": lambda tensors: {**tensors, "model.layers.7.what": torch.ones(3)},
    }.items():
        path = variant(world, name, change, tied=True)
        with mock.patch.object(checkpoint.log, "warning") as said:
            model = load_model(str(path), fsdp=FsdpPlan())
        assert torch.equal(logits(model), logits(whole(path))), name
        left = [call.args[1:] for call in said.call_args_list]
        expected = [("model.layers.7.what", 1)] if name == "more" and world.rank == 0 else []
        assert left == expected


@case(worlds=(2,))
def checkpoints_that_do_not_fit_are_refused(world: World) -> None:
    def refused(path: Path, plan: FsdpPlan = FsdpPlan(), dtype: str = "auto") -> str:  # noqa: B008
        return refusal(lambda: load_model(str(path), dtype, fsdp=plan), tezo_ds.ConfigError)

    up = "model.layers.1.mlp.up_proj.weight"
    for name, change, tied, telling in (
        ("lacking", without(up), True, f"it has no {up} (1 such)"),
        ("headless", without(HEAD), False, f"it has no {HEAD} (1 such)"),
        ("thin", lambda t: {**t, up: t[up][1:].clone()}, True, f"another shape of {up} (1 such)"),
    ):
        message = refused(variant(world, name, change, tied))
        assert telling in message and "cannot load a model from" in message, message

    def pickle(folder: Path) -> None:
        shutil.copytree(world.folder / "whole-True", folder)
        tensors = load_file(folder / "model.safetensors")
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def quantise(folder: Path) -> None:
        shutil.copytree(world.folder / "whole-True", folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (folder / "config.json").write_text(json.dumps(config))

    assert "convert .bin files" in refused(saved(world, "pickled", pickle))
    assert "its weights are quantised" in refused(saved(world, "quantised", quantise))
    good = tiny_checkpoint(world)
    message = refused(good, FsdpPlan(replicas=3))
    assert message == "--fsdp-replicas 3 does not divide the 2 ranks that there are"
    assert "LlamaForCausalLM has no GPT2Block" in refused(good, FsdpPlan(layers=("GPT2Block",)))


@case(worlds=(2,))
def tied_weights_that_differ_are_refused(world: World) -> None:
    """Tied weights that differ are refused: transformers unties them, but one group has one parameter for
    both."""
    changed = variant(world, "untied", lambda t: {**t, HEAD: t[EMBEDDING] + 1}, tied=True)
    message = refusal(lambda: load_model(str(changed), fsdp=FsdpPlan()), tezo_ds.ConfigError)
    assert f'its {HEAD} differs from the weight that config.json ties it to; set "tie' in message
    with mock.patch.object(fsdp, "_misfit", return_value=None):
        model = load_model(str(changed), fsdp=FsdpPlan())
    assert not torch.allclose(logits(model), logits(whole(changed)), atol=1)


@case(worlds=(2,))
def writing_shards_leaves_the_checkpoint_alone(world: World) -> None:
    """On the CPU shards are memory mapped from the checkpoint, which a write must not change."""
    path = saved(world, "whole-True", tiny("llama", True).save_pretrained) / "model.safetensors"
    before = hashlib.sha256(path.read_bytes()).digest()
    model = load_model(str(path.parent), fsdp=FsdpPlan())
    engine = tezo_ds.initialize(model, {**FIELDS, "probe": "inplace"})
    for step in range(3):
        engine.step(make_batch(4, seed=step))
    assert_write_was_seen(engine, world)
    assert hashlib.sha256(path.read_bytes()).digest() == before


def wide_checkpoint(folder: Path) -> None:
    """Writes a checkpoint of 100 MB of bfloat16 zeros, most of it in layers."""
    config = LlamaConfig(
        vocab_size=4000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=8, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    zeros = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in shapes.items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})


def most_memory(load: Callable[[], nn.Module]) -> int:
    """Measures the bytes by which this process's anonymous memory grew at most, looked at every
    millisecond. Pages mapped from files do not count: they are the page cache's, which gives them up
    when it must."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier cases left would be used again unseen
    before, over, seen = _anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.001):
            seen.append(_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = load()
    finally:
        over.set()
        watcher.join()
    assert sum(p.numel() for p in model.parameters()) > 50e6
    return max(*seen, _anonymous()) - before


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the kernel does not say")


@case(worlds=(3,))
def loading_takes_the_memory_of_a_shard(world: World) -> None:
    path = saved(world, "wide", wide_checkpoint)
    numel = sum(tensor.numel() for tensor in load_file(path / "model.safetensors").values())
    shard, small = 4 * numel // world.size, 16 * 2**20

    def by_shards() -> nn.Module:  # as float32, so that nothing is only mapped from the file
        return load_model(str(path), "float32", fsdp=FsdpPlan())

    def all_at_once() -> nn.Module:
        return fully_shard(whole(path, torch.float32))

    assert 4 * numel > 200e6
    found = most_memory(by_shards)
    assert shard // 2 < found < shard + small, (found, shard)
    found = most_memory(all_at_once)
    assert found > shard + small, (found, shard)
