"""Measures how many tokens training batches compute for each real one, by chance and by like lengths.

Takes the prompts of TREC and Rotten Tomatoes in .cache/methods, made once by `benchmarks/methods.py`, with
the templates that are built in, and counts the batches of whole epochs on one rank. With --time it also
times fused steps, one of each order in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from parts.common.machine import describe
from transformers import AutoModelForCausalLM

import tezo_ds
from tezo_ds.models.loading import load_tokenizer
from tezo_ds.tasks import batch_indices, collate, encode, load_task
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


def timed(cache: Path, model: str, steps: int) -> list[tuple[str, int, float, float, float]]:
    """Returns task, batch size, median seconds of a fused step without and with groups, and the latter's
    share of the former over all steps."""
    tokenizer = load_tokenizer(model)
    engine = tezo_ds.initialize(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"), {"rank": 16, "lr": 1e-9}
    )
    found = []
    for name in TASKS:
        examples = encode(tokenizer, load_task(name, data=str(cache / name)).train, 512)
        lengths = [len(each.input_ids) for each in examples]
        for size in SIZES:
            seconds: tuple[list[float], list[float]] = ([], [])
            orders = (None, by_length(lengths, size, SEED))
            for step in range(-1, steps):  # the first is a warm-up
                for order, taken in zip(orders, seconds, strict=True):
                    rows = batch_indices(len(examples), size, max(step, 0), SEED, 0, 1, order)
                    batch = collate([examples[i] for i in rows], tokenizer.pad_token_id)
                    start = time.perf_counter()
                    engine.step(batch)
                    if step >= 0:
                        taken.append(time.perf_counter() - start)
            before, after = (statistics.median(taken) for taken in seconds)
            found.append((name, size, before, after, sum(seconds[1]) / sum(seconds[0])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / "methods", help="folder of the data")
    parser.add_argument("--model", default=str(ROOT / "quickstart" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--time", type=int, metavar="STEPS", help="also time so many steps of each")
    args = parser.parse_args()
    print(describe())
    print("| task | batch size | tokens computed ÷ real | with `--group-by-length` |")
    print("|---|---|---|---|")
    for task, size, without, grouped in rows(args.cache, args.model, args.epochs):
        print(f"| {task} | {size} | {without:.3f} | {grouped:.3f} |")
    if args.time:
        print("| task | batch size | s a step, median | with groups | all steps, ratio |")
        print("|---|---|---|---|---|")
        for task, size, before, after, ratio in timed(args.cache, args.model, args.time):
            print(f"| {task} | {size} | {before:.2f} | {after:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
