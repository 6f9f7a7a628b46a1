"""transformers' Trainer with steps of forward passes alone:

    python examples/trainer.py HuggingFaceTB/SmolLM2-135M out

Callbacks, logging, evaluation and the collator are the Trainer's own; out/adapter is what peft loads.
"""

from __future__ import annotations

import sys

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    TrainingArguments,
)

from tezo_ds.integrations.transformers import TezoTrainer

TEXTS = ["A warm and clever film: great.", "Two hours of nothing: terrible."]


def main(name: str, folder: str, steps: int = 100) -> TezoTrainer:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name)
    rows = Dataset.from_dict({"input_ids": [tokenizer(text).input_ids for text in TEXTS * 6]})
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=max(steps // 5, 1),
        save_steps=max(steps // 5, 1),
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        report_to="none",
    )
    trainer = TezoTrainer(
        model,
        args,
        tezo={"rank": 8, "lr": 1e-6, "queries": 2},
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[EarlyStoppingCallback(3)],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
