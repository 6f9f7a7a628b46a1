"""Length of examples against the positions that a model has."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from torch import nn

from tezo_ds.intake.tokens import token_embedding
from tezo_ds.launched import env_rank
from tezo_ds.patterns import TOWER

log = logging.getLogger(__name__)

# wpe, position_embeddings, embed_positions, positions_embed, …; tables of distances have no limit.
_TABLE = re.compile(r"(?!.*(relative|distance))(wpe|\w*pos(ition)?s?(_\w+)?)")
_BUFFERS = ("embed_positions", "pos_encoding")  # tables that do not train, as GPT-J's


def fitting_length(model: nn.Module, max_length: int) -> int:
    """Returns the tokens that an example may have: `max_length`, or the rows of the model's table of
    positions where those are fewer, which is said on one rank."""
    tables = dict(position_tables(model))
    name = min(tables, key=lambda each: tables[each], default=None)
    if name is None or tables[name] >= max_length:
        return max_length
    if env_rank() == 0:
        log.warning(
            "--max-length %d: the model has %d positions (%s), so examples are cut to %d tokens",
            max_length, tables[name], name, tables[name],
        )  # fmt: skip
    return tables[name]


def position_tables(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yields each table with a row a position of a text, by name, and the number of positions that it
    serves."""
    for path, count in _tables(model):
        if not TOWER.search(path):  # whose positions are of an image or a sound
            yield path, count


def _tables(model: nn.Module) -> Iterator[tuple[str, int]]:
    words = token_embedding(model)
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not words and _TABLE.fullmatch(name):
            # OPT and BART leave their first rows out; RoBERTa those up to the padding's.
            unused = getattr(module, "offset", 0)
            if module.padding_idx is not None and not unused:
                unused = module.padding_idx + 1
            yield path, module.num_embeddings - unused
    for path, buffer in model.named_buffers():
        if path.rpartition(".")[2] in _BUFFERS and buffer.dim() == 2:
            yield path, len(buffer)
