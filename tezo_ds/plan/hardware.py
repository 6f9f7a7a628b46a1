"""Accelerators and networks: their makers' numbers, in bytes, seconds and FLOPs, for flags to override."""

from __future__ import annotations

from dataclasses import dataclass

from tezo_ds.errors import ConfigError
from tezo_ds.plan.needs import GIB


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        memory: bytes.
        flops: FLOPs a second, dense, bfloat16 (float16 where the accelerator has none).
        hbm: bytes a second from and to its own memory.
        nvlink: bytes a second that it receives from others of its node.
    """

    memory: int
    flops: float
    hbm: float
    nvlink: float


# Dense 16-bit tensor rates, memory and NVLink (or PCIe) of one direction, from NVIDIA's data sheets of each.
GPUS = {
    "h200-141g": Gpu(141 * 10**9, 989e12, 4.8e12, 450e9),  # H200 SXM
    "h100-80g": Gpu(80 * GIB, 989e12, 3.35e12, 450e9),  # H100 SXM5: NVLink 900 GB/s both ways
    "h100-pcie-80g": Gpu(80 * GIB, 756e12, 2.0e12, 64e9),  # PCIe 5 x16, without a bridge
    "a100-80g": Gpu(80 * GIB, 312e12, 2.039e12, 300e9),  # A100 SXM4: NVLink 600 GB/s both ways
    "a100-40g": Gpu(40 * GIB, 312e12, 1.555e12, 300e9),
    "v100-32g": Gpu(32 * GIB, 125e12, 0.9e12, 150e9),  # float16; NVLink 300 GB/s both ways
    "l40s-48g": Gpu(48 * GIB, 362e12, 0.864e12, 32e9),  # PCIe 4 x16
    "a10g-24g": Gpu(24 * GIB, 70e12, 0.6e12, 32e9),  # AWS g5; PCIe 4 x16
    "rtx-4090": Gpu(
        24 * GIB, 165.2e12, 1.008e12, 32e9
    ),  # Ada white paper, float32 sums; PCIe 4 x16
}


@dataclass(frozen=True)
class Cluster:
    """Ranks on nodes.

    Attributes:
        gpu: every rank's accelerator.
        world, per_node: ranks in all, and of a node.
        link: bytes a second that a node receives from others, all its adapters together.
        efficiency: share of `gpu.flops` that large products reach.
        latency_inside, latency_between: seconds that each hop of a ring adds to a collective. NCCL's own
            model has 3.4 and 14 microseconds for rings of its Simple protocol (tuning.cc, hwLat).
        reserved: bytes on each accelerator that no tensor takes: CUDA's context, NCCL's and cuBLAS's
            buffers, and fragments. An assumption.
    """

    gpu: Gpu
    world: int
    per_node: int
    link: float = 400e9 / 8
    efficiency: float = 0.5
    latency_inside: float = 3.4e-6
    latency_between: float = 14e-6
    reserved: int = 2 * GIB

    def __post_init__(self) -> None:
        if self.per_node < 1 or self.world % min(self.per_node, self.world):
            raise ConfigError(
                f"--per-node {self.per_node} does not divide --world {self.world}; give whole nodes"
            )

    @property
    def in_node(self) -> int:
        """Number of ranks of a node that are in the world."""
        return min(self.per_node, self.world)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.world // self.in_node


def gpu(name: str) -> Gpu:
    """Returns the accelerator of a name.

    Raises:
        ConfigError: the name is not in the table.
    """
    if name not in GPUS:
        raise ConfigError(
            f"--gpu {name} is not known; name one of {', '.join(GPUS)}, and override its numbers by "
            "--memory, --flops, --hbm and --nvlink"
        )
    return GPUS[name]
