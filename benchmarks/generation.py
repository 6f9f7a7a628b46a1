"""Speed of generating a step's completions in all branches, over `model.generate` of as many sequences.

Times, interleaved in one process or in ranks: `generate` of the B prompts in 2Q copies, greedy, by plain
weights; and the engine's own generation of all branches, as a step on rewards makes it, of which the reward
is free. With `--ends none` every completion has `--new` tokens; with `own` a text ends where the model ends
it: `generate` then keeps the row, the engine lets it leave the batch. Prints tokens a second, the time over
generate's within each round, and for sharded models the bytes of all-gathers for each token position.

    python benchmarks/generation.py
    python benchmarks/generation.py --ends own --clock processor
    python benchmarks/generation.py --sharding zero3 --ranks 2 --prompts 4 --queries 2 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from parts.common.backends import BACKENDS, batch_of, on_ranks, place
from parts.common.machine import describe
from parts.scaling.measure import Traffic
from rich.console import Console
from rich.table import Table
from step_overhead import CLOCKS, FOR_SHARED, ROOT, load, measure, spread
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trunk import LEARNING

import tezo_ds
from tezo_ds.rollouts.decoding import Decoder

PLAIN, ENGINE, AIM = "model.generate", "engine", 1.15


@dataclass
class Row:
    """One way to generate.

    Attributes:
        tokens: that it made, over all rows of this rank, without what ended them.
        gathered: bytes of all-gathers for each token position, on this rank.
    """

    way: str
    tokens: int
    gathered: float
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over rounds of the time for a token over generate's of the same round."""
        return statistics.median(self.ratios)

    def cells(self) -> list[str]:
        """Returns the cells of the table's line."""
        each = [self.tokens / seconds for seconds in self.seconds]
        return [
            self.way, f"{self.tokens}", f"{statistics.median(each):.0f}", spread(each, 1, 0),
            f"{self.ratio:.3f}", spread(self.ratios, 1, 3), f"{self.gathered / 1e6:.1f}",
        ]  # fmt: skip


def prompts_of(tokenizer: PreTrainedTokenizerBase, count: int, rank: int) -> dict[str, Any]:
    """Returns small sums as conversations, padded on the left, and different on each rank."""
    texts = [f"What is {7 + i + 31 * rank} plus {12 + 5 * i}?" for i in range(count)]
    if tokenizer.chat_template:
        texts = [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
            )
            for text in texts
        ]
    tokenizer.padding_side = "left"
    found = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def contestants(
    args: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase, rank: int
) -> tuple[dict[str, Callable[[], object]], Callable[[str], int]]:
    """Returns the ways to time, by name, and a function that gives the tokens that each has made last."""
    which = batch_of(args.sharding, rank)
    batch, made = prompts_of(tokenizer, args.prompts, which), {PLAIN: 0, ENGINE: 0}
    config = model.generation_config
    ends = [] if args.ends == "none" else [config.eos_token_id, tokenizer.eos_token_id]
    if args.ends == "none":
        config.eos_token_id = tokenizer.eos_token = None
    fields = {"rank": args.rank, "queries": args.queries, "lr": 1e-9, "check_every": 0}
    fields |= {"include": args.include} if args.include else {}
    given = {"tokenizer": tokenizer, "max_new_tokens": args.new}
    engine = tezo_ds.initialize(place(model, args.sharding), fields, reward_fn=free, **given)
    module: Any = engine.sharding.module
    repeated = {
        key: part.repeat(2 * args.queries, 1).to(engine.sharding.device)
        for key, part in batch.items()
    }
    length = batch["input_ids"].shape[1]

    @torch.no_grad()
    def plain() -> None:
        new = module.generate(
            **repeated, max_new_tokens=args.new, do_sample=False, pad_token_id=0,
            eos_token_id=ends or None, synced_gpus=engine.sharding.everyone > 1,
        )[:, length:]  # fmt: skip
        made[PLAIN] = sum(_before_end(row, ends) for row in new.tolist())

    def ours() -> None:
        with torch.no_grad(), Counted() as counted:
            engine.measuring.losses(batch, 0)
        made[ENGINE] = counted.tokens

    return {PLAIN: plain, ENGINE: ours}, made.__getitem__


def free(completions: list[str], **_: Any) -> list[float | None]:
    """Rewards by the length, which takes no time."""
    return [float(len(text)) for text in completions]


def _before_end(row: list[int], ends: list[int]) -> int:
    return next((i for i, token in enumerate(row) if token in ends), len(row))


class Counted:
    """Context manager: counts the tokens of completions inside."""

    kind: Any = Decoder

    def __enter__(self) -> Counted:
        self.tokens, decode = 0, self.kind.__call__
        self._decode = decode

        def call(decoder: Any, *given: Any) -> tuple[list[list[int]], set[int]]:
            found, broken = decode(decoder, *given)
            self.tokens += sum(map(len, found))
            return found, broken

        self.kind.__call__ = call
        return self

    def __exit__(self, *error: object) -> None:
        self.kind.__call__ = self._decode


def run(rank: int, args: argparse.Namespace) -> None:
    """Times both ways; rank 0 prints, and writes the file."""
    console, machine = Console(quiet=rank > 0, width=130), describe()
    console.print(machine)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = load(args)
    if args.layers:
        model.model.layers = model.model.layers[: args.layers]
        model.config.num_hidden_layers = args.layers
    ways, made = contestants(args, model, tokenizer, rank)
    gathered = {}
    for way, generate in ways.items():
        generate()  # the first time finds out what the model lets be left out
        with Traffic() as traffic:
            generate()
        gathered[way] = sum(call.nbytes for call in traffic.calls if call.gathers) / args.new
    learning = LEARNING if args.sharding.startswith("zero3") else 0
    seconds = measure(ways, args.rounds, "generation", rank > 0, CLOCKS[args.clock], learning)
    rows = [Row(way, made(way), gathered[way], seconds[way]) for way in ways]
    for row in rows:
        scale = rows[0].tokens / row.tokens
        row.ratios = [scale * a / b for a, b in zip(row.seconds, rows[0].seconds, strict=True)]
    backend = "" if args.sharding == "none" else f", {args.sharding} on {args.ranks} ranks"
    shape = f"{args.prompts} prompts in {2 * args.queries} branches, {args.new} new tokens at most"
    table = Table(
        title=f"{shape}, ends {args.ends}, r={args.rank}, {args.dtype}{backend}; {args.clock} time; aim {AIM}"
    )
    for column in (
        "way",
        "tokens",
        "tokens/s",
        "10–90 %",
        "÷ generate",
        "10–90 %",
        "gathered MB/token",
    ):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    if rank == 0 and args.json:
        same = {"machine": machine, "command": args.command}
        found = [{**asdict(row), "ratio": row.ratio} for row in rows]
        args.json.write_text(json.dumps({**same, "rows": found}, indent=1) + "\n")


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    add("--layers", type=int, help="the first so many of the model alone, which take less time")
    add("--prompts", type=int, default=8)
    add("--queries", type=int, default=4)
    add("--new", type=int, default=16, help="tokens of a completion, at most")
    add("--ends", choices=["none", "own"], default="none")
    add("--include", nargs="*", default=[], help="what trains; none: all")
    add("--rank", type=int, default=16)
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--rounds", type=int, default=5)
    add("--clock", choices=list(CLOCKS), default="wall", help=FOR_SHARED)
    add("--sharding", default="none", choices=BACKENDS)
    add("--ranks", type=int, default=2, help="processes of a sharded run")
    add("--json", type=Path, help="file to write all numbers into")
    parser.set_defaults(hidden=None)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(words)
    given = sys.argv[1:] if words is None else words
    args.command = " ".join(["python benchmarks/generation.py", *given])
    on_ranks(parser, args, run)


if __name__ == "__main__":
    main()
