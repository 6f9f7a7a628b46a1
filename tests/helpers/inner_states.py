"""States of examples with one label each, and what is known of inner layers of a tiny model for them."""

from __future__ import annotations

import torch
from tiny import make_batch
from torch import Tensor

import tezo_ds
from tezo_ds.output_layer.entry import Late
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.states import collect

WORDS = torch.tensor([7, 40, 12])
# The last map of block 1 that gives hidden states, by kind of model.
MAPS = {
    "llama": "model.layers.1.mlp.down_proj", "opt": "model.decoder.layers.1.fc2",
    "mixtral": "model.layers.1.self_attn.o_proj",  # as its experts are one weight
    "gpt2": "transformer.h.1.mlp.c_proj", "neox": "gpt_neox.layers.1.mlp.dense_4h_to_h",
}  # fmt: skip


def one_label(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Returns a batch whose examples have one label each, a word of WORDS, at places that differ."""
    batch = make_batch(count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids, labels = batch["input_ids"], torch.full_like(batch["labels"], -100)
    lengths = batch["attention_mask"].sum(dim=1)
    for row in range(count):
        place = int(torch.randint(2, int(lengths[row]), (), generator=generator))
        ids[row, place] = labels[row, place] = WORDS[row % len(WORDS)]
    return {**batch, "labels": labels}


def states_of(
    engine: tezo_ds.Engine, batch: dict[str, Tensor], chosen: str, late: Late | None = None,
    maps: str = "last",
) -> States:  # fmt: skip
    """Returns what `collect` keeps of a batch, and of one without labels, as of a rank without examples."""
    term = engine.output_layer
    assert term.layer is not None
    held = torch.arange(len(batch["labels"])) % 5 == 4
    nobody = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    batches = [(batch, held), (nobody, held)]
    with torch.no_grad():
        inner = term.inner.of_blocks(chosen, maps)
        return collect(engine.objective, term.layer, batches, WORDS, inner, late)
