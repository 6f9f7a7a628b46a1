"""Token ids against the rows of a model's embedding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import ConfigError, DataError
from tezo_ds.launched import env_rank
from tezo_ds.models.structure import embeddings, is_classifier
from tezo_ds.tasks import Example, TaskSpec
from tezo_ds.tasks.classes import Classes
from tezo_ds.tasks.encoded import highest_token
from tezo_ds.tasks.posing import Posing

log = logging.getLogger(__name__)


def token_embedding(model: nn.Module) -> nn.Embedding | None:
    """Returns the embedding of a model's input tokens; None for a model without a plain one."""
    embedding = embeddings(model, "input")
    return embedding if isinstance(embedding, nn.Embedding) else None


def embedding_rows(model: nn.Module) -> int | None:
    """Returns the number of tokens that a model has embeddings of, the same on each rank that holds shards
    of them; None where it is unknown."""
    embedding = token_embedding(model)
    return None if embedding is None else embedding.num_embeddings


def padding_id(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> int:
    """Returns the token that pads batches: the tokenizer's own, or 0 where it has none or the model has no
    embedding of it. Padding is masked out wherever it stands, so any token does."""
    own = tokenizer.pad_token_id
    if own is None:
        return 0
    if rows is None or own < rows:
        return int(own)
    if env_rank() == 0:
        log.warning(
            "%s (id %d) is outside of the model's embedding of %d rows: batches are padded with id 0, "
            "which is masked out, too",
            tokenizer.pad_token, own, rows,
        )  # fmt: skip
    return 0


def pad_of(model: Any, tokenizer: PreTrainedTokenizerBase, rows: int | None) -> int:
    """Returns the token that pads a model's batches, and tells it to a model that classifies, which may look
    for the last token before the padding.

    Args:
        model: a model of transformers, whose config may be changed.
        tokenizer: the model's.
        rows: number of embeddings; None: unknown.

    Raises:
        ConfigError: there is no such token, and the model may look for it.
    """
    if not is_classifier(model):
        return padding_id(tokenizer, rows)
    config = model.config.get_text_config()
    own = config.pad_token_id
    if own is not None and own >= 0 and (rows is None or own < rows):
        return int(own)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        raise ConfigError(
            f"{type(model).__name__} looks for the last token before the padding, and neither its config nor "
            "its tokenizer has a pad_token_id that it has an embedding of; set pad_token_id in config.json"
        )
    config.pad_token_id = int(tokenizer.pad_token_id)
    return int(config.pad_token_id)


def check_ids(
    tokenizer: PreTrainedTokenizerBase,
    posing: Posing,
    rows: int | None,
    spec: TaskSpec,
    train: Sequence[Example],
    test: Sequence[Example],
    max_length: int,
) -> None:
    """Checks that the model has an embedding of each token of the examples, on all ranks alike.

    Args:
        tokenizer: the tokenizer.
        posing: makes the model's sequences.
        rows: number of embeddings; None: unknown, and nothing is checked.
        spec: the task; its words are tried as answers of the test examples.
        train: examples to train on.
        test: examples to evaluate.
        max_length: tokens of an example.

    Raises:
        DataError: names the first token without an embedding.
    """
    if rows is None or max(tokenizer.get_vocab().values(), default=0) < rows:
        return  # as for most models, so that the examples need not be tokenised here
    words = list((spec.verbalizers or {}).values())
    encoded = posing.encode([*train, *test], max_length)
    if words and not isinstance(posing, Classes):
        encoded += [e for row in posing.candidates(test, words, max_length) for e in row]
    for each in encoded:
        if (highest := highest_token(each)) >= rows:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise DataError(
                f"token {token!r} (id {highest}) is in the examples, but the model's embedding has "
                f"{rows} rows; give the model a row for it (resize_token_embeddings(len(tokenizer)), then "
                "save_pretrained), or leave it out of template and data"
            )
