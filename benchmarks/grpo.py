"""Memory and time of a step on rewards beside trl's GRPO of as many completions.

Each way makes --prompts x --completions answers of at most --new tokens a step, in float32, in a process of
its own: greedy generation by plain weights alone; this package's step, whose branches have an answer to each
prompt; and GRPO without a reference model, of a LoRA adapter and of all weights, as trl's trainer does it by
default. Memory is the peak of resident memory since the model was loaded, the model included, less what
Python and its libraries took before (on an accelerator what torch allocated); time is the processor's, of
the last two steps. GRPO's answers are sampled, so they may end before --new tokens.

    python benchmarks/grpo.py
    python benchmarks/grpo.py --ways tezo-ds grpo-lora --new 64
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from generation import free, prompts_of
from parts.common.apart import found_apart
from parts.common.machine import describe
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from step_overhead import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tezo_ds

sys.path.append(str(ROOT / "tests" / "helpers"))
from process_memory import process_peak

GENERATION = "generation"
WAYS = (GENERATION, "tezo-ds", "grpo-lora", "grpo")
STEPS = 2  # of a measured run: the second has an optimizer's moments from its beginning


def generation(args: argparse.Namespace, model: Any, tokenizer: Any) -> Callable[[], object]:
    """Returns a function that generates a step's answers."""
    batch = prompts_of(tokenizer, args.prompts, 0)
    rows = {key: part.repeat(args.completions, 1) for key, part in batch.items()}
    given = {"max_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
    return torch.no_grad()(lambda: model.generate(**rows, **given))


def rewarded(args: argparse.Namespace, model: Any, tokenizer: Any) -> Callable[[], object]:
    """Returns a function that makes a step of this package."""
    fields = {"rank": args.rank, "queries": args.completions // 2, "lr": 1e-9, "check_every": 0}
    given = {"reward_fn": free, "tokenizer": tokenizer, "max_new_tokens": args.new}
    engine = tezo_ds.initialize(model, fields, **given)
    batch = prompts_of(tokenizer, args.prompts, 0)
    return lambda: engine.step(batch)


def grpo(args: argparse.Namespace, model: Any, tokenizer: Any, lora: bool) -> Callable[[], object]:
    """Returns a function that makes STEPS steps of trl's GRPO."""
    from trl import GRPOConfig, GRPOTrainer  # takes seconds, which other ways do without

    batch = prompts_of(tokenizer, args.prompts, 0)
    prompts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=False)
    adapter = LoraConfig(r=args.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config = GRPOConfig(
        output_dir=str(Path(tempfile.gettempdir(), "grpo")), bf16=False, beta=0.0, max_steps=STEPS,
        per_device_train_batch_size=args.prompts * args.completions, num_generations=args.completions,
        max_completion_length=args.new, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(), logging_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, reward_funcs=free, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts * STEPS}),
        peft_config=adapter if lora else None,
    )  # fmt: skip
    return lambda: trainer.train()


def measured(args: argparse.Namespace, way: str) -> dict[str, float]:
    """Returns the peak of a way's process and the processor seconds of a step."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    seconds: list[float] = []

    def prepare(model: Any) -> Callable[[], object]:
        if way.startswith("grpo"):
            run, steps = grpo(args, model, tokenizer, way == "grpo-lora"), 1
        else:
            make = generation if way == GENERATION else rewarded
            run, steps = make(args, model, tokenizer), STEPS

        def timed() -> None:
            start = time.process_time()
            for _ in range(steps):
                run()
            seconds.append((time.process_time() - start) / STEPS)

        return timed

    def make() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    peak = process_peak(LlamaForCausalLM(small), make, prepare)
    return {"peak": peak, "seconds": seconds[-1]}


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    add("--prompts", type=int, default=4)
    add("--completions", type=int, default=8, help="of a prompt in a step: 2Q, GRPO's group")
    add("--new", type=int, default=32, help="tokens of an answer, at most")
    add("--rank", type=int, default=16)
    add("--one", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def measured_apart(words: list[str], way: str) -> dict[str, float]:
    """Returns what `measured` does in a process of its own, whose memory nothing else has had.

    Args:
        words: of the command line.
        way: one of WAYS.
    """
    found: dict[str, float] = found_apart(__file__, *words, "--one", way)
    return found


def main() -> None:
    args = arguments().parse_args()
    if args.one:
        print(json.dumps(measured(args, args.one)))
        return
    console = Console(soft_wrap=True, width=120)
    console.print(describe())
    found: dict[str, dict[str, float]] = {}
    for way in args.ways:
        found[way] = measured_apart(sys.argv[1:], way)
        console.print(f"{way}: {found[way]['peak'] / 1e6:.0f} MB")
    shape = f"{args.prompts} prompts, {args.completions} answers each of at most {args.new} tokens"
    table = Table("way", "peak MB", "÷ first", "s a step", title=f"{shape}, r={args.rank}, float32")
    first = found[args.ways[0]]["peak"]
    for way, one in found.items():
        ratio = f"{one['peak'] / first:.2f}"
        table.add_row(way, f"{one['peak'] / 1e6:.0f}", ratio, f"{one['seconds']:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
