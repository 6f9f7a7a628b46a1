"""Tokens without a row in an embedding that ranks hold shards of: refused on all ranks alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from task_files import TEMPLATE, WORDS, reviews, write
from tiny_tokenizer import save_tiny_llama
from transformers import AutoTokenizer
from world_hazards import refusal
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.settings import Settings
from tezo_ds.training.session import Session, open_session


def saved(world: World) -> tuple[Path, str]:
    """Writes, on rank 0, a model whose tokenizer has a pad and an added token of its own."""
    folder, data = world.folder / "odd", world.folder / "odd.jsonl"
    if world.rank == 0:
        save_tiny_llama(folder, ["film 1 It was great terrible"])
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.add_tokens(["<extra>"])
        tokenizer.save_pretrained(folder)
        write(data, reviews(20))
    dist.barrier()
    return folder, str(data)


@case(worlds=(2,))
def tokens_without_a_row_are_refused_under_each_sharding(world: World) -> None:
    folder, data = saved(world)
    for fsdp, config in ((True, None), (False, dict(ZERO3)), (False, None)):

        def opened(template: str, fsdp: bool = fsdp, config: Any = config) -> Session:
            settings = Settings(
                model=str(folder), task=data, template=template, verbalizers=WORDS, fsdp=fsdp
            )
            return open_session(settings, TezoConfig(rank=2), config, batch_size=4)

        message = refusal(lambda: opened("{text} <extra> It was"), tezo_ds.DataError)
        assert "token '<extra>' (id " in message
        session = opened(TEMPLATE)
        assert session.pad_id == 0
        evaluator = session.evaluator()
        assert evaluator is not None
        assert evaluator().loss > 0
