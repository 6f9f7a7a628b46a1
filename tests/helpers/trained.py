"""An engine at a result, and what a model makes of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny import make_batch
from torch import Tensor, nn

import tezo_ds


def trained(model: nn.Module, exclude: Sequence[str] = ()) -> tezo_ds.Engine:
    """Makes an engine at coefficients that move the logits by about their own size."""
    engine = tezo_ds.initialize(model, {"rank": 3, "exclude": tuple(exclude)})
    engine.method.coefficients.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return engine


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    batch = make_batch(3)
    found: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


def groups(engine: tezo_ds.Engine) -> list[list[str]]:
    """Returns the last parts of the paths of sites that take one product together, in order."""
    found = {id(site.group): site.group for site in engine.probe.sites}.values()
    return [[site.path.rsplit(".")[-1] for site in group.sites] for group in found]


def shared(engine: tezo_ds.Engine) -> list[list[str]]:
    """Returns the groups of `groups` that have several sites."""
    return [names for names in groups(engine) if len(names) > 1]
