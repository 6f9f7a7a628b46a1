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
        collectives: number of collectives that bring them, all times together.
        received: bytes of weights and gradients that each rank receives.
        inside: bytes that all ranks of a node receive from neighbours in it.
        between: bytes that a node receives from other nodes.
        scalars: bytes of each message of our own.
    """

    times: int
    gathered: int
    collectives: int
    received: int
    inside: int
    between: int
    scalars: tuple[int, ...]


def engine(job: Job) -> Traffic:
    """Returns the traffic of this engine: one gather a forward."""
    return _ring(job, job.forwards if job.gathers else 0, job.scalars)


def adam(job: Job) -> Traffic:
    """Returns the traffic of first-order training: weights gathered for the forward and again for the
    backward, and gradients of 16 bits reduced; replicas all-reduce gradients, as much as two gathers."""
    micro = -(-job.examples // job.examples_at_once)
    return _ring(job, 3 * micro if job.gathers else 2, ())


def _ring(job: Job, times: int, scalars: tuple[int, ...]) -> Traffic:
    """Returns the traffic around a ring: each rank passes on to the next what the one before sent, and one
    rank of each node receives from another node."""
    ranks = job.gather_ranks if job.gathers else job.cluster.world
    whole = job.gathered_bytes or sum(p.nbytes for p in job.module.parameters())
    received = times * whole * (ranks - 1) // ranks
    in_node = job.cluster.in_node
    crosses = ranks > in_node
    return Traffic(
        times=times,
        gathered=whole,
        collectives=times * (job.messages if job.gathers else 1),
        received=received,
        inside=received * (in_node - crosses),
        between=received if crosses else 0,
        scalars=scalars,
    )
