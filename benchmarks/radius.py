"""Accuracy of the signs of κ in bfloat16, at fixed ρ and at the one that `rho: auto` chooses.

    python benchmarks/radius.py --directions 40

The reference is κ of the same weights and the same directions in float32, at float32's own choice of ρ. Signs
are compared where the reference's |κ| is above its median; the error is the root mean square of all
differences of κ, over that of the reference's κ.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from parts.common.machine import describe
from parts.methods.data import load_splits
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tezo_ds.auto.radius import Radius, choose_rho
from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Ask, kappas
from tezo_ds.engine.engine import Engine
from tezo_ds.sharding import sharding_of
from tezo_ds.tasks import collate, encode

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 8  # branches in one forward


@dataclass
class Losses:
    """Losses of a model in one dtype on one batch.

    Attributes:
        engine: an engine that never steps.
        batch: real examples.
        branches: how many branches were measured so far.
    """

    engine: Engine
    batch: dict[str, Tensor]
    branches: int = 0

    @torch.no_grad()
    def __call__(self, ask: Ask) -> Tensor:
        """Measures the losses of branches, as `radius.Measure` does."""
        engine = self.engine
        parts = [
            engine.probe.measure(engine.objective, self.batch, engine.method.branches(part)).cpu()
            for part in ask.parts(AT_ONCE)
        ]
        self.branches += len(ask)
        loss_sum, count = torch.cat(parts, dim=1)
        return loss_sum / count

    def kappa(self, directions: int, rho: float) -> Tensor:
        """Measures κ of the directions of step 0, (directions,)."""
        return kappas(self(Ask.of(0, range(directions), rho))[None], rho, True)[0]


@contextmanager
def losses_in(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Losses]:
    """Context manager: gives losses of the model's weights, rounded to bfloat16, in a dtype; directions are
    as rounded in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task = load_splits("trec", ROOT / ".cache/methods", 8, 8)
    batch = collate(encode(tokenizer, task.train[: args.batch_size], 64), tokenizer.pad_token_id)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(dtype).eval()
    fields = {"method": args.method, "probe": args.probe, "include": args.include}
    config = TezoConfig.model_validate({**fields, "restore": "copy", "seed": args.seed})
    yield Losses(Engine(sharding_of(model, None), config, None, torch.bfloat16), batch)


def chosen(losses: Losses, dtype: torch.dtype) -> tuple[Radius, str]:
    """Returns the ρ that `rho: auto` chooses, and a line on what choosing took."""
    start, before = time.perf_counter(), losses.branches
    radius = choose_rho(losses, dtype)
    seconds, branches = time.perf_counter() - start, losses.branches - before
    tried = ", ".join(f"{rho:.1g}: {ratio:.2g}" for rho, ratio in radius.tried)
    return radius, f"{dtype}: {radius} ({branches} branches, {seconds:.1f} s; R of {tried})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    add("--method", default="tezo")
    add("--probe", default="auto")
    add("--include", nargs="+", default=["*v_proj*"])
    add("--directions", type=int, default=40)
    add("--batch-size", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--rhos", type=float, nargs="*", default=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    args = parser.parse_args()
    console = Console(width=120)
    console.print(describe())
    with losses_in(args, torch.float32) as losses:
        radius, line = chosen(losses, torch.float32)
        console.print(line)
        reference = losses.kappa(args.directions, radius.rho)
    with losses_in(args, torch.bfloat16) as losses:
        radius, line = chosen(losses, torch.bfloat16)
        console.print(line)
        console.print(table(losses, reference, [*args.rhos, radius.rho]))


def table(losses: Losses, reference: Tensor, rhos: list[float]) -> Table:
    """Makes a table with a row for each ρ, the last being the chosen one."""
    large = reference.abs() > reference.abs().median()
    made = Table("ρ", "signs agree", "error of κ", "seconds", title=f"{len(reference)} directions")
    for place, rho in enumerate(rhos):
        start = time.perf_counter()
        kappa = losses.kappa(len(reference), rho)
        seconds = time.perf_counter() - start
        agree = (kappa.sign() == reference.sign())[large]
        error = (kappa - reference).square().mean().sqrt() / reference.square().mean().sqrt()
        made.add_row(
            f"{rho:.2g}" + (" (auto)" if place == len(rhos) - 1 else ""),
            f"{int(agree.sum())} of {len(agree)}", f"{error:.3g}", f"{seconds:.1f}",
        )  # fmt: skip
    return made


if __name__ == "__main__":
    main()
