"""Train on what a function gives the model's own answers.

    python examples/reward.py HuggingFaceTB/SmolLM2-135M

The reward needs no gradient and may be anything that returns a number: a regex, a compiler, a game.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import tezo_ds

QUESTIONS = ["Is the sky blue?", "Is fire cold?", "Do fish swim?", "Can stones fly?"]
ANSWERS = ["yes", "no", "yes", "no"]
TEZO = {
    "rank": 8,
    "lr": 1e-4,
    "rho": 1e-2,
    "queries": 4,
    "include": ["*v_proj*"],
    "shape": "zscore",
}


def reward(prompts, completions, answer, **columns):
    """A point for the right word, a little less for every letter; called as TRL's reward functions are."""
    answers = zip(completions, answer, strict=True)
    return [float(right in text.lower().split()) - len(text) / 100 for text, right in answers]


def main(name: str, steps: int = 20) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    engine = tezo_ds.initialize(
        model, TEZO, reward_fn=reward, tokenizer=tokenizer, max_new_tokens=8, stop=["\n"]
    )
    asked = [f"Question: {question}\nAnswer, yes or no:" for question in QUESTIONS]
    prompts = tokenizer(asked, padding=True, return_tensors="pt")
    batch = {key: prompts[key] for key in ("input_ids", "attention_mask")}
    means = []
    for _ in range(steps):
        report = engine.step({**batch, "answer": ANSWERS})  # 2 · 4 branches answer in one batch
        means.append(sum(report.rewards) / len(report.rewards))
        print(f"step {report.step}  reward {means[-1]:+.3f}  best {max(report.rewards):+.3f}")
    return means


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
