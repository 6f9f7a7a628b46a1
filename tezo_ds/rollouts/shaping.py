"""Shaping of a step's losses over all its branches, before slopes are taken, as evolution strategies do.

With L_b the loss of branch b of n, over all ranks:

    centred   L_b - mean L
    zscore    (L_b - mean L) / σ, σ the standard deviation of the n losses
    rank      (place of L_b among them) / (n - 1) - ½, places from 0, equal losses sharing their mean place

A pure function of numbers that every rank has, so every rank has its result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shaped(losses: Tensor, shape: str, central: bool) -> Tensor:
    """Returns the losses that slopes are taken of; those that are not finite stay out, and as they are.

    Args:
        losses: float64 (groups, branches), see `directions.branches.kappas`.
        shape: none, zscore, rank or centred.
        central: whether a slope is a difference of two signs of a direction. Of one sign the centre, the
            first branch, is replaced by 0: slopes are then measured from the mean of the population, as
            evolution strategies do, and not from the one loss of the centre.
    """
    if shape == "none":
        return losses
    known = losses.isfinite()
    values = losses[known]  # (n,)
    result = losses.clone()
    result[known] = _ranks(values) if shape == "rank" else _standard(values, shape == "zscore")
    if not central:
        result[:, 0] = torch.where(known[:, 0], 0.0, losses[:, 0])
    return result


def _standard(values: Tensor, scaled: bool) -> Tensor:
    if not len(values) or bool(
        (values == values[0]).all()
    ):  # whose mean may round to another number
        return torch.zeros_like(values)
    centred = values - values.mean()
    return centred / centred.square().mean().sqrt() if scaled else centred


def _ranks(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.zeros_like(values)
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    mean_places = ends - (counts.double() + 1) / 2  # of each run of equal values
    return mean_places[place] / (len(values) - 1) - 0.5
