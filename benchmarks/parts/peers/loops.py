"""The loops of forward-only peers, for `benchmarks/peers.py`: what their users would run in one process.

MeZO and LOZO are written here from the published algorithms, in words of our own, and use nothing of
tezo_ds; `eggroll-es` is the package of that name, called by its documented interface. Both loops add in
place, where the authors' trainers make a second tensor of each parameter for a moment.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]

ES_PAIRS, ES_SIGMA, ES_RANK = 8, 0.02, 16
LOZO_RANK, LOZO_NU = 2, 50


class MezoLoop:
    """MeZO-SGD (arXiv 2305.17333, algorithm 1).

    A direction is never kept: it is drawn again from the step's seed for each of four walks over the
    weights (up, down by two, back, update), which write them in place.

    Args:
        parameters: parameters that train; written.
        loss: loss of a batch, at the parameters as they are.
        lr: η.
        rho: ρ, in the paper ε.
        seed: seed from which every step's seed comes.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], loss: Loss, lr: float, rho: float, seed: int
    ) -> None:
        self._parameters, self._loss, self._lr, self._rho = list(parameters), loss, lr, rho
        self._seeds = random.Random(seed)
        self._steps = 0

    @torch.no_grad()
    def step(self, batch: Batch) -> float:
        """Makes one step; returns the slope κ that was measured."""
        self._begin(self._steps)
        seed = self._seeds.randrange(10**9)
        self._walk(seed, self._rho)
        above = self._loss(batch).item()
        self._walk(seed, -2 * self._rho)
        below = self._loss(batch).item()
        self._walk(seed, self._rho)
        kappa = (above - below) / (2 * self._rho)
        self._walk(seed, -self._lr * kappa)
        self._steps += 1
        return kappa

    def _begin(self, step: int) -> None:
        """Makes what a step needs before its seed is drawn."""

    def _walk(self, seed: int, scale: float) -> None:
        """Adds scale · Z to every parameter, Z the direction of this seed."""
        torch.manual_seed(seed)
        for index, parameter in enumerate(self._parameters):
            parameter.data.add_(self._direction(index, parameter), alpha=scale)

    def _direction(self, index: int, parameter: nn.Parameter) -> Tensor:
        return torch.randn_like(parameter)


class LozoLoop(MezoLoop):
    """LOZO-SGD (arXiv 2410.07698, algorithm 1): the same walks with Z = UVᵀ.

    U is drawn from the step's seed, V anew at every ν-th step and kept; vectors get dense normals. V comes
    before the seed is set, so that all four walks of a step draw the same U. (The authors' released
    trainer draws V within the walks that perturb and not within the one that updates, so that on those
    steps it moves along a U that it did not measure; that is not repeated here.) As in that trainer, and
    other than in the paper, the update is not divided by the rank.

    Args:
        rank: r.
        nu: ν, steps that a V lasts.
    """

    def __init__(self, *args: Any, rank: int = LOZO_RANK, nu: int = LOZO_NU, **more: Any) -> None:
        super().__init__(*args, **more)
        self._rank, self._nu = rank, nu
        self._rights: dict[int, Tensor] = {}  # V (n, r) by place among the parameters

    def _begin(self, step: int) -> None:
        if step % self._nu:
            return
        torch.manual_seed(self._seeds.randrange(10**9))
        for index, parameter in enumerate(self._parameters):
            if parameter.dim() > 1:
                self._rights[index] = _normals(parameter, parameter.shape[1], self._rank)

    def _direction(self, index: int, parameter: nn.Parameter) -> Tensor:
        if index not in self._rights:
            return super()._direction(index, parameter)
        U = _normals(parameter, parameter.shape[0], self._rank)  # (m, r)
        return U @ self._rights[index].T  # (m, n)


def _normals(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


class EggrollLoop:
    """The ES of PyPI's `eggroll-es`; fitness is minus the loss.

    Args:
        model: a model, whose parameters train where their name contains `target`; written.
        target: a part of a name; None: all.
        loss, lr, seed: as of `MezoLoop`.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(
        self, model: nn.Module, target: str | None, loss: Loss, lr: float, seed: int
    ) -> None:
        from eggroll import CustomReward, EggrollConfig, EggrollTrainer

        config = EggrollConfig(
            population_size=ES_PAIRS, rank=ES_RANK, sigma=ES_SIGMA, lr=lr, seed=seed,
            target_modules=None if target is None else [target],
            device=str(next(model.parameters()).device),
        )  # fmt: skip
        fitness = CustomReward(lambda _, batch: -loss(batch).item())
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every generation
            self._trainer = EggrollTrainer(model, config, fitness)

    def evolve(self, batches: Sequence[Batch]) -> None:
        """Makes a generation on each batch; leaves the model with the weights after the generation of which a
        member was fittest, as the package does."""
        self._trainer.config.generations = len(batches)
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            self._trainer.evolve(batches)


def chosen(model: nn.Module, patterns: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters, vectors too, whose names match a glob pattern."""
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name, parameter
