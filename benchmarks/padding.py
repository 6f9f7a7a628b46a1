"""Measures how many tokens batches compute for each real one: padded, of like lengths, and end to end.

Takes the prompts of TREC and Rotten Tomatoes in .cache/methods, made once by `benchmarks/methods.py`, with
the templates that are built in, and counts the batches of whole epochs on one rank. With --time it also
times fused steps, one of padded rows, of like lengths and of rows end to end in turn: medians, and in
parentheses the seconds of all steps as a share of the padded ones'.
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
from tezo_ds.tasks.encoded import end_to_end, longest_of, rows_of

ROOT = Path(__file__).resolve().parent.parent / ".cache"
PADDED, GROUPED, FREE = WAYS = ("padded", "--group-by-length", "--padding-free")
TASKS, SIZES, SEED = ("trec", "rotten-tomatoes"), (8, 32), 0


def computed_for_real(lengths: list[int], size: int, steps: int, way: str) -> float:
    """Returns the tokens of batches that are made in one of WAYS over those without padding."""
    order = by_length(lengths, size, SEED) if way == GROUPED else None
    computed = real = 0
    for step in range(steps):
        batch = [lengths[i] for i in batch_indices(len(lengths), size, step, SEED, 0, 1, order)]
        rows = rows_of(batch) if way == FREE else [[i] for i in range(size)]
        computed += len(rows) * longest_of(rows, batch)
        real += sum(batch)
    return computed / real


def rows(cache: Path, model: str, epochs: int) -> list[tuple[str, int, list[float]]]:
    """Returns task, batch size, and computed over real tokens in each way."""
    tokenizer, found = load_tokenizer(model), []
    for name in TASKS:
        task = load_task(name, data=str(cache / name))
        lengths = [len(each.input_ids) for each in encode(tokenizer, task.train, 512)]
        for size in SIZES:
            steps = epochs * len(lengths) // size
            found.append(
                (name, size, [computed_for_real(lengths, size, steps, way) for way in WAYS])
            )
    return found


def timed(cache: Path, model: str, steps: int) -> list[tuple[str, int, dict[str, list[float]]]]:
    """Returns task, batch size, and seconds of each fused step by name of a way to make batches."""
    tokenizer = load_tokenizer(model)
    engine = tezo_ds.initialize(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"), {"rank": 16, "lr": 1e-9}
    )
    found = []
    for name in TASKS:
        examples = encode(tokenizer, load_task(name, data=str(cache / name)).train, 512)
        lengths = [len(each.input_ids) for each in examples]
        for size in SIZES:
            grouped = by_length(lengths, size, SEED)
            orders: dict[str, Order | None] = {PADDED: None, GROUPED: grouped, FREE: None}
            seconds: dict[str, list[float]] = {way: [] for way in orders}
            for step in range(-1, steps):  # the first is a warm-up
                for way, order in orders.items():
                    indices = batch_indices(len(examples), size, max(step, 0), SEED, 0, 1, order)
                    chosen = [examples[i] for i in indices]
                    padded = collate(chosen, tokenizer.pad_token_id)
                    batch = (
                        end_to_end(chosen, tokenizer.pad_token_id, chosen[0])
                        if way == FREE
                        else padded
                    )
                    start = time.perf_counter()
                    engine.step(batch)
                    if step >= 0:
                        seconds[way].append(time.perf_counter() - start)
            found.append((name, size, seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / "methods", help="folder of the data")
    parser.add_argument("--model", default=str(ROOT / "quickstart" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--time", type=int, metavar="STEPS", help="also time so many steps of each")
    args = parser.parse_args()
    print(describe())
    print("| task | batch size | " + " | ".join(f"computed ÷ real, {way}" for way in WAYS) + " |")
    print("|---" * (2 + len(WAYS)) + "|")
    for task, size, shares in rows(args.cache, args.model, args.epochs):
        print(f"| {task} | {size} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    if args.time:
        print("| task | batch size | " + " | ".join(f"s a step, {way}" for way in WAYS) + " |")
        print("|---" * (2 + len(WAYS)) + "|")
        for task, size, seconds in timed(args.cache, args.model, args.time):
            whole = sum(seconds[PADDED])
            cells = [
                f"{statistics.median(taken):.2f} ({sum(taken) / whole:.2f})"
                for taken in seconds.values()
            ]
            print(f"| {task} | {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
