"""Token ids of prompts and answers, truncation, and collation. No downloaded tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from tezo_ds.errors import DataError
from tezo_ds.tasks import Encoded, Example, candidates, collate, encode, first_tokens, truncations

FILM = Example("a film It was", "pos", "great")
CORPUS = (
    ["a film It was great"] * 9 + ["a film It was terrible"] * 9 + ["a film It was greater"] * 9
)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_answer_follows_the_prompt(bos: bool, eos: bool) -> None:
    tokenizer = tiny_tokenizer(CORPUS, bos=bos, eos=eos)
    (encoded,) = encode(tokenizer, [FILM], max_length=64)
    ids = encoded.input_ids
    assert ids[:1] == [0] if bos else ids[0] != 0
    assert 1 not in ids  # no </s> between prompt and answer, nor after it
    assert tokenizer.decode(ids[bos : encoded.label_start]) == "a film It was"
    assert tokenizer.decode(ids[encoded.label_start :]) == " great"
    assert (encoded.label, encoded.truncated) == ("pos", 0)


def test_language_model_text_trains_all_but_the_first_token() -> None:
    tokenizer = tiny_tokenizer(CORPUS, bos=True, eos=True)
    (encoded,) = encode(tokenizer, [Example("a film It", None, None)], max_length=64)
    assert encoded.input_ids == tokenizer("a film It")["input_ids"]
    assert encoded.input_ids[0] == 0
    assert encoded.input_ids[-1] == 1
    assert (encoded.label_start, encoded.label) == (1, None)


def test_mixed_examples_keep_their_order() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    lm = Example("It was terrible", None, None)
    mixed = encode(tokenizer, [lm, FILM, lm, FILM], max_length=64)
    alone = [encode(tokenizer, [e], max_length=64)[0] for e in (lm, FILM, lm, FILM)]
    assert mixed == alone
    assert encode(tokenizer, [], max_length=64) == []


def test_truncation_keeps_bos_the_prompts_end_and_the_answer() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    (whole,) = encode(tokenizer, [FILM], max_length=64)
    assert len(whole.input_ids) == 6  # <s> a film It was | great
    (cut,) = encode(tokenizer, [FILM], max_length=4)
    assert cut.input_ids == whole.input_ids[:1] + whole.input_ids[3:]
    assert (cut.label_start, cut.truncated) == (3, 2)
    (fits,) = encode(tokenizer, [FILM], max_length=6)
    assert fits == whole
    assert truncations([whole, cut, cut]) == 2
    with pytest.raises(DataError) as caught:
        encode(tokenizer, [FILM], max_length=2)
    expected = (
        "max_length 2 leaves no room for a prompt beside 1 special and 1 answer tokens; raise it"
    )
    assert str(caught.value) == expected


def test_truncated_language_model_text() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    ids = tokenizer("a film It was great")["input_ids"]
    (cut,) = encode(tokenizer, [Example("a film It was great", None, None)], max_length=3)
    assert cut == Encoded([0, *ids[-2:]], 1, None, 3)
    bare = tiny_tokenizer(CORPUS, bos=False)
    with pytest.raises(DataError, match=r"^text 'a' is a single token: nothing to predict$"):
        encode(bare, [Example("a", None, None)], max_length=8)


def test_candidates_share_the_prompt_even_when_cut() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    words = ["great", "terrible indeed"]
    ((short, long),) = candidates(tokenizer, [FILM], words, max_length=64)
    assert tokenizer.decode(short.input_ids[short.label_start :]) == " great"
    assert tokenizer.decode(long.input_ids[long.label_start :]) == " terrible indeed"
    assert short == encode(tokenizer, [FILM], max_length=64)[0]
    tight = len(long.input_ids) - 2
    ((short_cut, long_cut),) = candidates(tokenizer, [FILM], words, max_length=tight)
    assert (
        short_cut.input_ids[: short_cut.label_start] == long_cut.input_ids[: long_cut.label_start]
    )
    assert short_cut.truncated == long_cut.truncated == 2
    assert len(long_cut.input_ids) == tight


def test_first_tokens() -> None:
    tokenizer = tiny_tokenizer(CORPUS)
    found = first_tokens(tokenizer, ["great", "terrible"], ["a film It was"])
    assert found is not None
    assert [tokenizer.decode([i]) for i in found] == [" great", " terrible"]
    (encoded,) = encode(tokenizer, [FILM], max_length=64)
    assert encoded.input_ids[encoded.label_start :] == [found[0]]
    assert first_tokens(tokenizer, ["great", "unheard"], ["a film It was"]) is None
    assert first_tokens(tokenizer, ["great", "great"], ["a film It was"]) is None


class MergingTokenizer:
    """A tokenizer with one token a word, but `: no` is one token: the answer's form depends on what
    precedes it."""

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        def ids(text: str) -> list[int]:
            return [sum(map(ord, w)) for w in text.replace(": no", " :no").split()]

        return {"input_ids": ids(texts) if isinstance(texts, str) else [ids(t) for t in texts]}


def test_prompts_end_that_merges_with_the_answer() -> None:
    tokenizer: Any = MergingTokenizer()
    (encoded,) = encode(tokenizer, [Example("is it so :", "n", "no")], max_length=9)
    assert encoded.input_ids == tokenizer("is it so : no")["input_ids"]
    assert encoded.label_start == 3  # the merged token is the answer's
    assert first_tokens(tokenizer, ["yes", "no"], ["is it so ?"]) is not None
    assert first_tokens(tokenizer, ["yes", "no"], ["is it so ?", "is it so :"]) is None


def test_collate_pads_on_the_right() -> None:
    batch = [Encoded([5, 6, 7], 2, "a"), Encoded([8, 9], 1, "b")]
    out = collate(batch, pad_id=2, multiple=4)
    assert {t.dtype for t in out.values()} == {torch.int64}
    assert out["input_ids"].tolist() == [[5, 6, 7, 2], [8, 9, 2, 2]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert out["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, -100, -100]]
    assert collate(batch, pad_id=2)["input_ids"].shape == (2, 3)


def test_a_pad_id_that_is_also_a_token_keeps_its_label() -> None:
    """Hazard: many models pad with EOS, so that `labels == pad` is no way to find the padding."""
    out = collate([Encoded([5, 2, 2], 1, "a"), Encoded([5], 1, "b")], pad_id=2)
    assert out["labels"].tolist() == [[-100, 2, 2], [-100, -100, -100]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collate_of_nothing_takes_the_filler() -> None:
    out = collate([], pad_id=2, filler=Encoded([5, 6], 1, "a"))
    assert out["input_ids"].tolist() == [[5, 6]]
    assert out["attention_mask"].tolist() == [[1, 1]]
    assert out["labels"].tolist() == [[-100, -100]]
    with pytest.raises(ValueError, match="no filler"):
        collate([], pad_id=2)
