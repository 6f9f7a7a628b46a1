"""How label words' logits answer to what one layer adds to the hidden states, by forwards alone.

Branch 0 of a forward is the model as it is; in branch c the layer's result at the labelled position is moved
by ε u_c. The mean of (z_c - z) / ε over examples is R, C numbers for each of C directions, and a term U A x
at the layer moves the logits of an example by Rᵀ A x: as far as they answer linearly and alike, and the
labelled position's own x is what counts, while later blocks also attend to what the term adds elsewhere. So
C + 1 branches of some examples measure all C·n numbers of A, where directions in the weight itself would
need a pair of branches each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tezo_ds.losses.objective import IGNORE, Objective, targets
from tezo_ds.output_layer.states import Batches
from tezo_ds.trunk.stand_ins import replaced
from tezo_ds.trunk.trunk import Trunk

LEAST = 1e-2  # singular values of R below this share of the largest count as none
STEP = 0.05  # ε, over the root mean square length of the hidden states behind the block


class _Moved:
    """The layer's forward: moves branch c by ε u_c at some positions.

    Args:
        directions: ε u_c, (C, m).
    """

    def __init__(self, directions: Tensor) -> None:
        self._directions = directions
        self.positions: Tensor | None = (
            None  # of one copy's flattened (B * T,); None: moves nothing
        )

    def __call__(self, y: Tensor) -> Tensor:
        if self.positions is None:
            return y
        branches, at = 1 + len(self._directions), self.positions.to(y.device)
        moves = self._directions.to(y.device, y.dtype)[:, None]  # (C, 1, m)
        y = y.clone()
        y.view(branches, -1, y.shape[-1])[1:, at] += moves
        return y


class _Answers:
    """Sum of the words' logits' changes, as `Objective.responding` hands out logits of all branches."""

    def __init__(self, words: int) -> None:
        self.sum = torch.zeros(words, words, dtype=torch.float64)  # (directions, words)
        self.count = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        wide = logits.double()  # (1 + C, k, C)
        self.sum += (wide[1:] - wide[0]).sum(dim=1).cpu()
        self.count += len(labels)


def measure(
    objective: Objective, path: str, batches: Batches, directions: Tensor, eps: float
) -> Tensor:
    """Measures R on batches, as many on every rank: float64 (C, C), over all ranks.

    Args:
        objective: of the model, with its C choices.
        path: the layer.
        batches: batch, and which of its examples are held out, which does not matter here.
        directions: u_c, float32 (C, m).
        eps: ε.
    """
    sharding, branches = objective.sharding, 1 + len(directions)
    layer, moved = sharding.module.get_submodule(path), _Moved(eps * directions)
    project, trunk, micro = layer.forward, objective.trunk, objective.micro_batch
    objective.trunk, objective.micro_batch = Trunk(sharding, {f"{path}.weight"}, needed=False), 0
    answers = _Answers(len(directions))
    try:
        with replaced(layer, lambda x: moved(project(x))):
            for batch, _ in batches:
                moved.positions = None
                objective.settle(batch, branches)  # by forwards of two of the examples
                wanted = targets(sharding.module, batch["labels"]).reshape(-1)
                moved.positions = (wanted != IGNORE).nonzero()[:, 0]
                with objective.responding(answers):
                    objective(batch, branches)
    finally:
        objective.trunk, objective.micro_batch = trunk, micro
    count = torch.tensor([float(answers.count)], dtype=torch.float64)
    both = torch.cat([answers.sum.flatten(), count]).to(sharding.device)
    total = sharding.all_reduce(both).cpu()
    return total[:-1].view_as(answers.sum) / total[-1] / eps


def solved(responses: Tensor, change: Tensor) -> Tensor:
    """Returns A for which Rᵀ A is a wanted change of the logits, but for what moves all words alike: float32
    (C, n), by least squares.

    Args:
        responses: R, float64 (C, C).
        change: what the logits' change is to be of x, (C, n).
    """
    words = len(responses)
    apart = torch.eye(words, dtype=torch.float64) - 1 / words
    inverse = torch.linalg.pinv(apart @ responses.t(), rtol=LEAST)
    return (inverse @ apart @ change.double()).float()
