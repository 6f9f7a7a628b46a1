"""Masked models: a mask stands where the answer is, which they never see."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_of
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

import tezo_ds
from tezo_ds.errors import ConfigError, DataError
from tezo_ds.run.resuming import fingerprint
from tezo_ds.tasks import Encoded, Example, TaskSpec, candidates, collate, encode, posing
from tezo_ds.tasks.encoding import mask_token
from tezo_ds.tasks.evaluation import Evaluator

FILM = Example("a film It was", "pos", "great")
CORPUS = ["a film It was great"] * 9 + ["a film It was terrible"] * 9
WORDS = {"pos": "great", "neg": "terrible"}


def tokenizer_with_mask() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(CORPUS, eos=True)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def test_the_mask_stands_in_the_answers_place_and_the_end_follows() -> None:
    tokenizer = tokenizer_with_mask()
    mask = tokenizer.mask_token_id
    (encoded,) = encode(tokenizer, [FILM], 64, mask)
    batch = collate([encoded], tokenizer.pad_token_id)
    assert tokenizer.decode(batch["input_ids"][0]) == "<s>a film It was<mask></s>"
    (place,) = (batch["labels"][0] != -100).nonzero()[:, 0].tolist()
    assert batch["input_ids"][0, place] == mask
    assert tokenizer.decode(batch["labels"][0, place]) == " great"


def test_an_answer_of_several_tokens_has_as_many_masks() -> None:
    tokenizer = tokenizer_with_mask()
    mask = tokenizer.mask_token_id
    ((short, long),) = candidates(tokenizer, [FILM], ["great", "terrible great"], 64, mask)
    batch = collate([short, long], tokenizer.pad_token_id)
    assert (batch["input_ids"] == mask).sum(dim=1).tolist() == [1, 2]
    assert ((batch["labels"] != -100) == (batch["input_ids"] == mask)).all()
    assert [tokenizer.decode(row[row != -100]) for row in batch["labels"]] == [
        " great", " terrible great",
    ]  # fmt: skip
    ((cut, _),) = candidates(tokenizer, [FILM], ["great", "terrible great"], 6, mask)
    assert (len(cut.input_ids), cut.truncated) == (5, 2)  # <s> It was | great | </s>
    with pytest.raises(DataError, match="beside 2 special and 2 answer tokens"):
        candidates(tokenizer, [FILM], ["great", "terrible great"], 4, mask)


def test_a_filler_has_no_labels_and_no_answer_in_view() -> None:
    tokenizer = tokenizer_with_mask()
    (encoded,) = encode(tokenizer, [FILM], 64, tokenizer.mask_token_id)
    batch = collate([], tokenizer.pad_token_id, filler=encoded)
    assert (batch["labels"] == -100).all()


def test_a_masked_model_has_nothing_to_do_with_texts_without_answers() -> None:
    tokenizer = tokenizer_with_mask()
    with pytest.raises(DataError, match="has no answer for a masked model to fill in; use a task"):
        encode(tokenizer, [Example("a film", None, None)], 64, tokenizer.mask_token_id)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM"])
def test_only_masked_models_ask_for_a_mask(name: str) -> None:
    tokenizer = tokenizer_with_mask()
    assert mask_token(tiny_of(name, 61), tokenizer) == tokenizer.mask_token_id
    assert mask_token(tiny("llama"), tokenizer) is None
    assert mask_token(tiny("llama"), tiny_tokenizer(CORPUS)) is None
    with pytest.raises(
        ConfigError, match=f"{name} is a masked model, and its tokenizer has no mask"
    ):
        mask_token(tiny_of(name, 61), tiny_tokenizer(CORPUS))


def test_a_run_of_other_masks_has_another_fingerprint() -> None:
    plain = Encoded([5, 6, 7], 2, "a")
    assert fingerprint([plain]) == fingerprint([Encoded([5, 6, 7], 2, "b")])
    seen = {
        fingerprint([Encoded([5, 6, 7], 1, "a", 0, end, mask)]) for end in (2, 3) for mask in (8, 9)
    }
    assert len(seen | {fingerprint([plain])}) == 5


def reader(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """Makes a masked model that has learnt to repeat the tokens that it sees."""
    model = tiny_of("BertForMaskedLM", len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in CORPUS[8:10]])
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("words", [WORDS, {"pos": "great", "neg": "terrible great"}])
def test_the_prediction_does_not_depend_on_the_answer(
    words: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard: with the answer in view, a model that reads well copies it, and is always right."""
    tokenizer = tokenizer_with_mask()
    model = reader(tokenizer)
    engine = tezo_ds.initialize(model, {"rank": 2})
    spec = TaskSpec(name="films", template="{text} It was", verbalizers=words)
    prompts = [f"a film {i} It was" for i in range(12)]

    def accuracies() -> list[float | None]:
        """Returns the accuracy where all examples have the first label, and where all have the second."""
        found = []
        for label, word in words.items():
            examples = [Example(prompt, label, word) for prompt in prompts]
            found.append(Evaluator(engine, tokenizer, spec, examples, 5, 64)().accuracy)
        return found

    assert sum(accuracies()) == pytest.approx(1.0)  # one prediction each, whichever is right
    monkeypatch.setattr(posing, "mask_token", lambda *_: None)
    if words == WORDS:
        assert accuracies() == [1.0, 1.0]
