"""Each example's own directions in loop form: one example, one direction and one branch at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tezo_ds
from tezo_ds.directions.branches import Ask
from tezo_ds.methods import reference

OWN = {"rank": 3, "rho": 1e-2, "lr": 3e-4, "seed": 11, "placement": "per_example", "queries": 2}
ORACLE = {
    "tezo": {}, "tezo-m": {"refresh_every": 3}, "tezo-adam": {"lr": 1e-4}, "tezo-adam-coef": {"lr": 1e-4},
    "lozo": {"nu": 3}, "lozo-m": {"nu": 3},
}  # fmt: skip


def ragged(examples: int, seed: int = 0, length: int = 11) -> dict[str, Tensor]:
    """Makes a batch of very unequal numbers of labels, the third of four examples none: (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 61, (examples, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(examples):
        first = (1, 7, length, 4)[row % 4]
        labels[row, :first] = -100
        end = length - row % 3
        mask[row, end:] = 0
        labels[row, end:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def labelled(batch: dict[str, Tensor]) -> list[int]:
    """Returns the examples that carry a label behind their first position, or a class."""
    if batch["labels"].dim() == 1:
        return (batch["labels"] != -100).nonzero()[:, 0].tolist()
    return [i for i, row in enumerate(batch["labels"][:, 1:]) if bool((row != -100).any())]


def slopes_in_a_loop(
    make: Callable[[], nn.Module], batch: dict[str, Tensor], fields: dict, step: int = 0
) -> list[float]:
    """Returns κ of every direction of a step, by the in-place probe on one example after another.

    The model is one that `make` makes, at the start of a run.
    """
    plain = {
        k: v for k, v in fields.items() if k not in ("branch_chunk", "micro_batch", "trunk_cache")
    }
    engine = tezo_ds.initialize(
        make(), {**plain, "placement": "shared", "probe": "inplace", "shared_trunk": False}
    )
    engine.sharding.world_size, engine.sharding.rank = 1, 0
    engine.objective.first = None
    engine.method.begin(step)
    central, rho = fields.get("difference", "central") == "central", fields["rho"]
    rows, queries = labelled(batch), fields.get("queries", 1)
    differences, count = [], 0.0
    for number, row in enumerate(rows):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        asked = Ask.of(step, range(number * queries, (number + 1) * queries), rho, central)
        sums, counts = engine.probe.measure(engine.objective, alone, engine.method.branches(asked))
        if central:
            differences += ((sums[0::2] - sums[1::2]) / (2 * rho)).tolist()
        else:
            differences += ((sums[1:] - sums[0]) / rho).tolist()
        count += counts[0].item()
    return [d * len(rows) / count for d in differences]


def oracle(
    model: nn.Module, batch_of, examples: int, method: str, fields: dict, steps: int
) -> dict:
    """Returns the weights after some steps of the oracle: each example's loss sum times R / N."""

    def loss(step: int, weights: dict[str, torch.Tensor]) -> list[float]:
        batch = batch_of(examples, step)
        narrow = {name: tensor.float() for name, tensor in weights.items()}
        inputs = (batch["input_ids"],)
        logits = torch.func.functional_call(
            model, narrow, inputs, {"attention_mask": batch["attention_mask"]}, tie_weights=True
        ).logits
        wanted = batch["labels"][:, 1:]
        each = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), wanted, ignore_index=-100, reduction="none"
        ).sum(dim=1)
        rows, count = labelled(batch), int((wanted != -100).sum())
        return [each[row].item() * len(rows) / count for row in rows]

    known = reference.Fields.__dataclass_fields__
    options = {k: v for k, v in fields.items() if k in known}
    weights = {k: p for k, p in model.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        *_, last = reference.run(
            method, weights, loss, steps, fields["lr"], fields["rho"], **options, per_example=True
        )
    return last.weights
