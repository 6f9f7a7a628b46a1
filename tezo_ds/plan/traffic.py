"""Bytes that a step moves inside of nodes and between them."""

from __future__ import annotations

from dataclasses import dataclass

from tezo_ds.plan.job import Job


@dataclass(frozen=True)
class Traffic:
    """Bytes and collectives of a step.

    Attributes:
        times: how often the bytes of a forward's gathers go over the wire.
        gathered: bytes of a forward's gathers, padding included.
        left_out: bytes of all these gathers that forwards without the trunk do not need.
        collectives: number of collectives that bring the others, all times together.
        received: bytes of weights and gradients that each rank receives.
        inside: bytes that all ranks of a node receive from neighbours in it.
        between: bytes that a node receives from other nodes.
        scalars: bytes of each message of our own.
    """

    times: int
    gathered: int
    left_out: int
    collectives: int
    received: int
    inside: int
    between: int
    scalars: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes that all gathers of a step bring together, padding included."""
        return self.times * self.gathered - self.left_out


def engine(job: Job) -> Traffic:
    """Returns the traffic of this engine: one gather a forward, of the trunk one for all branches or none."""
    times = job.forwards if job.gathers else 0
    return _ring(job, times, job.scalars, without=max(times - job.trunk_forwards, 0))


def adam(job: Job) -> Traffic:
    """Returns the traffic of first-order training: weights gathered for the forward and again for the
    backward, and gradients of 16 bits reduced; replicas all-reduce gradients, as much as two gathers."""
    micro = -(-job.examples // job.examples_at_once)
    return _ring(job, 3 * micro if job.gathers else 2, ())


def _ring(job: Job, times: int, scalars: tuple[int, ...], without: int = 0) -> Traffic:
    """Returns the traffic around a ring: each rank passes on to the next what the one before sent, and one
    rank of each node receives from another node. `without` of the forwards do not need the trunk."""
    ranks = job.gather_ranks if job.gathers else job.cluster.world
    whole = job.gathered_bytes or sum(p.nbytes for p in job.module.parameters())
    nbytes, messages = job.saved if without else (0, 0)
    received = (times * whole - without * nbytes) * (ranks - 1) // ranks
    in_node = job.cluster.in_node
    crosses = ranks > in_node
    return Traffic(
        times=times,
        gathered=whole,
        left_out=without * nbytes,
        collectives=times * (job.messages if job.gathers else 1) - without * messages,
        received=received,
        inside=received * (in_node - crosses),
        between=received if crosses else 0,
        scalars=scalars,
    )
