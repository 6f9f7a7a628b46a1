"""What directions of each example's own gain: S and s of a task's gradient, before calibration and after.

SmolLM2-135M-Instruct on TREC's questions, v_proj of the last six layers; the gradient of each example's loss
in the coefficients by backpropagation, which this benchmark alone does. S is the squared length of the task's
gradient and s₁ the variance of an example's, both without bias, so a batch of B has s = s₁ / B. One direction
that all examples share errs by (S + s)(D+1), each example's own by (S/B + s)(D+1); the ratio is the gain.

Calibrated means with a bias on each of the six words, fitted to other examples, as `output_layer: bias` does.

    python benchmarks/per_example.py                        a minute of processor time
    python benchmarks/per_example.py --examples 16 --model FOLDER
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from normalize import Task, add_sources, loaded
from parts.common.machine import describe
from parts.directions.gradient import differentiable
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tezo_ds
from tezo_ds.losses.targets import IGNORE, targets


class Gradients:
    """Losses of a task's examples, and their gradients in the coefficients.

    Args:
        model: the model; its parameters take no gradient from now on.
        task: a task with choices.
        fields: fields of the config that say what trains.
    """

    def __init__(self, model: Any, task: Task, fields: dict[str, Any]) -> None:
        self._engine = tezo_ds.initialize(model.requires_grad_(True), fields)
        self._model, self._task = model.requires_grad_(False), task

    def _logits(self, row: Any) -> tuple[Tensor, Tensor]:
        """Returns the choices' logits where the label is, (1, words), and which of them is right, (1,)."""
        assert self._task.choices is not None
        batch = self._task.batch([row])
        wanted = targets(self._model, batch["labels"])  # (1, T)
        at = wanted != IGNORE
        hidden = self._model.get_decoder()(
            input_ids=batch["input_ids"], use_cache=False
        ).last_hidden_state
        logits = self._model.get_output_embeddings()(hidden[at])[:, self._task.choices]
        return logits.float(), (wanted[at][:, None] == self._task.choices).int().argmax(dim=1)

    def bias(self, rows: Sequence[Any]) -> Tensor:
        """Returns the bias of each choice that fits some examples best: (words,)."""
        with torch.no_grad():
            pairs = [self._logits(row) for row in rows]
        logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        bias = torch.zeros(logits.shape[1], requires_grad=True)
        search = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            found = F.cross_entropy(logits + bias, labels) + 1e-3 * bias.square().sum()
            found.backward()
            return found

        search.step(loss)
        return bias.detach()

    def of(self, rows: Sequence[Any], biases: Sequence[Tensor]) -> list[Tensor]:
        """Returns the gradient of each example's loss at each bias: float64 (examples, D) each."""
        found: list[list[Tensor]] = [[] for _ in biases]
        for row in rows:
            with differentiable(self._engine) as leaf:
                logits, label = self._logits(row)
                for bias, each in zip(biases, found, strict=True):
                    loss = F.cross_entropy(logits + bias, label)
                    each.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0])
        return [torch.stack(each) for each in found]


def moments(each: Tensor) -> tuple[float, float]:
    """Returns S and s₁ without bias, of gradients (examples, D)."""
    variance = each.var(dim=0).sum().item()
    return each.mean(dim=0).square().sum().item() - variance / len(each), variance


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--examples",
        type=int,
        default=160,
        help="whose gradients are taken; as many others calibrate",
    )
    add("--sizes", type=int, nargs="+", default=[4, 16, 64], help="of batches")
    add("--include", nargs="+", default=["*v_proj*"])
    add("--exclude", nargs="+", default=["layers:0-23"])
    add_sources(parser)
    args = parser.parse_args(words)
    console, start = Console(soft_wrap=True, width=110), time.process_time()
    console.print(describe())
    tokenizer, model = loaded(args)
    task = Task("type", args.data, tokenizer, 8)
    fields = {"include": tuple(args.include), "exclude": tuple(args.exclude), "check_every": 0}
    gradients = Gradients(model.eval(), task, fields)
    bias = gradients.bias(task.train[args.examples : 2 * args.examples])
    found = gradients.of(task.train[: args.examples], [torch.zeros_like(bias), bias])
    table = Table("", "S", "s₁", *(f"gain at B {size}" for size in args.sizes))
    for name, each in zip(("as it is", "calibrated"), found, strict=True):
        S, one = moments(each)
        S = max(S, 0.0)
        gains = [(S + one / size) / (S / size + one / size) for size in args.sizes]
        table.add_row(name, f"{S:.4g}", f"{one:.4g}", *(f"{gain:.2f}" for gain in gains))
    console.print(table)
    D = found[0].shape[1]
    console.print(
        f"D = {D}, {args.examples} examples, {time.process_time() - start:.0f} processor seconds"
    )


if __name__ == "__main__":
    main()
