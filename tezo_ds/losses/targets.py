"""Labels at the positions that predict them, and what a decoder is given for its labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import is_classifier, is_encoder_decoder, is_masked_lm

IGNORE = -100  # the label of a position that has none, as in transformers


def targets(module: nn.Module, labels: Tensor) -> Tensor:
    """Returns labels moved to the positions that predict them, IGNORE where there is none: (B, T), of
    classes (B, 1)."""
    if is_classifier(module):
        return labels.reshape(len(labels), -1)
    in_place = is_masked_lm(module) or is_encoder_decoder(module)
    if in_place or getattr(module, "loss_type", None) == "ForTokenClassification":
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def width_of(labels: Tensor) -> int:
    """Returns how many targets an example has, labelled or not."""
    return labels.shape[1:].numel()


def decoder_inputs(module: nn.Module, labels: Tensor) -> Tensor:
    """Returns the decoder's input ids, (B, T): the labels one place later, by the model's own code.

    Raises:
        ConfigError: the model has no such code, or its config lacks what that needs.
    """
    shift = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    name = type(module).__name__
    if shift is None:
        raise ConfigError(
            f'{name} does not say how labels go into its decoder; add "decoder_input_ids" to the batch'
        )
    # Of an example without labels any token will do, and some models look for the last that is one.
    unlabelled = (labels == IGNORE).all(dim=1, keepdim=True)
    try:
        shifted: Tensor = shift(labels=labels.masked_fill(unlabelled, 0))
    except ValueError:
        raise ConfigError(
            f"{name}: its config lacks decoder_start_token_id, with which a decoder begins (T5: the pad "
            "token's), or pad_token_id; set them in config.json"
        ) from None
    return shifted
