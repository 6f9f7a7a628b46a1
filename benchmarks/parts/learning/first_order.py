"""First-order training for `benchmarks/learning.py` to compare with: AdamW on all weights, or on LoRA.

Run as a process of its own, so that it begins as the others do; prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import peft
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import tezo_ds
from parts.methods.training import choice_loss
from tezo_ds.models.loading import load_tokenizer
from tezo_ds.tasks import batch_indices, collate, encode, first_tokens, load_task
from tezo_ds.tasks.baselines import majority_accuracy
from tezo_ds.tasks.evaluation import Evaluator

WAYS = {"lora": 1e-3, "full": 2e-5}  # and the rates that are common for each
RANK = 16


def add_lora(model: PreTrainedModel) -> None:
    """Puts adapters beside the queries and values of a model, in place, and freezes all else."""
    names = ["q_proj", "v_proj"]
    peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))


def trained(args: argparse.Namespace) -> dict[str, float | int | None]:
    """Trains for so many processor seconds; returns accuracy and loss on the test examples."""
    task = load_task(
        args.task, data=args.data, test_data=args.test_data, template=args.template,
        verbalizers=None if args.verbalizers is None else json.loads(args.verbalizers),
        test_examples=args.test_examples,
    )  # fmt: skip
    tokenizer = load_tokenizer(args.model)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    torch.manual_seed(args.seed)
    if args.way == "lora":
        add_lora(model)
    words = list((task.spec.verbalizers or {}).values())
    tokens = first_tokens(tokenizer, words, [e.prompt for e in [*task.train, *task.test]])
    assert tokens is not None, "label words of one token each"
    choices, pad = torch.tensor(tokens), int(tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    encoded = encode(tokenizer, task.train, args.max_length)
    start, steps = time.process_time(), 0
    while time.process_time() - start < args.budget:
        chosen = batch_indices(len(encoded), args.batch_size, steps, args.seed, 0, 1)
        choice_loss(model, collate([encoded[i] for i in chosen], pad), choices).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    taken = time.process_time() - start
    # An engine that never steps, for its evaluation alone, in which adapters are part of the model.
    model.requires_grad_(True)
    engine = tezo_ds.initialize(model, {"rank": 1, "include": ["*lm_head*", "*embed_tokens*"]})
    engine.objective.choices = choices
    score = Evaluator(
        engine,
        tokenizer,
        task.spec,
        task.test,
        batch_size=50,
        max_length=args.max_length,
        pad_id=pad,
    )()
    return {
        "accuracy": score.accuracy, "loss": score.loss, "steps_made": steps, "seconds": taken,
        "majority": majority_accuracy(task.train, task.test),
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--way", choices=WAYS, required=True)
    add("--task", required=True)
    add("--data")
    add("--test-data", required=True)
    add("--template")
    add("--verbalizers", help="JSON")
    add("--model", required=True)
    add("--lr", type=float, required=True)
    add("--budget", type=float, required=True, help="processor seconds")
    add("--batch-size", type=int, default=16)
    add("--max-length", type=int, default=64)
    add("--test-examples", type=int, default=400)
    add("--seed", type=int, default=1)
    print(json.dumps(trained(parser.parse_args(words))))


if __name__ == "__main__":
    main()
