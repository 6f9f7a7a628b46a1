"""Encoder-decoder models: prompts in the encoder, answers in the decoder, as transformers itself has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kinds import ENCODER_DECODERS, NO_TABLE, model_for, tokenizer_for
from own_directions import OWN, ragged, slopes_in_a_loop
from tiny import make_batch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.models.mbart.modeling_mbart import shift_tokens_right

import tezo_ds
from tezo_ds.errors import ConfigError, DataError, ProbeError
from tezo_ds.intake.causality import looks_ahead
from tezo_ds.losses.targets import decoder_inputs
from tezo_ds.run.resuming import fingerprint
from tezo_ds.tasks import Example, TaskSpec, collate
from tezo_ds.tasks.encoded import labels_of
from tezo_ds.tasks.evaluation import Evaluator
from tezo_ds.tasks.formats import Conversation, Kind
from tezo_ds.tasks.generation import Generator, asked
from tezo_ds.tasks.posing import posing_of
from tezo_ds.tasks.seq2seq import decoder_start

TEXTS = ["a film that was odd It was great", "It was terrible okay", "what is the seat of it Paris"]
TEXTS += ["terrible", "great", "okay", "Paris"] * 3  # as words of one token each
WORDS = {"bad": "terrible", "good": "great", "mixed": "okay"}
LONG = {"bad": "terrible okay", "good": "great", "mixed": "Paris Paris film"}
QA = [
    Example("what is the seat of France", None, "Paris", Kind.COMPLETION),
    Example("is it", None, "a film that was odd", Kind.COMPLETION),
    Example("a film", None, "great", Kind.COMPLETION),
]


def parts(name: str, **more: Any) -> tuple[tezo_ds.Engine, PreTrainedTokenizerFast]:
    """Makes an engine at coefficients that are not zero, and a tokenizer."""
    tokenizer = tokenizer_for(name, TEXTS)
    config = {"rank": 2, "seed": 3, "rho": 1e-2, "lr": 1e-3, "exclude": NO_TABLE, **more}
    engine = tezo_ds.initialize(model_for(name, tokenizer), config)
    noise = torch.randn(engine.space.numel, generator=torch.manual_seed(1))
    engine.method.coefficients.copy_(0.2 * noise)
    return engine, tokenizer


def pairs(examples: int, seed: int = 0, length: int = 11) -> dict[str, Tensor]:
    """Makes a batch as in a loop of one's own: labels are of another length than what the encoder reads."""
    labels = make_batch(examples, seed=seed + 9, length=8)["labels"]
    return {**make_batch(examples, seed=seed, length=length), "labels": labels}


def films(words: dict[str, str]) -> list[Example]:
    labels = list(words) * 4
    return [
        Example(f"a film {'that ' * (i % 3)}was {i} It was", label, words[label])
        for i, label in enumerate(labels)
    ]


def asked_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, Tensor]:
    """Returns what transformers' own tokenizer gives an encoder, one text at a time."""
    (text,) = texts
    return dict(tokenizer(text, return_tensors="pt"))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_sequences_are_those_of_the_tokenizer(name: str) -> None:
    engine, tokenizer = parts(name)
    module: Any = engine.sharding.module
    encoded = posing_of(module, tokenizer, None, False).encode(QA, 64)
    for e, example in zip(encoded, QA, strict=True):
        assert e.input_ids == tokenizer(example.prompt)["input_ids"]
        own = tokenizer(example.answer, return_tensors="pt")["input_ids"]  # as text_target
        batch = collate([e], 2)
        given = engine.objective.inputs(batch)["decoder_input_ids"]
        assert torch.equal(given, module.prepare_decoder_input_ids_from_labels(labels=own))
        assert batch["labels"][batch["labels"] >= 0].tolist() == list(e.answer or ())
        assert own[0].tolist() == [*e.start[1:], *(e.answer or ())] and own[0, -1] == 1


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_loss_is_that_of_the_models_own_labels(name: str) -> None:
    engine, tokenizer = parts(name)
    posing = posing_of(engine.sharding.module, tokenizer, None, False)
    batch = collate(posing.encode(QA, 64), 2)
    total = count = 0.0
    with torch.no_grad(), engine.applied():
        for example in QA:
            labels = tokenizer(example.answer, return_tensors="pt")["input_ids"]
            logits = engine.sharding.module(
                **asked_of(tokenizer, [example.prompt]), labels=labels
            ).logits
            ahead = 1 if name.startswith("Bart") else 0  # <s> is given, and not predicted
            losses = F.cross_entropy(logits[0, ahead:], labels[0, ahead:], reduction="none")
            total, count = total + float(losses.sum()), count + len(losses)
    assert engine.loss(batch) == pytest.approx(total / count, rel=1e-5)
    idle = collate([], 2, filler=posing.encode(QA, 64)[1])
    assert bool((idle["labels"] == -100).all())
    both = {key: torch.cat([value, value]) for key, value in idle.items()}
    with pytest.raises(tezo_ds.ProbeError, match="no position of the batch carries a label"):
        engine.step(both)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("words", [WORDS, LONG])
@pytest.mark.parametrize("alone", [False, True])
def test_accuracy_is_that_of_each_example_by_itself(
    name: str, words: dict[str, str], alone: bool
) -> None:
    engine, tokenizer = parts(name)
    module, examples = engine.sharding.module, films(words)
    spec = TaskSpec(name="films", template="{text} It was", verbalizers=words)
    single = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words.values()]
    if alone and words is LONG:
        assert posing_of(module, tokenizer, spec, True).tokens(list(words.values()), []) is None
        return
    if alone:
        engine.objective.choices = torch.tensor([ids[0] for ids in single])
    right, losses = 0, []
    start = list(decoder_start(module, tokenizer))
    assert start == ([2] if name.startswith("T5") else [1, 0])
    with torch.no_grad(), engine.applied():
        for example in examples:
            prompt = asked_of(tokenizer, [example.prompt])
            means, firsts = [], torch.empty(0)
            for ids in single:
                answer = [*ids, *([] if alone else [1])]
                decoder = torch.tensor([[*start, *answer[:-1]]])
                logits = module(**prompt, decoder_input_ids=decoder).logits[0, len(start) - 1 :]
                firsts = logits[0, [each[0] for each in single]]
                means.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
            picked = int(firsts.argmax())
            if words is LONG:
                picked = int(torch.stack([each.mean() for each in means]).argmin())
            number = list(words).index(str(example.label))
            right += picked == number
            losses.append(means[number] if not alone else -firsts.log_softmax(0)[number, None])
    score = Evaluator(engine, tokenizer, spec, examples, 5, 64)()
    assert score.accuracy == right / len(examples) and 0 < right < len(examples)
    assert score.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_long_prompts_lose_their_beginning_and_answers_their_end() -> None:
    engine, tokenizer = parts("T5ForConditionalGeneration")
    posing = posing_of(engine.sharding.module, tokenizer, None, False)
    example = Example("film " * 20 + "was", None, "Paris " * 9 + "great", Kind.COMPLETION)
    (whole,), (cut,) = posing.encode([example], 64), posing.encode([example], 7)
    assert cut.input_ids == whole.input_ids[-7:] and cut.truncated == len(whole.input_ids) - 7
    assert cut.answer == (whole.answer or ())[:7] and cut.lost == len(whole.answer or ()) - 7
    with pytest.raises(DataError, match="max_length 1 leaves no room for a prompt"):
        posing.encode([example], 1)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (Example("a film", None, None, Kind.TEXT), "text 'a film' is no prompt with an answer"),
        (Example("a film", None, None), "text 'a film' is no prompt with an answer"),
        (
            Example(Conversation([]).to_text(), None, None, Kind.MESSAGES),
            "a conversation .* is no prompt with an answer",
        ),
        (
            Example("a", None, "b", Kind.COMPLETION, everything=True),
            "--loss-on all: an encoder-dec",
        ),
    ],
)
def test_examples_that_are_no_pair_are_refused(example: Example, words: str) -> None:
    engine, tokenizer = parts("T5ForConditionalGeneration")
    posing = posing_of(engine.sharding.module, tokenizer, None, False)
    with pytest.raises(DataError, match=words):
        posing.encode([QA[0], example], 64)
    with pytest.raises(DataError, match=words):
        asked(tokenizer, [QA[0], example], 64, 8, posing)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_those_of_generate(name: str, batch_size: int) -> None:
    engine, tokenizer = parts(name)
    prompts, right = asked(
        tokenizer, QA, 64, 6, posing_of(engine.sharding.module, tokenizer, None, False)
    )
    assert right == [example.answer for example in QA]
    generator = Generator(engine, tokenizer, 2, 6, (), batch_size)
    found = generator(prompts)
    untrained = model_for(name, tokenizer)
    plain = [_generated(untrained, tokenizer, example.prompt) for example in QA]
    assert found != plain, "the coefficients ride along"
    engine.merge()
    alone = [_generated(engine.sharding.module, tokenizer, example.prompt) for example in QA]
    assert found == alone and any(found)


def _generated(module: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Returns an answer of transformers' own making; BART's decoder begins as it does on the hub."""
    more = {"forced_bos_token_id": 0} if type(module).__name__.startswith("Bart") else {}
    new = 6 + len(more)
    made = module.generate(
        **asked_of(tokenizer, [prompt]), max_new_tokens=new, do_sample=False, **more
    )
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_both_probes_see_the_same_losses(name: str) -> None:
    losses = []
    for probe in ("fused", "inplace"):
        engine, _ = parts(name, probe=probe, queries=2)
        batches = [pairs(5, step) for step in range(4)]
        losses.append([engine.step(batch).loss for batch in batches])
        losses[-1] += [engine.loss(batch) for batch in batches]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 8


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_each_example_may_have_directions_of_its_own(name: str) -> None:
    tokenizer = tokenizer_for(name, TEXTS)
    batch = {**make_batch(7), "labels": ragged(7, length=8)["labels"]}
    fields = {**OWN, "exclude": NO_TABLE}
    expected = slopes_in_a_loop(lambda: model_for(name, tokenizer), batch, fields)
    found = tezo_ds.initialize(model_for(name, tokenizer), fields).step(batch).kappa
    torch.testing.assert_close(found, tuple(expected), rtol=5e-3, atol=5e-3)


def test_a_table_of_distances_is_left_to_the_in_place_probe(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = pairs(5, length=20)  # as many positions as rows in all branches: 2 x 2 x 5
    losses = []
    for probe in ("auto", "inplace"):
        engine, _ = parts("T5ForConditionalGeneration", probe=probe, exclude=(), queries=2)
        losses.append([engine.step(batch).loss for _ in range(3)])
        assert engine.probe.name == "inplace"
    assert losses[0] == losses[1]
    assert (
        "inplace, since fused cannot reach" in caplog.text and "table of distances" in caplog.text
    )
    with pytest.raises(
        ProbeError, match=r"relative_attention_bias.weight .*exclude it or use inpl"
    ):
        parts("T5ForConditionalGeneration", probe="fused", exclude=())


def test_late_layers_run_in_every_branch() -> None:
    include = ("last:1", "*lm_head*")
    for shared in (True, False):
        engine, _ = parts("T5ForConditionalGeneration", include=include, shared_trunk=shared)
        engine.step(pairs(5))
        trunk = engine.objective.trunk
        assert trunk is None or (trunk.found is None and "reads the whole encoder" in trunk.reason)
    engine, _ = parts("T5ForConditionalGeneration", include=include, trunk_cache="memory")
    with pytest.raises(ConfigError, match="no trunk: T5ForConditionalGeneration: each block of a"):
        engine.step({**pairs(5), "example_ids": torch.arange(5)})


def test_examples_without_labels_pass_code_that_looks_for_the_last_one() -> None:
    engine, _ = parts("BartForConditionalGeneration")
    module: Any = engine.sharding.module
    module.prepare_decoder_input_ids_from_labels = lambda labels: shift_tokens_right(labels, 2)
    labels = torch.tensor([[7, 8, 1], [-100, -100, -100], [9, 1, -100]])
    assert decoder_inputs(module, labels)[[0, 2]].tolist() == [[1, 7, 8], [1, 9, 1]]


def test_a_resumed_run_needs_the_same_answers() -> None:
    engine, tokenizer = parts("T5ForConditionalGeneration")
    module = engine.sharding.module
    whole, alone = (
        posing_of(module, tokenizer, None, words).encode(QA, 64) for words in (False, True)
    )
    other = posing_of(module, tokenizer, None, False).encode(
        [QA[0], QA[1], replace(QA[2], answer="odd")], 64
    )
    assert len({fingerprint(examples) for examples in (whole, alone, other)}) == 3
    assert labels_of(whole[0]) == list(whole[0].answer or ()) and fingerprint(whole) == fingerprint(
        list(whole)
    )


def test_a_decoder_is_looked_at_for_what_it_sees() -> None:
    engine, _ = parts("T5ForConditionalGeneration")
    assert not looks_ahead(engine, [5, 6, 7, 8, 9, 10, 11, 12, 13])
    stack: Any = engine.sharding.module.decoder
    stack.config.is_decoder = False  # so that all its positions see one another
    for module in stack.modules():
        module.is_causal = False
    assert looks_ahead(engine, [5, 6, 7, 8, 9, 10, 11, 12, 13])


def test_a_decoder_that_begins_with_a_labels_last_token_is_refused() -> None:
    engine, tokenizer = parts("BartForConditionalGeneration")
    module: Any = engine.sharding.module

    def as_mbart(labels: Tensor) -> Tensor:
        return torch.cat([labels[:, -1:], labels[:, :-1]], dim=1)

    module.prepare_decoder_input_ids_from_labels = as_mbart
    with pytest.raises(ConfigError, match="its decoder begins with the last of its labels"):
        decoder_start(module, tokenizer)


def test_a_config_without_a_first_token_is_refused() -> None:
    tokenizer = tokenizer_for("T5ForConditionalGeneration", TEXTS)
    model = model_for("T5ForConditionalGeneration", tokenizer, decoder_start_token_id=None)
    engine = tezo_ds.initialize(model, {"rank": 2, "exclude": NO_TABLE})
    with pytest.raises(ConfigError, match="its config lacks decoder_start_token_id"):
        engine.step(pairs(5))
