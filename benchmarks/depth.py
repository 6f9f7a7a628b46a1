"""How well label words can be told apart at each depth of a model, by linear fits to plain forwards.

What enters the last linear map of a block (down_proj, fc2) at the labelled position, and what enters the
output layer, are kept for every training example; a softmax regression with a ridge is fitted to each, as
`output_layer: fit` does, its strength by a fifth that is held out, and judged on test examples. So the table
says what a closed-form fit at the end leaves to be won, and how deep it lies.

    python benchmarks/depth.py                                  some 25 processor minutes
    python benchmarks/depth.py --tasks trec --layers 18 22
    python benchmarks/depth.py --layers --seeds 1 2 3           the end alone, by the draws of three fits
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parts.common.machine import describe
from parts.methods.data import TASKS, load_splits
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tezo_ds.losses.targets import IGNORE, targets
from tezo_ds.output_layer.choosing import FOLD
from tezo_ds.output_layer.fit import fit
from tezo_ds.output_layer.problem import States
from tezo_ds.tasks import Example, batch_indices, collate, encode, first_tokens

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = "output layer"
AT_ONCE = 25  # examples in a forward
COLUMNS = ("seed", "block", "held-out loss", "held-out acc. %", "test loss", "test acc. %")


@dataclass(frozen=True)
class Seen:
    """Inputs at labelled positions by place, (N, n) each, and the index of the right word, (N,)."""

    inputs: dict[str, Tensor]
    truth: Tensor


def places_of(model: Any, layers: Sequence[int]) -> dict[str, nn.Module]:
    """Returns the linear maps whose inputs are looked at, by name."""
    blocks = model.get_decoder().layers
    found = {f"{layer}": blocks[layer].mlp.down_proj for layer in layers}
    return {**found, OUTPUT: model.get_output_embeddings()}


@contextmanager
def watching(places: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Context manager: gives what each place was last given, by name."""
    last: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _, args: last.__setitem__(name, args[0])

    hooks = [m.register_forward_pre_hook(note(name)) for name, m in places.items()]
    try:
        yield last
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def look(
    model: Any, tokenizer: Any, examples: Sequence[Example], words: Tensor, layers: Sequence[int], length: int
) -> Seen:  # fmt: skip
    """Runs examples and keeps what each place was given at the labelled positions."""
    places = places_of(model, layers)
    kept: dict[str, list[Tensor]] = {name: [] for name in places}
    truth = []
    encoded = encode(tokenizer, examples, length)
    with watching(places) as last:
        for start in range(0, len(encoded), AT_ONCE):
            batch = collate(encoded[start : start + AT_ONCE], tokenizer.pad_token_id)
            model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
            wanted = targets(model, batch["labels"])
            at = wanted != IGNORE
            for name, x in last.items():
                kept[name].append(x[at])
            truth.append((wanted[at][:, None] == words).int().argmax(dim=1))
    return Seen({name: torch.cat(parts) for name, parts in kept.items()}, torch.cat(truth))


def judged(train: Seen, test: Seen, place: str, words: int) -> tuple[float, float, float, float]:
    """Fits to a place's inputs: returns the held-out loss and accuracy, and those on test examples.

    Inputs are divided by their root mean squares, each, so that the ridge bears on all alike.
    """
    x = train.inputs[place]
    rms = x.square().mean(dim=0).sqrt()
    units = rms + 1e-2 * rms.mean()
    held = torch.arange(len(x)) % FOLD == FOLD - 1
    states = States(x / units, torch.zeros(len(x), words), train.truth, held)
    found = fit(states, False, lambda part: part)
    logits = test.inputs[place] / units @ found.weight.t() + found.bias
    loss = float(F.cross_entropy(logits, test.truth))
    right = float((logits.argmax(dim=1) == test.truth).float().mean())
    return found.after.loss, found.after.accuracy, loss, right


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--layers", nargs="*", type=int, default=[10, 14, 18, 20, 22, 24, 26, 28])
    add("--examples", type=int, default=1000, help="training examples")
    add("--seeds", nargs="+", type=int, default=[0], help="of the draws, each as a run's fit draws")
    add("--test-examples", type=int, default=400)
    add("--max-length", type=int, default=64)
    add("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    add("--cache", type=Path, default=ROOT / ".cache/methods", help="of the data")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, width=100)
    console.print(describe())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for task in args.tasks:
        splits = load_splits(task, args.cache, 1, args.test_examples)
        answers = list((splits.spec.verbalizers or {}).values())
        tokens = first_tokens(tokenizer, answers, [e.prompt for e in splits.train[:50]])
        choices = torch.tensor(tokens)
        count = min(args.examples, len(splits.train))
        seen = partial(
            look, model, tokenizer, words=choices, layers=args.layers, length=args.max_length
        )
        test = seen(splits.test)
        title = f"{task}: {count} examples, {len(test.truth)} test examples"
        table = Table(*COLUMNS, title=title)
        for seed in args.seeds:
            order = batch_indices(len(splits.train), count, 0, seed, 0, 1)
            train = seen([splits.train[i] for i in order])
            for place in train.inputs:
                held, share, loss, right = judged(train, test, place, len(answers))
                numbers = (f"{held:.3f}", f"{100 * share:.1f}", f"{loss:.3f}", f"{100 * right:.1f}")
                table.add_row(f"{seed}", place, *numbers)
        console.print(table)


if __name__ == "__main__":
    main()
