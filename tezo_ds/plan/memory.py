"""Memory of a rank, from shapes: what lies there for the whole run, and the largest stage of a forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tezo_ds.directions.lowrank import BLOCK_NUMEL
from tezo_ds.losses.head import CHUNK_NUMEL
from tezo_ds.models.structure import kind_of, sizes_of
from tezo_ds.plan.job import Job

# bf16 weights and gradients, float32 weights, two moments, and 2 more: DeepSpeed's own
# estimate_zero3_model_states_mem_needs counts 18 bytes a parameter.
ADAM = 18
# A block's activations that its backward needs, in 16 bits and without attention scores, are 34 bytes times
# tokens times d: Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1.
BACKWARD = 34


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the peak of a step.

    Attributes:
        shard: shards of the weights, a second copy included.
        factors: U and V; in place, copies of the trained shards.
        state: the method's state; for Adam gradients, moments and float32 weights.
        gathered: whole weights, at the stage that takes most.
        activations: activations at that stage, logits aside.
        logits: logits at that stage.
        reserved: memory that no tensor takes; assumed.
        stage: "embedding", "block", "output layer" or, in place, "writing".
    """

    shard: int
    factors: int
    state: int
    gathered: int
    activations: int
    logits: int
    reserved: int
    stage: str

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return self.total - self.reserved

    @property
    def total(self) -> int:
        """Total bytes, reserve included."""
        kept = self.shard + self.factors + self.state + self.reserved
        return kept + self.gathered + self.activations + self.logits


def engine(job: Job) -> Memory:
    """Returns the memory of this engine's step, fused or in place as the job's config has it."""
    need = job.need
    stages = _stages(job)
    if not job.run.fused:
        # A block of a shard and of its change, in float32. No weights are gathered meanwhile.
        largest = max(-(-p.numel() // job.layout.shards) for p in job.module.parameters())
        stages["writing"] = (0, 2 * 4 * min(BLOCK_NUMEL, largest), 0)
    return _largest(job, need.shard, need.probe, need.state, stages)


def adam(job: Job) -> Memory:
    """Returns the memory of first-order Adam under the same sharding by DeepSpeed or FSDP2, with activation
    checkpointing: every block's input is kept and the block run again for its backward."""
    shape, shard = job.shape, job.need.shard
    tokens = job.examples_at_once * job.length
    d = tokens * shape.hidden * shape.itemsize
    kept = shape.layers * d
    block = BACKWARD * d // 2 + kept
    # All positions in 16 bits and in float32, and the latter's gradient.
    logits = tokens * shape.vocabulary * (shape.itemsize + 4 + 4)
    outside, largest = job.groups_of_weights if job.gathers else (0, 0)
    whole = outside + 2 * largest, outside
    if (
        job.ahead.moments
    ):  # its order goes on into the backward, so that something always lies ahead
        whole = (max(moment.most for moment in job.ahead.moments),) * 2
    stages = {"block": (whole[0], block, 0), "output layer": (whole[1], kept, logits)}
    state = (ADAM - 2) * (shard // shape.itemsize)
    return _largest(job, shard, 0, state, stages)


def largest_batch(job: Job, of: Callable[[Job], Memory], most: int = 1 << 20) -> int:
    """Returns how many examples a rank fit into its accelerator; 0: not even one.

    Args:
        job: a job, of any number of examples.
        of: `engine` or `adam`.
        most: the most examples to try.
    """

    def fits(examples: int) -> bool:
        return of(job.with_examples(examples)).total <= job.cluster.gpu.memory

    if not fits(1):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


Stages = dict[str, tuple[int, int, int]]  # gathered, activations, logits


def _stages(job: Job) -> Stages:
    """Returns the stages of a forward without gradients. Widths in comments are those of `shapes.Outline`."""
    shape = job.shape
    unit = job.tokens * shape.itemsize
    # The embedded tokens, the block's input, the sum after attention and the normed input of the MLP; then
    # what the MLP makes of that.
    mlp = 4 * shape.hidden + shape.wide * shape.inner
    # The first two and the normed input; q, k, v; and the rotation of q.
    attention = 3 * shape.hidden + 4 * shape.queries + 2 * shape.keys
    labels = job.branches_at_once * job.examples_at_once * job.labels
    chunk = min(
        labels * shape.vocabulary, max(CHUNK_NUMEL, job.branches_at_once * shape.vocabulary)
    )
    # As the layer gives them, in float32 where that is wider, and their log-softmax.
    each = shape.itemsize + 4 + (4 if shape.itemsize < 4 else 0)
    last = (3 * unit * shape.hidden, chunk * each)
    if job.ahead.moments:
        return _stages_ahead(job, unit, mlp, attention, last)
    # FSDP2 lets go of a gathered message when the next one is used: that of a group lies beside its
    # weights, and at the first block still the outer group's.
    outside, block = job.groups_of_weights if job.layout.by_rows else (0, 0)
    return {
        "embedding": (2 * outside + block, unit * shape.hidden, 0),
        "block": (outside + 2 * block + job.unpacked, unit * max(mlp, attention), 0),
        "output layer": (outside + block, *last),
    }


def _stages_ahead(job: Job, unit: int, mlp: int, attention: int, last: tuple[int, int]) -> Stages:
    """Returns the stages under ZeRO-3, which frees each weight after its use: with most activations while the
    input of a Linear is made, before the Linear is entered; with most weights while the Linear gathers."""
    shape, inner = job.shape, job.in_blocks
    first, block, last_layers = [(0, 0)], [(0, 0)], [(0, 0)]
    for moment in job.ahead.moments:
        module = moment.visit.module
        if module not in inner:
            (last_layers if len(block) > 1 else first).append((moment.most, unit * shape.hidden))
            continue
        linear = kind_of(module) in ("linear", "conv1d")
        within = unit * (mlp if linear and sizes_of(module)[1] == shape.inner else attention)
        block += [(moment.before, within), (moment.most, unit * 4 * shape.hidden)]
    return {
        "embedding": (*max(first, key=sum), 0),
        "block": (*max(block, key=sum), 0),
        "output layer": (max(last_layers)[0], *last),
    }


def _largest(job: Job, shard: int, factors: int, state: int, stages: Stages) -> Memory:
    name = max(stages, key=lambda stage: sum(stages[stage]))
    return Memory(shard, factors, state, *stages[name], job.cluster.reserved, name)
