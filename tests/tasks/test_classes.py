"""Sequence-classification models: labels are classes, and an example has one row of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import model_for, tokenizer_for
from own_directions import OWN, slopes_in_a_loop
from tiny import make_batch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import tezo_ds
from tezo_ds.errors import ConfigError, DataError
from tezo_ds.intake.tokens import pad_of
from tezo_ds.run.resuming import fingerprint
from tezo_ds.tasks import Example, TaskSpec, collate
from tezo_ds.tasks.classes import classes_of
from tezo_ds.tasks.evaluation import Evaluator
from tezo_ds.tasks.posing import posing_of

TEXTS = ["a film that was odd It was great", "It was terrible okay"]
LABELS = {"bad": "bad", "good": "good", "mixed": "mixed"}
SPEC = TaskSpec(name="films", template="{text}", verbalizers=LABELS)
KINDS = ("Bert", "Roberta", "DistilBert", "Llama", "GPT2")
NAMES = tuple(f"{kind}ForSequenceClassification" for kind in KINDS)


def parts(name: str, **more: Any) -> tuple[tezo_ds.Engine, PreTrainedTokenizerFast]:
    """Makes an engine of three classes, at coefficients that are not zero, and a tokenizer."""
    tokenizer = tokenizer_for(name, TEXTS)
    engine = tezo_ds.initialize(
        model_for(name, tokenizer, num_labels=3),
        {"rank": 2, "seed": 3, "rho": 1e-2, "lr": 1e-3, **more},
    )
    noise = torch.randn(engine.space.numel, generator=torch.manual_seed(1))
    engine.method.coefficients.copy_(0.1 * noise)
    return engine, tokenizer


def films() -> list[Example]:
    labels = list(LABELS) * 4
    return [
        Example(f"a film {'that ' * (i % 4)}was {i}", label, label)
        for i, label in enumerate(labels)
    ]


def batch_of(examples: int, seed: int = 0) -> dict[str, Tensor]:
    """Makes a batch as in a loop of one's own, each fourth example without a label."""
    batch = make_batch(examples, seed=seed)
    ids = batch["input_ids"].where(batch["attention_mask"] > 0, torch.tensor(2))
    labels = torch.tensor([2, 0, 1, -100]).repeat(examples)[:examples]
    return {**batch, "input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_and_loss_are_the_models_own(name: str) -> None:
    engine, tokenizer = parts(name)
    examples, losses, right = films(), [], 0
    with torch.no_grad(), engine.applied():
        for example in examples:
            label = torch.tensor([list(LABELS).index(str(example.label))])
            given = tokenizer(example.prompt, return_tensors="pt")
            outputs = engine.sharding.module(**given, labels=label)
            losses.append(float(outputs.loss))
            right += int(outputs.logits.argmax()) == int(label)
    score = Evaluator(engine, tokenizer, SPEC, examples, 5, 64, 2)()
    assert score.accuracy == right / len(examples) and 0 < right < len(examples)
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    posing = posing_of(engine.sharding.module, tokenizer, SPEC, False)
    batch = collate(posing.encode(examples, 64), 2)
    assert batch["labels"].tolist() == [0, 1, 2] * 4
    assert engine.loss(batch) == pytest.approx(score.loss, rel=1e-5)
    idle = collate([], 2, filler=posing.encode(examples[:1], 64)[0])
    assert idle["labels"].tolist() == [-100] and idle["input_ids"].shape[0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_both_probes_see_the_same_losses(name: str) -> None:
    losses = []
    for more in ({}, {"micro_batch": 2}, {"branch_chunk": 3}, {"probe": "inplace"}):
        engine, _ = parts(name, queries=2, **more)
        batches = [batch_of(5, step) for step in range(3)]
        losses.append([engine.step(batch).loss for batch in batches])
        losses[-1] += [engine.loss(batch) for batch in batches]
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, rel=1e-5)
    with torch.no_grad():
        engine.merge()
        logits = engine.sharding.module(**{**batch_of(5, 2), "labels": None}).logits
        own = F.cross_entropy(logits, batch_of(5, 2)["labels"])
    assert losses[0][-1] == pytest.approx(float(own), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_each_example_may_have_directions_of_its_own(name: str) -> None:
    tokenizer = tokenizer_for(name, TEXTS)

    def make() -> Any:
        return model_for(name, tokenizer, num_labels=3)

    expected = slopes_in_a_loop(make, batch_of(7), OWN)
    found = tezo_ds.initialize(make(), OWN).step(batch_of(7)).kappa
    assert len(found) == 12
    torch.testing.assert_close(found, tuple(expected), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_late_layers_and_head_train_behind_a_shared_trunk(name: str) -> None:
    losses = []
    for more in ({"shared_trunk": False}, {}, {"trunk_cache": "memory"}):
        include = ("last:1", "*score*", "*classifier*")
        engine, _ = parts(name, queries=2, include=include, **more)
        own = []
        for step in range(4):
            ids = torch.arange(5) + 5 * (step % 2)
            own.append(engine.step({**batch_of(5, step % 2), "example_ids": ids}).loss)
        losses.append(own)
        trunk = engine.objective.trunk
        assert (trunk is None) == ("shared_trunk" in more)
        assert trunk is None or trunk.found is not None, trunk
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) and len(set(losses[0])) == 4


@pytest.mark.parametrize(
    ("named", "words", "numbers", "noted"),
    [
        (["neg", "pos"], {"pos": "great", "neg": "bad"}, {"pos": 1, "neg": 0}, False),
        (["NEG", "POS "], {"neg": "x", "pos": "y"}, {"neg": 0, "pos": 1}, False),
        (["great", "terrible"], {"0": "terrible", "1": "great"}, {"0": 1, "1": 0}, False),
        (["LABEL_0", "LABEL_1"], {"1": "a", "0": "b"}, {"1": 1, "0": 0}, False),
        (["LABEL_0", "LABEL_1"], {"LABEL_1": "a", "LABEL_0": "b"}, {"LABEL_1": 1, "LABEL_0": 0}, False),
        (["LABEL_0", "LABEL_1"], {"yes": "a", "no": "b"}, {"yes": 0, "no": 1}, True),
        (["neg", "pos"], {"neg": "a", "other": "b"}, {"neg": 0, "other": 1}, True),
        ([f"LABEL_{i}" for i in range(11)], {str(i): f"w{i}" for i in (10, *range(10))}, None, False),
    ],
)  # fmt: skip
def test_labels_and_classes_are_matched(
    named: list[str], words: dict[str, str], numbers: dict[str, int] | None, noted: bool
) -> None:
    config: Any = type("Config", (), {})
    config.num_labels, config.label2id = len(named), {name: i for i, name in enumerate(named)}
    spec = TaskSpec(name="films", template="{text}", verbalizers=words)
    found, note = classes_of(config, spec)
    assert found == (numbers or {str(i): i for i in range(11)})
    assert list(found) == list(words)
    assert (note is not None) == noted
    if note is not None:
        assert note.endswith(", ".join(f"{label} = {i}" for i, label in enumerate(words)))


def test_evaluation_goes_by_the_names_of_classes() -> None:
    engine, tokenizer = parts(NAMES[0])
    examples = films()
    plain = Evaluator(engine, tokenizer, SPEC, examples, 5, 64, 2)()
    config = engine.sharding.module.config
    turned = dict(zip(LABELS, ("good", "mixed", "bad"), strict=True))
    other = [Example(e.prompt, turned[str(e.label)], turned[str(e.label)]) for e in examples]
    config.label2id = {"good": 0, "mixed": 1, "bad": 2}
    assert Evaluator(engine, tokenizer, SPEC, other, 5, 64, 2)() == plain


@pytest.mark.parametrize(
    ("example", "spec", "words"),
    [
        (None, TaskSpec(name="films", template="{text}"), "films: has no labels, which a model"),
        (
            None,
            TaskSpec(name="films", template="{text}", verbalizers={"a": "a", "b": "b"}),
            r"films: has 2 labels \(a, b\), and the model 3 classes \(LABEL_0, LABEL_1, LABEL_2\)",
        ),
        (Example("a film", None, None), SPEC, "text 'a film' has no label, which a model"),
    ],
)
def test_what_has_no_classes_is_refused(
    example: Example | None, spec: TaskSpec, words: str
) -> None:
    engine, tokenizer = parts(NAMES[0])
    with pytest.raises(DataError, match=words):
        posing_of(engine.sharding.module, tokenizer, spec, False).encode(
            [example] if example else [], 64
        )


def test_a_resumed_run_needs_the_same_classes() -> None:
    engine, tokenizer = parts(NAMES[0])
    module, found = engine.sharding.module, set()
    for names in (["bad", "good", "mixed"], ["good", "mixed", "bad"], ["good", "mixed", "bad"]):
        module.config.label2id = {name: number for number, name in enumerate(names)}
        found.add(fingerprint(posing_of(module, tokenizer, SPEC, False).encode(films(), 64)))
    assert len(found) == 2


def test_a_model_that_classifies_generates_nothing() -> None:
    engine, tokenizer = parts(NAMES[0])
    with pytest.raises(ConfigError, match="BertForSequenceClassification classifies and cannot"):
        posing_of(engine.sharding.module, tokenizer, None, False)


def test_the_token_of_padding_is_told_to_the_model() -> None:
    for name, own, expected in ((NAMES[3], None, 2), (NAMES[3], 5, 5), (NAMES[4], None, 2)):
        tokenizer = tokenizer_for(name, TEXTS)
        model = model_for(name, tokenizer, num_labels=3, pad_token_id=own)
        assert pad_of(model, tokenizer, len(tokenizer)) == expected
        assert model.config.pad_token_id == expected
    model.config.pad_token_id = None
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="neither its config nor its tokenizer has a pad_token"):
        pad_of(model, tokenizer, len(tokenizer))
