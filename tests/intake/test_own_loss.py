"""The default loss is the model's own, or the first batch is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from architectures import tiny_of
from tiny import VOCABULARY, make_batch, tiny
from torch import Tensor, nn

import tezo_ds
from tezo_ds.intake import own_loss as compared

Batch = dict[str, Tensor]
CONFIGS = ({"method": "mezo"}, {"rank": 1})


class Wrapped(nn.Module):
    """A wrapper of a model, as users write them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **given: Any) -> Any:
        return self.module(*args, **given)


POOLED: Any = {"num_labels": 4, "pad_token_id": 2}


def own_loss(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


def with_classes(batch: Batch) -> Batch:
    labels = batch["labels"]
    return {**batch, "labels": torch.where(labels < 0, labels, labels % 2)}


def classes(labels: Tensor) -> Tensor:
    """Returns a number for each example, up to 3."""
    return torch.arange(len(labels)) % 4


def with_a_shift_of_its_own() -> nn.Module:
    """Makes a model whose forward shifts labels otherwise than it says."""
    model: Any = tiny_of("T5ForConditionalGeneration", 61)
    model.prepare_decoder_input_ids_from_labels = lambda labels: labels.clamp(min=0)
    wrong: nn.Module = model
    return wrong


def regression() -> nn.Module:
    return tiny_of("BertForSequenceClassification", 61, problem_type="regression")


def of_examples(batch: Batch) -> Batch:
    ids = batch["input_ids"].where(batch["attention_mask"] > 0, torch.tensor(2))
    return {**batch, "input_ids": ids, "labels": classes(batch["labels"])}


def seq2seq_lora() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    adapted: nn.Module = peft.get_peft_model(
        tiny_of("T5ForConditionalGeneration", VOCABULARY), config
    )
    return adapted.eval()


def lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted.eval()


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (lambda: tiny("llama"), None),
        (lambda: tiny("gpt2"), None),
        (lambda: tiny("roberta"), None),
        (lambda: tiny("mixtral"), None),
        (lambda: Wrapped(tiny("llama")), None),
        (lambda: lora(tiny("llama")), None),
        (lambda: tiny_of("T5ForConditionalGeneration", VOCABULARY), None),
        (lambda: tiny_of("BartForConditionalGeneration", VOCABULARY), None),
        (lambda: seq2seq_lora(), None),
        (lambda: tiny_of("BertForSequenceClassification", 61, num_labels=5), of_examples),
        (lambda: tiny_of("RobertaForSequenceClassification", 61, num_labels=4), of_examples),
        (lambda: tiny_of("DistilBertForSequenceClassification", 61, num_labels=4), of_examples),
        (lambda: tiny_of("LlamaForSequenceClassification", 61, **POOLED), of_examples),
        (lambda: tiny_of("GPT2ForSequenceClassification", 61, **POOLED), of_examples),
        (lambda: tiny_of("LlamaForTokenClassification", VOCABULARY), with_classes),
        (lambda: tiny_of("BertForTokenClassification", VOCABULARY), with_classes),
        (lambda: tiny_of("DistilBertForTokenClassification", VOCABULARY), with_classes),
    ],
)
def test_the_default_loss_is_the_models_own(
    make: Callable[[], nn.Module], labels: Callable[[Batch], Batch] | None
) -> None:
    batch = make_batch(4) if labels is None else labels(make_batch(4))
    for config in CONFIGS:
        model = make()
        engine = tezo_ds.initialize(model, {**config, "include": ["*weight*"]})
        assert engine.loss(batch) == pytest.approx(own_loss(model, batch), rel=1e-5)
        engine.step(batch)


PROMPT_TUNING = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
P_TUNING = peft.PromptEncoderConfig(
    num_virtual_tokens=4, encoder_hidden_size=22, task_type="CAUSAL_LM"
)


@pytest.mark.parametrize(
    ("make", "labels", "telling"),
    [
        (lambda: tiny_of("XLNetLMHeadModel", 61), None, "its own loss is"),
        (lambda: with_a_shift_of_its_own(), None, "T5ForConditionalGeneration: its own loss is"),
        (lambda: tiny_of("BertForPreTraining", 61), None, "are not at the places of labels"),
        (lambda: tiny_of("BertForSequenceClassification", 61), None, "not at the places of labels"),
        (lambda: tiny_of("BertForSequenceClassification", 61), classes, "numbers of its 2 classes"),
        (lambda: regression(), classes, "its problem_type is regression, and the default loss"),
        (lambda: tiny_of("BertForQuestionAnswering", 61), None, "not at the places of labels"),
        (lambda: Wrapped(tiny("roberta")), None, "Wrapped: its own loss is"),
        (
            lambda: peft.get_peft_model(tiny(), PROMPT_TUNING).eval(),
            None,
            "at the places of labels",
        ),
        (lambda: peft.get_peft_model(tiny(), P_TUNING).eval(), None, "at the places of labels"),
        (tiny, lambda labels: labels[:, :6], r"are not at the places of labels \(1, 6\)"),
        (tiny, lambda labels: torch.cat([labels, labels], 1), r"places of labels \(1, 22\)"),
        (tiny, lambda labels: labels[:, 4], r"are not at the places of labels \(1,\)"),
        (lambda: tiny("roberta"), lambda labels: labels[:, 1:], r"places of labels \(1, 10\)"),
    ],
)
def test_another_loss_is_refused(
    make: Callable[[], nn.Module], labels: Callable[[Tensor], Tensor] | None, telling: str
) -> None:
    batch = make_batch(4)
    if labels is not None:
        batch["labels"] = labels(batch["labels"])
    model = make()
    for use in ("loss", "step"):
        engine = tezo_ds.initialize(model, {"method": "mezo"})
        with pytest.raises(tezo_ds.ConfigError, match=f"{telling}.*; pass a loss_fn"):
            getattr(engine, use)(batch)


def test_a_loss_fn_is_not_compared() -> None:
    def ones(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return outputs.logits.float().sum(dim=(1, 2)), torch.ones(len(batch["labels"]))

    engine = tezo_ds.initialize(tiny(), {"rank": 2}, loss_fn=ones)
    engine.step({**make_batch(4), "labels": torch.zeros(4)})


class WithTerm(nn.Module):
    """A causal model that adds a term to its loss."""

    def __init__(self, term: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.term, self.dtype = tiny("llama"), term, dtype

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        outputs = self.model(input_ids=input_ids, labels=labels)
        if labels is not None:
            outputs.loss = (outputs.loss + self.term).to(self.dtype)
        return outputs


@pytest.mark.parametrize(
    ("model", "fine"),
    [
        (WithTerm(0.0), True),
        (WithTerm(1e-7), True),
        (WithTerm(1e-3), False),
        (WithTerm(0.0, torch.bfloat16), True),
        (WithTerm(0.5, torch.bfloat16), False),
    ],
)
def test_rounding_is_no_difference(model: nn.Module, fine: bool) -> None:
    engine = tezo_ds.initialize(model, {"rank": 2})
    if fine:
        engine.loss(make_batch(4))
    else:
        with pytest.raises(tezo_ds.ConfigError, match="its own loss is"):
            engine.loss(make_batch(4))


def test_models_that_balance_experts_train_on_the_labels_alone() -> None:
    model = tiny("mixtral")
    model.config.output_router_logits = True
    assert tezo_ds.initialize(model, {"rank": 2}).loss(make_batch(4)) < own_loss(
        model, make_batch(4)
    )


def test_a_few_tokens_about_a_label_are_compared() -> None:
    batch = make_batch(3, length=200)
    batch["labels"][:, :90] = -100
    batch["labels"][1] = -100
    few = compared._few_tokens(batch)
    assert {tuple(value.shape) for value in few.values()} == {(1, 32)}
    assert torch.equal(few["labels"][0], batch["labels"][0, 82:114])
    square = {**batch, "attention_mask": torch.ones(3, 1, 200, 200)}  # cannot be cut like that
    assert compared._few_tokens(square)["attention_mask"].shape == (1, 1, 200, 200)
    batch["labels"][:] = -100
    assert compared._few_tokens(batch)["labels"].shape == (1, 24)


def test_only_the_first_batch_costs_a_forward_more() -> None:
    model, calls = tiny(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    engine = tezo_ds.initialize(model, {"rank": 2})
    counts = []
    for _ in range(3):
        calls.clear()
        engine.loss(make_batch(4))
        counts.append(len(calls))
    assert counts == [2, 1, 1]
