"""First-order fine-tuning on the quickstart's task: the accuracy to compare with.

AdamW on all weights or on LoRA adapters, one epoch, one process; accuracy on the same test questions,
judged in the same way as the quickstart judges.

    python benchmarks/first_order.py
    python benchmarks/first_order.py --lora
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from parts.common.machine import describe
from parts.learning.first_order import WAYS, add_lora
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

import tezo_ds
from tezo_ds.tasks import batch_indices, collate, encode, load_task
from tezo_ds.tasks.evaluation import Evaluator

CACHE = Path(__file__).resolve().parent.parent / ".cache/quickstart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="of launch/prepare_quickstart.py")
    parser.add_argument("--train-examples", type=int, default=800)
    parser.add_argument("--test-examples", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--lora", action="store_true", help="train adapters of rank 16, not all weights"
    )
    parser.add_argument(
        "--lr", type=float, help="1e-3 for adapters and 2e-5 for all weights by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()
    console.print(describe())
    folder = str(args.cache / "SmolLM2-135M-Instruct")
    task = load_task(
        "trec", data=str(args.cache / "trec"),
        train_examples=args.train_examples, test_examples=args.test_examples,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    way = "lora" if args.lora else "full"
    lr = WAYS[way] if args.lr is None else args.lr
    engine = tezo_ds.initialize(model, {"rank": 1})  # for its evaluation alone; never steps
    evaluate = Evaluator(engine, tokenizer, task.spec, task.test, batch_size=50, max_length=512)
    before = evaluate().accuracy
    examples = encode(tokenizer, task.train, 512)
    if args.lora:
        torch.manual_seed(args.seed)
        add_lora(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    start = time.perf_counter()
    steps = len(examples) // args.batch_size
    for step in track(range(steps), "AdamW", console=Console(stderr=True)):
        chosen = batch_indices(len(examples), args.batch_size, step, args.seed, 0, 1)
        batch = collate([examples[i] for i in chosen], tokenizer.pad_token_id)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    after = evaluate().accuracy
    assert before is not None and after is not None
    console.print(
        f"AdamW, {way}, lr {lr}, one epoch of {len(examples)} examples: accuracy {before:.1%} -> "
        f"{after:.1%} on {len(task.test)} test examples, {steps} steps in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
