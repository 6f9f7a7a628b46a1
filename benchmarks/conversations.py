"""What a run on conversations learns: SmolLM2-135M-Instruct on a few dozen that this program writes.

An assistant that answers in one fixed manner, on subjects of which those held out are in no training
conversation. Prints the loss of the assistant's turns there before and after; ends with 1 where the tokens of
a conversation are not those of `tokenizer.apply_chat_template`, or the loss has not fallen.

    python benchmarks/conversations.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from parts.common.machine import describe
from rich.console import Console

from tezo_ds.models.loading import load_tokenizer
from tezo_ds.tasks import encode, load_task
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.formats import Conversation

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = (
    "copper", "rivers", "the moon", "bicycles", "bread", "glass", "owls", "salt", "maps", "clocks", "rain",
    "chess", "paper", "bridges", "honey", "sand", "cats", "iron", "tea", "islands", "violins", "snow",
    "lighthouses", "wool", "onions", "kites", "ferries", "moss", "lenses", "windmills", "coins", "bees",
)  # fmt: skip
HELD_OUT = 8


def conversation(subject: str) -> dict[str, list[dict[str, str]]]:
    """Returns two turns on a subject, as a row of a file."""
    said = [
        ("user", f"Tell me about {subject}."),
        ("assistant", f"Noted: {subject}. Verdict: worth a closer look."),
        ("user", "Are you sure?"),
        ("assistant", f"Confirmed: {subject} stays on the list."),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"), help="with a template"
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--method", default="tezo-adam-coef")
    args = parser.parse_args()
    console = Console(soft_wrap=True)
    console.print(describe())
    with tempfile.TemporaryDirectory(prefix="conversations-") as folder:
        found = run(args, Path(folder))
    console.print(
        f"{args.method}, {found['steps']} steps of {args.batch_size} conversations, "
        f"{found['seconds']:.0f} s: "
        f"loss of the assistant's turns in {found['test_examples']} held-out ones "
        f"{found['test_loss_before']:.3f} -> {found['test_loss_after']:.3f}"
    )
    if not found["alike"]:
        sys.exit("tokens are not those of apply_chat_template")
    if not found["test_loss_after"] < found["test_loss_before"]:
        sys.exit("the loss has not fallen")


def run(args: argparse.Namespace, folder: Path) -> dict[str, float | bool]:
    """Trains by the command line; returns its summary, and whether tokens are those of the template."""
    files = {"train": SUBJECTS[HELD_OUT:], "test": SUBJECTS[:HELD_OUT]}
    for name, subjects in files.items():
        lines = (json.dumps(conversation(subject)) + "\n" for subject in subjects)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    words = [sys.executable, "-m", "tezo_ds", "train"]
    words += ["--model", args.model, "--method", args.method]
    words += ["--task", str(folder / "train.jsonl"), "--test-data", str(folder / "test.jsonl")]
    words += ["--steps", str(args.steps), "--batch-size", str(args.batch_size), "--no-save-model"]
    done = subprocess.run([*words, "--output", str(folder / "run")], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    summary: dict[str, float | bool] = json.loads((folder / "run/summary.json").read_text())
    tokenizer: Any = load_tokenizer(args.model)
    task = load_task(str(folder / "train.jsonl"), test_data=str(folder / "test.jsonl"))

    def whole(example: Example) -> list[int]:
        messages = Conversation.of_text(example.prompt).messages
        return list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])

    pairs = zip(task.test, encode(tokenizer, task.test, 512), strict=True)
    summary["alike"] = all(encoded.input_ids == whole(e) for e, encoded in pairs)
    return summary


if __name__ == "__main__":
    main()
