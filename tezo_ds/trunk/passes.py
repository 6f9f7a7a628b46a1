"""The passes of the model's own code that a split forward makes.

    1. the trunk: B sequences through the embedding and the ℓ blocks before the first module that trains;
       later blocks and what follows them are left out
    2. the rest: all branches' sequences, from inputs as large as those of a plain forward, so that masks and
       positions are the model's business; the embedding and the first ℓ blocks are left out, and the last of
       these gives the first pass's result

Where nothing trains before the last map of the last block's attention, a pass between them has one copy mixed
by this attention, and the rest begins behind it, with rows of labelled positions alone.

What the left-out embedding and blocks give in pass 2 is NaN, so a model whose later blocks read anything else
of the trunk shows in its losses.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tezo_ds.trunk.found import Attention, Found
from tezo_ds.trunk.outputs import hidden_in, hidden_of, unknown, with_hidden
from tezo_ds.trunk.stand_ins import Act, replaced, swapped
from tezo_ds.trunk.tail import Mixed, mixed_by


def through_trunk(found: Found, forward: Act, inputs: dict[str, Any]) -> Tensor:
    """Returns the hidden states after the trunk: (B, T, hidden)."""
    before, hidden = found.blocks[found.first - 1], []

    def note(*args: Any, **kwargs: Any) -> Any:
        output = before(*args, **kwargs)
        hidden.append(hidden_of(output))
        return output

    acts: list[tuple[nn.Module, Act]] = [(before, note)]
    acts += [(found.blocks[i], _passed_on(found, i)) for i in range(found.first, len(found.blocks))]
    with swapped(found.places, acts + _without_logits(found)):
        forward(**inputs)
    (states,) = hidden
    return states


def through_rest(found: Found, forward: Act, inputs: dict[str, Any], hidden: Tensor) -> Any:
    """Returns the model's outputs from the hidden states after the trunk: (branches * B, T, hidden)."""
    with swapped(found.places, _from(found, hidden)):
        return forward(**inputs)


def through_block(found: Found, forward: Act, inputs: dict[str, Any], hidden: Tensor) -> None:
    """Runs the block after the trunk from the hidden states that enter it, (branches * B, T, hidden), for
    what happens within it. What follows is left out."""
    later = range(found.first + 1, len(found.blocks))
    acts = [(found.blocks[i], _passed_on(found, i)) for i in later]
    with swapped(found.places, _from(found, hidden) + acts + _without_logits(found)):
        forward(**inputs)


def through_attention(
    found: Found, attention: Attention, forward: Act, inputs: dict[str, Any], hidden: Tensor
) -> Mixed:
    """Returns what the last block's attention has mixed, from the hidden states after the trunk, which are
    those that enter this block: (B, T, hidden). What follows is left out."""
    mixed, block = list[Mixed](), found.blocks[-1]
    whole = block.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        mixed.append(mixed_by(whole, attention, found.places, args, kwargs))
        return with_hidden(found.outputs[-1], hidden)

    acts = _from(found, hidden) + _without_logits(found)
    with swapped(found.places, acts), replaced(block, call):  # whose hooks gather what it needs
        forward(**inputs)
    (one,) = mixed
    return one


def _from(found: Found, hidden: Tensor) -> list[tuple[nn.Module, Act]]:
    """Returns acts of the embedding and the blocks of the trunk, the last of which gives hidden states."""
    last = found.first - 1
    acts: list[tuple[nn.Module, Act]] = [(found.blocks[i], _unknown(found, i)) for i in range(last)]
    acts.append((found.blocks[last], lambda *_, **__: with_hidden(found.outputs[last], hidden)))
    if found.embedding is not None:
        nan = found.embedded
        acts.append((found.embedding, lambda ids, *_, **__: nan.expand(*ids.shape, len(nan))))
    return acts


def _without_logits(found: Found) -> list[tuple[nn.Module, Act]]:
    """Returns acts of the modules after the blocks where they are left out."""
    acts: list[tuple[nn.Module, Act]] = [(m, _zeros(width)) for m, width in found.after]
    if found.head is not None:
        acts.append((found.head, _no_positions(found.head)))
    return acts


def _passed_on(found: Found, index: int) -> Act:
    """Returns the act of a block that is left out: it passes its hidden states on."""
    return lambda *args, **kwargs: with_hidden(found.outputs[index], hidden_in(args, kwargs))


def _unknown(found: Found, index: int) -> Act:
    """Returns the act of a block of the trunk that is left out: NaN, which must not be read by anything."""

    def act(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_in(args, kwargs)
        return with_hidden(found.outputs[index], unknown(hidden, hidden.shape))

    return act


def _zeros(width: int) -> Act:
    """Returns the act of a module after the blocks that is left out."""
    return lambda x, *_, **__: x.new_zeros(*x.shape[:-1], width)


def _no_positions(head: nn.Module) -> Act:
    """Returns the act of an output layer that is left out: the logits of no position."""
    words = getattr(head, "out_features", 1)
    return lambda x: x.new_zeros(*x.shape[:-2], 0, words)
