"""An export from shards: the files of one process, in the memory of a shard and two layers."""

from __future__ import annotations

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from tiny import VOCABULARY, make_batch, part_of, tiny
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from world_fsdp2 import sharded as fully_sharded
from world_replicated import FIELDS, alone
from world_zero3 import ZERO3, sharded
from worlds import World, case

from tezo_ds.cli import app
from tezo_ds.engine.engine import Engine
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.engine.report import StepReport
from tezo_ds.export.coefficients import save_coefficients
from tezo_ds.export.merged import save_merged
from tezo_ds.models import loading
from tezo_ds.run.folder import COEFFICIENTS, CONFIG, JOURNAL
from tezo_ds.run.journal import Journal
from tezo_ds.sharding import zero3

LAYERS = 14  # of the deep model
PERSISTENT = {"stage3_param_persistence_threshold": 100_000}


def written(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Reads the tensors of each file."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_files(ours: Path, theirs: Path) -> None:
    found, expected = written(ours), written(theirs)
    assert {file: list(found[file]) for file in found} == {f: list(expected[f]) for f in expected}
    for file, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[file][name], tensor, rtol=1e-6, atol=1e-6)
    for name in {path.name for path in theirs.glob("*.json")}:
        assert (ours / name).read_text() == (theirs / name).read_text(), name


@case(worlds=(3,))
def exports_of_shards_are_those_of_one_process(world: World) -> None:
    for i, (kind, tied, make) in enumerate(
        (
            ("llama", True, partial(sharded, zero=PERSISTENT)),  # gathered for good by and by
            ("opt", False, sharded),
            ("neox", False, sharded),
            ("roberta", True, sharded),
            ("llama", True, fully_sharded),
            ("opt", False, fully_sharded),
        )
    ):
        engine, reference = make(kind, tied), alone(kind, tied, {})
        batch = part_of(make_batch(6), world.rank, world.size)
        for _ in range(3):
            engine.step(batch)
        reference.load_coefficients(engine.coefficients())
        loss = engine.loss(batch)
        ours, theirs = world.folder / f"{kind} {i}", world.folder / f"{kind} {i} alone"
        save_merged(engine, ours)
        save_merged(reference, theirs)
        if world.rank == 0:
            assert_same_files(ours, theirs)
            model = type(reference.sharding.module).from_pretrained(ours).eval()
            with torch.no_grad(), reference.applied():
                ids = make_batch(2)["input_ids"]
                expected = reference.sharding.module(ids).logits
                torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
        assert engine.loss(batch) == loss
        engine.step(batch)


def stepped(engine: Engine, world: World, steps: int) -> list[StepReport]:
    """Takes some steps over all ranks."""
    batches = (part_of(make_batch(6, seed=step), world.rank, world.size) for step in range(steps))
    return [engine.step(batch) for batch in batches]


def assert_same_result(ours: Engine, theirs: Engine, exactly: bool) -> None:
    """Compares the weights of two engines, updates that are kept aside included."""
    found, expected = ours.state_dict(), theirs.state_dict()
    for name, tensor in expected.items():
        if exactly:
            assert torch.equal(found[name], tensor)
        elif found:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@case(worlds=(3,), bits=True)
def ended_periods_are_written_into_shards_again(world: World) -> None:
    fields = {"refresh_every": 2, "lr": 3e-3}
    batch = part_of(make_batch(6), world.rank, world.size)
    for make in (sharded, fully_sharded):
        engine = make(fields=fields)
        stepped(engine, world, 5)
        saved, loss = engine.coefficients(), engine.loss(batch)
        assert all(len(part) == 3 for part in saved.values())
        again, reference = make(fields=fields), alone("llama", True, fields)
        again.load_coefficients(saved)
        assert again.loss(batch) == loss
        assert_same_result(again, engine, exactly=True)
        reference.load_coefficients(saved)
        assert_same_result(engine, reference, exactly=False)
        # Without the handling: the current period alone.
        last = make(fields=fields)
        last.load_coefficients({name: part[-1] for name, part in saved.items()})
        assert abs(last.loss(batch) - loss) > 1e-3


@case(worlds=(3,), bits=True)
def slopes_of_a_sharded_run_rebuild_it_anywhere(world: World) -> None:
    few = {"include": ["*layers.0.*"], "lr": 2e-4, "queries": 1}
    for fields in ({"method": "lozo", "nu": 2}, {"method": "mezo"}):
        fields = {**few, **fields}
        engine = sharded(fields=fields)
        lines = json.loads(
            json.dumps([[r.step, r.kappa, r.lr, r.rho] for r in stepped(engine, world, 3)])
        )
        whole = alone("llama", True, fields)
        before = whole.state_dict()
        for other in (sharded(fields=fields), fully_sharded(fields=fields), whole):
            for line in lines:
                other.replay(*line)
            same = type(other.sharding) is type(engine.sharding)
            assert_same_result(other, engine, exactly=same)
        for name, tensor in whole.state_dict().items():  # on rank 0
            assert torch.equal(before[name], tensor) == (name not in whole.space.slices)


def deep() -> tuple[nn.Module, int, int]:
    """Makes a deep model; returns it, the bytes of its largest layer, and the bytes of all its parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=46, intermediate_size=121, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=10, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert layer > 4 * model.model.embed_tokens.weight.numel()
    return model, layer, 4 * sum(p.numel() for p in model.parameters())


@case(worlds=(3,))
def an_export_takes_a_shard_and_two_layers(world: World) -> None:
    model, layer, whole = deep()
    # Making factors takes thousands of small operators a matrix, each of which is looked at.
    engine = sharded(model=model, fields={"include": ["*embed*", "*down_proj*", "lm_head*"]})
    engine.method.coefficients.fill_(1.0)
    batch = part_of(make_batch(3), world.rank, world.size)
    for _ in range(3):
        engine.loss(batch)
    shard = sum(p.ds_tensor.nbytes for p in engine.sharding.module.parameters())
    assert whole > 1.5 * (shard + 2 * layer)
    with LiveBytes() as memory:  # all but the shards, which were there before
        save_merged(engine, world.folder / "streamed")
    assert 0 < memory.peak <= 2 * layer, f"{memory.peak / layer} layers"
    if world.rank == 0:
        assert memory.peak > 0.9 * layer  # it saw what a file holds
        sizes = [path.stat().st_size for path in (world.folder / "streamed").glob("*.safetensors")]
        assert len(sizes) == LAYERS + 2 and max(sizes) < 1.1 * layer
        assert sum(sizes) > whole

    at_once = {id(tensor): tensor.nbytes for tensor in engine.state_dict().values()}
    if world.rank == 0:
        assert sum(at_once.values()) >= whole > 2 * layer


@case(worlds=(3,))
def layers_that_are_written_are_given_back(world: World) -> None:
    """The first of two large embeddings in a row is let go of before the second is gathered."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=999, max_position_embeddings=997, hidden_size=22, word_embed_proj_dim=22,
        num_hidden_layers=1, num_attention_heads=2, ffn_dim=37,
    )  # fmt: skip
    engine = sharded(model=OPTForCausalLM(config).eval(), fields={"include": ["*fc1*"]})
    embedding = 4 * 999 * 22
    peaks = []
    for resize in (torch.UntypedStorage.resize_, lambda storage, size: storage):
        with mock.patch.object(torch.UntypedStorage, "resize_", resize), LiveBytes() as memory:
            save_merged(engine, world.folder / f"given back {len(peaks)}")
        peaks.append(memory.peak / embedding)
    if world.rank == 0:
        assert peaks[0] <= 2 < 2.9 < peaks[1], peaks


@case(worlds=(2,))
def launched_ranks_shard_an_export_as_the_run_did(world: World) -> None:
    """`tezo-ds export` without --deepspeed shards on two ranks as the run did, which had one."""
    model, run, folder = (world.folder / name for name in ("model", "run", "exported"))
    reference = alone("llama", True, {})
    reference.method.coefficients.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    if world.rank == 0:
        make_run(model, run, reference.coefficients())
    torch.distributed.barrier()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            app(["export", "--run", str(run), "--merged", str(folder)], standalone_mode=False)
    finally:
        loading._zero_configs.clear()
    if world.rank:
        assert said.getvalue() == ""
        return
    assert "Zero3 on 2 rank(s)" in said.getvalue()
    save_merged(reference, world.folder / "expected")
    assert_same_files(folder, world.folder / "expected")
    assert (folder / "tokenizer.json").exists()


def make_run(model: Path, run: Path, coefficients: dict[str, Tensor]) -> None:
    """Writes what an export reads of a ZeRO-3 run of the tiny model."""
    tiny().save_pretrained(model)
    tiny_tokenizer(["a film"]).save_pretrained(model)
    run.mkdir()
    save_coefficients(coefficients, run / COEFFICIENTS)
    Journal(run / JOURNAL, {}).close()
    config = {
        "tezo": FIELDS,
        "settings": {"model": str(model), "task": "none of an export's business"},
        "weights_dtype": "float32",
        "batch_size": 4,
        "versions": {},
        "deepspeed": zero3.prepare(ZERO3),
    }
    (run / CONFIG).write_text(json.dumps(config))
