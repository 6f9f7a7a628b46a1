"""Three steps on a tiny model that is sharded as the run will be, against one process without sharding.

In float32, whatever the run's dtype: there, equal means equal up to the order of sums.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tezo_ds.config import TezoConfig
from tezo_ds.doctor.report import Failed, Row
from tezo_ds.engine.engine import Engine
from tezo_ds.engine.replicas import listed
from tezo_ds.settings import Settings
from tezo_ds.sharding import Sharding, sharding_of
from tezo_ds.sharding.replicated import alone
from tezo_ds.sharding.world import local_device

CHECK = "self-test"
STEPS, LENGTH, VOCABULARY = 3, 11, 61
# Of the largest coefficient; other orders of float32 sums, divided by 2ρ, make 1e-4.
TOLERANCE = 2e-3
PROBES = ("fused", "inplace")

Found = dict[str, Tensor]  # coefficients (D,) by probe


def tiny_model() -> nn.Module:
    """A Llama of sizes that nothing divides, with the same bits on every machine: integers from the
    seed, and one multiplication."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=22, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=10, intermediate_size=37, max_position_embeddings=64,
        tie_word_embeddings=True, dtype=torch.float32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            drawn = torch.randint(-999, 1000, parameter.shape, generator=generator)
            parameter.data.copy_(drawn * 2**-12)
    return model


def batches(world_size: int) -> list[dict[str, Tensor]]:
    """Yields batches of all ranks together, one a step: (2 · world_size + 1, LENGTH), with ragged ends."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        shape = (2 * world_size + 1, LENGTH)
        ids = torch.randint(0, VOCABULARY, shape, generator=generator)
        lengths = torch.randint(5, LENGTH + 1, shape[:1], generator=generator)
        mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)})
    return made


def coefficients(sharding: Sharding, probe: str, world_size: int) -> Tensor:
    """What three steps learn: float64 (D,).

    Args:
        sharding: of the tiny model.
        probe: fused or inplace.
        world_size: for how many ranks the batches are made; each takes its part.
    """
    fields: dict[str, Any] = {"rank": 3, "rho": 1e-2, "lr": 1e-3, "queries": 2, "probe": probe}
    engine = Engine(sharding, TezoConfig(**fields), None)
    sharding.module.eval()
    for batch in batches(world_size):
        part = {
            name: whole.tensor_split(sharding.world_size)[sharding.rank].to(sharding.device)
            for name, whole in batch.items()
        }
        engine.step(part)
    return engine.method.coefficients.clone()


def sharded(settings: Settings, deepspeed: dict[str, Any] | None) -> Sharding:
    """The tiny model, as the run's flags say; in float32, and NVMe's part in memory."""
    model = tiny_model()
    if settings.fsdp:
        from tezo_ds.models.fsdp import FsdpPlan, shard_whole

        plan = FsdpPlan(settings.fsdp_replicas, None, settings.fsdp_offload_params)
        return sharding_of(shard_whole(model, local_device(), plan))
    if deepspeed is None:
        return sharding_of(model.to(local_device()))
    config = copy.deepcopy(deepspeed)
    for block in ("bf16", "fp16"):
        config.pop(block, None)
    offload = config["zero_optimization"].get("offload_param")
    if offload and offload.get("device") == "nvme":
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return sharding_of(model, config)


def run(settings: Settings, deepspeed: dict[str, Any] | None, world_size: int) -> Found | str:
    """Coefficients by probe, as this rank has them; or why there is nothing to compare."""
    sharding = sharded(settings, deepspeed)
    if sharding.quantised:
        return f"weights are quantised ({sharding.quantised}), so nothing is equal to compare"
    return {probe: coefficients(sharding, probe, world_size) for probe in PROBES}


def expected(world_size: int) -> Found:
    """Returns the coefficients of one process that has the examples of all ranks."""
    return {
        probe: coefficients(alone(tiny_model().to(local_device())), probe, world_size)
        for probe in PROBES
    }


def judge(found: Mapping[int, Found | str | Failed], wanted: Found, how: str) -> Row:
    """The row.

    Args:
        found: by rank, of all.
        wanted: of one process.
        how: the weights were sharded, in words.
    """
    learnt: dict[int, Found] = {}
    for rank, answer in found.items():
        if isinstance(answer, str):
            return Row(CHECK, "unchecked", answer)
        if isinstance(answer, Failed):
            return Row(CHECK, "red", f"{how}: rank {rank}: {answer.why}", "see to this error")
        learnt[rank] = answer
    for probe in wanted:
        odd = [r for r in learnt if not torch.equal(learnt[r][probe], learnt[0][probe])]
        if odd:
            said = f"{how}, {probe} probe: {listed(odd)} learnt something else than rank 0"
            return Row(CHECK, "red", said, "compare libraries and hardware of these ranks")
    largest = max(_difference(learnt[0][probe], wanted[probe]) for probe in wanted)
    text = (
        f"{how}, {' and '.join(wanted)} probe: {STEPS} steps, coefficients within {largest:.1e} of those "
        "of one process"
    )
    if not largest <= TOLERANCE:
        text += f", allowed are {TOLERANCE:.0e}"
        return Row(
            CHECK, "red", text, "do not train with this sharding here; report it with this table"
        )
    return Row(CHECK, "green", text)


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
