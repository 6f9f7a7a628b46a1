"""What methods learn in the same seconds: the small model on TREC, all runs at once on the one device."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tezo_ds
from parts.gpu_check.rows import Found, Options, Rows
from parts.learning.arms import OTHERS, STEPS
from tezo_ds.sharding.world import local_device
from tezo_ds.tasks import batch_indices, collate, encode, first_tokens, load_task
from tezo_ds.tasks.evaluation import Evaluator

METHODS, SEEDS = ("tezo", "tezo-adam-coef", "lozo", "mezo"), (1, 2)
TASK, TEST_EXAMPLES, MAX_LENGTH = "trec", 400, 64


def run(rows: Rows, options: Options) -> None:
    """Starts a process a method and seed, all at once, and waits for them."""
    started: dict[tuple[str, int], subprocess.Popen[str]] = {}
    for method in METHODS:
        for seed in SEEDS:
            words = [
                sys.executable,
                sys.argv[0],
                "--learn",
                method,
                str(seed),
                "--model",
                str(options.model),
            ]
            words += ["--data", str(options.data), "--seconds", str(options.seconds)]
            words += ["--toy"] * options.toy
            started[method, seed] = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
    for (method, seed), process in started.items():
        rows.measure(f"{method}, seed {seed}", partial(outcome, process, options))


def outcome(process: subprocess.Popen[str], options: Options) -> tuple[str, Found]:
    """Returns what one process found."""
    options.small_model()
    out, err = process.communicate()
    assert process.returncode == 0, err.strip()[-500:]
    found: Found = json.loads(out.strip().splitlines()[-1])
    told = f"{found['before']:.1%} → {found['after']:.1%} in {found['steps']} steps, loss {found['loss']:.3f}"
    return told, found


def learn(options: Options, method: str, seed: int) -> None:
    """Trains for the seconds given, and prints a JSON line of accuracy before and after."""
    folder, started = options.small_model(), time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = loaded.to(local_device())
    few = 3 if options.toy else TEST_EXAMPLES
    task = load_task(TASK, data=str(options.data), test_examples=few)
    fields = {**STEPS, **OTHERS}[method]
    size = int(fields["batch_size"])
    taken = {name: value for name, value in fields.items() if name != "batch_size"}
    engine = tezo_ds.initialize(model, {**taken, "seed": seed, "check_every": 0})
    words = list((task.spec.verbalizers or {}).values())
    tokens = first_tokens(tokenizer, words, [example.prompt for example in task.train])
    engine.objective.choices = None if tokens is None else torch.tensor(tokens)
    encoded = encode(tokenizer, task.train, MAX_LENGTH)
    judge = Evaluator(engine, tokenizer, task.spec, task.test, 50, MAX_LENGTH)
    before, steps = judge(), 0
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end:
        chosen = batch_indices(len(encoded), min(size, len(encoded)), steps, seed, 0, 1)
        engine.step(collate([encoded[i] for i in chosen], int(tokenizer.pad_token_id)))
        steps += 1
    after = judge()
    print(json.dumps({
        "before": before.accuracy, "after": after.accuracy, "loss": after.loss, "steps": steps,
        "examples": after.examples, "seconds": options.seconds,
        "with_start": round(time.perf_counter() - started, 1),
    }))  # fmt: skip
