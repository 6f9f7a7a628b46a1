"""Rows at the vocabulary projection: labelled positions alone, and never all at once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, losses_of_both_probes, make_batch, tiny
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import tezo_ds
from tezo_ds.losses import head
from tezo_ds.losses.objective import Objective
from tezo_ds.sharding.replicated import Replicated


def gemma() -> nn.Module:
    """Makes a model that caps its logits after the output layer."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=22, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=10, final_logit_softcapping=2.0,
        initializer_range=0.3,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


class Upside(nn.Module):
    """A model that uses its output layer in a way of its own: the next step's logits, time first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(input_ids).cumsum(dim=1).flip(1)).flip(1)


class Capped(nn.Module):
    """A model that caps its logits, and looks up positions of shape (1, T) for all examples at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(VOCABULARY, 8), nn.Embedding(16, 8)
        self.out = nn.Linear(8, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = self.places(torch.arange(input_ids.shape[1])[None])
        return self.out(self.words(input_ids) + places).tanh()


def whole_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Returns the textbook loss from all logits."""
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"])
    logits = out.logits if hasattr(out, "logits") else out
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten()
    ).item()


def loss_and_rows(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, list[int], str]:
    """Returns the engine's loss, the rows of each use of the output layer, and the mode chosen for it."""
    engine = tezo_ds.initialize(model, {"rank": 2})
    rows: list[int] = []
    project = F.linear

    def count(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weight.shape[0] == VOCABULARY:
            rows.append(x.numel() // x.shape[-1])
        return project(x, weight, bias)

    engine.loss(batch)  # settles the mode
    with mock.patch.object(F, "linear", count):
        loss = engine.loss(batch)
    assert engine.objective._head is not None
    return loss, rows, engine.objective._head.mode


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (lambda: tiny("llama"), "chunks"),
        (lambda: tiny("opt"), "chunks"),
        (lambda: tiny("neox"), "chunks"),
        (gemma, "chosen"),
        (Upside, "whole"),
    ],
)
def test_labelled_positions_alone_are_projected_a_chunk_at_a_time(make: object, mode: str) -> None:
    batch = make_batch(4)
    del batch["attention_mask"]
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    model = make()  # type: ignore[operator]
    with mock.patch.object(head, "CHUNK_NUMEL", 5 * VOCABULARY):
        loss, rows, settled = loss_and_rows(model, batch)
    assert settled == mode
    assert loss == pytest.approx(whole_loss(model, batch), rel=1e-5)
    full, rest = divmod(labelled, 5)
    expected = {
        "chunks": [5] * full + [rest] * (rest > 0),
        "chosen": [labelled],
        "whole": [batch["input_ids"].numel()],
    }
    assert rows == expected[mode]


def test_the_result_does_not_depend_on_the_chunk() -> None:
    batch, losses = make_batch(5), []
    for numel in (1, 7 * VOCABULARY, 1 << 24):
        engine = tezo_ds.initialize(tiny(), {"rank": 3, "rho": 1e-2, "queries": 2})
        with mock.patch.object(head, "CHUNK_NUMEL", numel):
            losses.append([engine.step(batch).loss for _ in range(3)])
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_without_any_label_the_layers_still_run() -> None:
    """A rank whose labels are all ignored gathers the output layer as often as the others."""
    for model in (tiny(), gemma()):
        engine = tezo_ds.initialize(model, {"rank": 2})
        batch = make_batch(2)
        engine.loss(batch)
        settled = engine.objective._head.mode
        batch["labels"][:] = -100
        fresh = tezo_ds.initialize(model, {"rank": 2})
        with mock.patch.object(model, "forward", wraps=model.forward) as forward:
            fresh.objective(batch, 1)
        assert fresh.objective._head.mode == settled
        assert forward.call_count == {"chunks": 1, "chosen": 4}[settled]


@pytest.mark.parametrize("make", [gemma, Capped])
def test_a_model_that_caps_its_logits_measures_alike_in_both_probes(make: object) -> None:
    fused, inplace = losses_of_both_probes(make, "chosen")  # type: ignore[arg-type]
    assert fused == pytest.approx(inplace, rel=1e-5)


class Biased(Capped):
    """A model that adds a number to each word's logit behind its output layer, as BART does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("more", torch.linspace(-1, 1, VOCABULARY))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(input_ids)) + self.more


@pytest.mark.parametrize(
    ("make", "mode", "words_alone"),
    [
        (lambda: tiny("llama", tied=False), "chunks", True),
        (lambda: tiny("opt"), "chunks", True),
        (gemma, "chosen", False),
        (Biased, "chosen", False),
        (Upside, "whole", False),
    ],
)
def test_of_choices_a_plain_output_layer_computes_their_logits_alone(
    make: object, mode: str, words_alone: bool
) -> None:
    model, batch, words = make(), make_batch(4), torch.tensor([7, 3, 11])  # type: ignore[operator]
    batch = {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], -100)}
    batch["labels"][:, 3], batch["labels"][:, 5] = words[[0, 1, 2, 1]], words[[2, 2, 0, 1]]
    objective = Objective(Replicated(model), None)
    objective.choices = words
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"])
    logits = (out.logits if hasattr(out, "logits") else out)[:, [2, 4]][..., words].flatten(0, 1)
    right = torch.tensor([0, 2, 1, 2, 2, 0, 1, 1])
    expected = F.cross_entropy(logits, right, reduction="sum").item()
    widths, project = [], F.linear

    def count(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        widths.append(len(weight))
        return project(x, weight, *rest)

    for _ in range(3):  # the first settles the mode, and is none the worse for it
        widths.clear()
        with mock.patch.object(F, "linear", count):
            assert objective(batch, 1)[0].item() == pytest.approx(expected, rel=1e-5)
    assert objective.head_mode == mode
    assert (VOCABULARY not in widths and widths.count(3) == 1) == words_alone
