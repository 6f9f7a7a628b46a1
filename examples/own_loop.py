"""A training loop of your own: `python examples/own_loop.py HuggingFaceTB/SmolLM2-135M out`.

Needs no more than `pip install tezo_ds`, and writes a LoRA adapter that peft loads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tezo_ds
from tezo_ds.export.adapter import save_adapter
from tezo_ds.files.tensors import load, save

TEXTS = [
    ("The film was a delight from start to end.", "great"),
    ("I left after twenty minutes.", "terrible"),
    ("A warm, funny and clever script.", "great"),
    ("Nobody in it can act.", "terrible"),
]


def batch_of(tokenizer, pairs):
    """Tokens of prompts with their answers; labels are −100 wherever nothing is to be learnt."""
    rows = []
    for text, answer in pairs:
        prompt = tokenizer(f"{text} It was").input_ids
        rows.append((prompt, tokenizer(f" {answer}", add_special_tokens=False).input_ids))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main(name: str, folder: str, steps: int = 20) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    engine = tezo_ds.initialize(model, {"rank": 8, "lr": 1e-6, "include": ["*v_proj*"]})
    snapshot = Path(folder, "state.safetensors")
    if snapshot.exists():  # all that the next step depends on, in kilobytes
        engine.load_state(load(snapshot)[0], written=False)
    while engine.step_index < steps:
        first = engine.step_index % 2 * 2  # a resumed loop has the same batches
        report = engine.step(batch_of(tokenizer, TEXTS[first : first + 2]))
        print(f"step {report.step}  loss {report.loss:.4f}  κ {report.kappa[0]:+.2f}")
    save_adapter(engine, Path(folder, "adapter"), name)
    save(engine.state(), snapshot, {})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
