"""Measures what data take of a process's memory and time, in memory and with rows left on disk.

Writes a file of random words, and in a process of its own each way: loads it as a task of texts, and takes
the token ids of some batches, without a model. Memory is the process's own at its highest, over what it had
with all imported; mapped files are not in it, as the kernel takes their pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent / ".cache"
STEPS, BATCH = 50, 16


def write(path: Path, megabytes: float, words: int) -> int:
    """Writes rows of so many random words, and returns how many rows there are."""
    chance, count = random.Random(0), 0
    with path.open("w") as file:
        while file.tell() < megabytes * 10**6:
            text = " ".join(f"{chance.randrange(10**6):x}" for _ in range(words))
            file.write(json.dumps({"text": text}) + "\n")
            count += 1
    return count


def _own() -> int:
    """Reads this process's bytes of anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def measure(data: Path, cache: Path, model: str, streaming: bool, results: Any) -> None:
    """Puts the growth in bytes, the seconds until the first batch and those of a batch into a queue."""
    import datasets
    import pandas  # noqa: F401  what the task would import on its way is no growth

    from tezo_ds.models.loading import load_tokenizer
    from tezo_ds.tasks import batch_indices, encode, load_task
    from tezo_ds.tasks.lazy import LazyEncoded, LazyExamples, pick
    from tezo_ds.tasks.posing import OneSequence

    datasets.config.HF_DATASETS_CACHE = cache
    tokenizer, over = load_tokenizer(model), threading.Event()
    before = peak = _own()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.01):
            peak = max(peak, _own())

    watching, start = threading.Thread(target=watch), time.perf_counter()
    watching.start()
    train = load_task(str(data), test_examples=100, streaming=streaming).train
    if isinstance(train, LazyExamples):
        encoded: Any = LazyEncoded(train, tokenizer, OneSequence(tokenizer, None), 512)
    else:
        encoded = encode(tokenizer, train, 512)
    ready = time.perf_counter()
    for step in range(STEPS):
        pick(encoded, batch_indices(len(encoded), BATCH, step, 0, 0, 1))
    over.set()
    watching.join()
    results.put((peak - before, ready - start, (time.perf_counter() - ready) / STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--words", type=int, default=100, help="words of a row")
    parser.add_argument("--model", default=str(ROOT / "quickstart" / "SmolLM2-135M-Instruct"))
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), context.Queue()
        count = write(folder / "rows.jsonl", args.megabytes, args.words)
        size = (folder / "rows.jsonl").stat().st_size / 1e6
        print(f"{count:,} rows, {size:.0f} MB, batches of {BATCH}\n")
        print("| rows | memory | until the first batch | token ids of a batch |")
        print("|---|---|---|---|")
        ways = {"in memory": False, "`--streaming`": True, "`--streaming`, cached": True}
        for way, streaming in ways.items():
            process = context.Process(
                target=measure,
                args=(folder / "rows.jsonl", folder / "cache", args.model, streaming, results),
            )
            process.start()
            grown, until, each = results.get()
            process.join()
            print(f"| {way} | {grown / 1e6:,.0f} MB | {until:.1f} s | {1000 * each:.1f} ms |")


if __name__ == "__main__":
    main()
