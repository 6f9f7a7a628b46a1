"""Bytes that each method keeps beside the weights of OPT-13B and LLaMA-30B.

No model is made: shapes are those of the public configs, all matrices train, weights are bfloat16, and
the methods themselves are asked, MeZO's dense moments for tensors without storage.

    python benchmarks/method_state.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from parts.common.tables import markdown_table
from rich.console import Console
from rich.table import Table

from tezo_ds.config import TezoConfig
from tezo_ds.config.registry import METHODS
from tezo_ds.directions.space import CoefficientSpace, Matrix
from tezo_ds.methods import make_method
from tezo_ds.methods.descent import Adam, Descent, Momentum
from tezo_ds.plan.needs import PlannedRun, factor_numel
from tezo_ds.plan.shapes import skeleton

Shapes = dict[str, tuple[int, int]]
COLUMNS = ("method", "state", "factors", "weights, state and factors", "÷ mezo-adam")


MODELS = {
    "OPT-13B": "opt-13b",
    "LLaMA-30B": "llama-30b",
}  # and their names among the built-in shapes


def shapes_of(model: str) -> Shapes:
    """Returns the matrices of a built-in model, by name."""
    run = PlannedRun(skeleton(model, "bfloat16"), TezoConfig.model_validate({}))
    return {matrix.name: matrix.shape for matrix in run.space.matrices}


@dataclass(frozen=True)
class Bytes:
    """Bytes of one method beside one model.

    Attributes:
        weights: the bfloat16 weights.
        state: what the next step depends on besides weights and seed.
        factors: U and V, or V and the lefts of one direction, in bfloat16, which the fused probe holds; a
            function of the seed.
    """

    weights: int
    state: int
    factors: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.factors


def bytes_of(method: str, shapes: Shapes, rank: int = 16) -> Bytes:
    """Returns the bytes of a method (LOZO with its own rank of 2)."""
    fields = {"rank": rank} if method.startswith("tezo") else {}
    config = TezoConfig(method=method, **fields)  # type: ignore[arg-type]
    assert isinstance(config.rank, int)
    matrices = [Matrix(name, shape, config.rank, torch.bfloat16) for name, shape in shapes.items()]
    space = CoefficientSpace(matrices, seed=0)
    kept = make_method(config, space, torch.device("cpu"))
    state = sum(packed.data.nbytes for packed in kept.state.values())
    numel = sum(m * n for m, n in shapes.values())
    if method.startswith("mezo"):
        state += sum(tensor.nbytes for tensor in _dense_moments(config, numel).values())
    return Bytes(2 * numel, state, 2 * factor_numel(kept, config, matrices))


def _dense_moments(config: TezoConfig, numel: int) -> dict[str, torch.Tensor]:
    """Makes moments as MeZO does of a gradient estimate, which is float32 beside 16-bit weights."""
    like, kind = torch.empty(numel, device="meta"), config.method.partition("-")[2]
    rules: dict[str, Descent] = {
        "m": Momentum(like, config.momentum),
        "adam": Adam(like, config.betas, config.eps, config.bias_correction),
    }
    return rules[kind].state if kind else {}


def rows(shapes: Shapes, rank: int) -> list[tuple[str, ...]]:
    """Returns a row by COLUMNS for every method."""
    reference = bytes_of("mezo-adam", shapes).total
    made: list[tuple[str, ...]] = []
    for method in METHODS:
        found = bytes_of(method, shapes, rank)
        cells = (_readable(found.state), _readable(found.factors), _readable(found.total))
        made.append((method, *cells, f"{found.total / reference:.1%}"))
    return made


def _of_narrow_adam(shapes: Shapes, rank: int) -> str:
    adam, ours = bytes_of("mezo-adam", shapes), bytes_of("tezo-adam", shapes, rank)
    total = adam.weights + adam.state // 2
    return f"{_readable(total)}, of which tezo-adam needs {ours.total / total:.1%}."


def _readable(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16, help="of tezo")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    for name, model in MODELS.items():
        shapes = shapes_of(model)
        numel = sum(m * n for m, n in shapes.values())
        title = f"{name}: {len(shapes)} matrices, {numel / 1e9:.2f} G numbers, rank {args.rank}"
        found = rows(shapes, args.rank)
        narrow = f"With 16-bit moments mezo-adam would take {_of_narrow_adam(shapes, args.rank)}"
        if args.markdown:
            print(title, "", markdown_table(COLUMNS, found), "", narrow, "", sep="\n")
            continue
        table = Table(*COLUMNS, title=title)
        for line in found:
            table.add_row(*line)
        Console().print(table, narrow, "")


if __name__ == "__main__":
    main()
