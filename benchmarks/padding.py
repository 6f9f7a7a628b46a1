"""Measures how many tokens training batches compute for each real one, by chance and by like lengths.

Takes the prompts of TREC and Rotten Tomatoes in .cache/methods, made once by `benchmarks/methods.py`, with
the templates that are built in, and counts the batches of whole epochs on one rank.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tezo_ds.models.loading import load_tokenizer
from tezo_ds.tasks import batch_indices, encode, load_task
from tezo_ds.tasks.batches import Order, by_length

ROOT = Path(__file__).resolve().parent.parent / ".cache"
TASKS, SIZES, SEED = ("trec", "rotten-tomatoes"), (8, 32), 0


def computed_for_real(lengths: list[int], size: int, steps: int, order: Order | None) -> float:
    """Returns the tokens of padded batches over those without padding."""
    computed = real = 0
    for step in range(steps):
        batch = [lengths[i] for i in batch_indices(len(lengths), size, step, SEED, 0, 1, order)]
        computed, real = computed + len(batch) * max(batch), real + sum(batch)
    return computed / real


def rows(cache: Path, model: str, epochs: int) -> list[tuple[str, int, float, float]]:
    """Returns task, batch size, and computed over real tokens without and with groups."""
    tokenizer, found = load_tokenizer(model), []
    for name in TASKS:
        task = load_task(name, data=str(cache / name))
        lengths = [len(each.input_ids) for each in encode(tokenizer, task.train, 512)]
        for size in SIZES:
            steps = epochs * len(lengths) // size
            orders = (None, by_length(lengths, size, SEED))
            without, grouped = (computed_for_real(lengths, size, steps, one) for one in orders)
            found.append((name, size, without, grouped))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / "methods", help="folder of the data")
    parser.add_argument("--model", default=str(ROOT / "quickstart" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    print("| task | batch size | tokens computed ÷ real | with `--group-by-length` |")
    print("|---|---|---|---|")
    for task, size, without, grouped in rows(args.cache, args.model, args.epochs):
        print(f"| {task} | {size} | {without:.3f} | {grouped:.3f} |")


if __name__ == "__main__":
    main()
