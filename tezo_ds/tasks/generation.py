"""Answers that a model generates at the present coefficients: greedy, in batches, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError, DataError
from tezo_ds.models.structure import is_encoder_decoder
from tezo_ds.rollouts.prompts import until
from tezo_ds.sharding import Sharding
from tezo_ds.tasks.chat import opening
from tezo_ds.tasks.encoding import prompt_ids
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.formats import Conversation, Kind
from tezo_ds.tasks.metrics import Metric
from tezo_ds.tasks.posing import Posing
from tezo_ds.tasks.seq2seq import EncoderDecoder, decoder_start, refuse_undivided


class Generator:
    """Generator of greedy continuations.

    Under ZeRO-3 and FSDP2 a forward takes all ranks, so a rank whose texts have ended, or that has none,
    makes forwards until the last rank's have.

    Args:
        engine: the model at its coefficients.
        tokenizer: the model's.
        pad_id: token that pads prompts, on the left or before an encoder on the right, masked out.
        most: tokens that are generated, at most.
        stop: texts that end an answer, besides EOS; they and what follows are cut away.
        batch_size: prompts at a time.

    Raises:
        ConfigError: the model has no `generate`.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, pad_id: int, most: int,
        stop: Sequence[str] = (), batch_size: int = 32,
    ) -> None:  # fmt: skip
        module: Any = engine.sharding.module
        self._start: torch.Tensor | None = None  # of a decoder
        if is_encoder_decoder(module):
            self._start = torch.tensor(decoder_start(module, tokenizer))
        if not (hasattr(module, "can_generate") and module.can_generate()):
            raise ConfigError(
                f"{type(module).__name__} cannot generate text; leave --metric out, or take a causal model"
            )
        self._engine, self._tokenizer, self._pad = engine, tokenizer, pad_id
        self._most, self._stop, self._batch_size = most, list(stop), batch_size

    @property
    def sharding(self) -> Sharding:
        """The engine's sharding."""
        return self._engine.sharding

    def __call__(
        self, prompts: Sequence[list[int]], progress: Callable[[float], None] | None = None,
        streamer: Any = None,
    ) -> list[str]:  # fmt: skip
        """Returns the continuation of each of this rank's prompts. All ranks must call this.

        Args:
            prompts: token ids, none of them empty.
            progress: given the fraction done.
            streamer: of transformers, for a single prompt.
        """
        mine = -(-len(prompts) // self._batch_size)
        rounds = self._engine.sharding.maxima([mine])[0]
        found: list[str] = []
        with self._engine.applied():
            for index in range(rounds):
                part = prompts[index * self._batch_size : (index + 1) * self._batch_size]
                found += self._batch(part or [[self._pad]], streamer)[: len(part)]
                if progress is not None:
                    progress((index + 1) / rounds)
        return found

    def _batch(self, prompts: Sequence[list[int]], streamer: Any) -> list[str]:
        sharding, model = self._engine.sharding, self._model
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            first = longest - len(prompt) if self._start is None else 0  # encoders count from there
            ids[row, first : first + len(prompt)] = torch.tensor(prompt)
            mask[row, first : first + len(prompt)] = 1
        more: dict[str, Any] = {}
        if self._stop:
            more = {"stop_strings": self._stop, "tokenizer": self._tokenizer}
        given = {"input_ids": ids.to(sharding.device), "attention_mask": mask.to(sharding.device)}
        ahead = longest
        if self._start is not None:
            given, ahead = self._from_encoder(given), len(self._start)
        made = model.generate(
            **given,
            max_new_tokens=self._most, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
            pad_token_id=self._pad, synced_gpus=sharding.everyone > 1, streamer=streamer, **more,
        )  # fmt: skip
        texts = self._tokenizer.batch_decode(made[:, ahead:], skip_special_tokens=True)
        return [until(text, self._stop) for text in texts]

    @property
    def _model(self) -> Any:
        return self._engine.sharding.module

    def _from_encoder(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns what a decoder goes on from, made by a forward of the whole model: the hooks that gather
        weights are the whole model's, and `generate` would call the encoder by itself."""
        assert self._start is not None
        start = self._start.to(self.sharding.device).repeat(len(given["input_ids"]), 1)
        outputs = self.sharding.forward(**given, decoder_input_ids=start, use_cache=False)
        hidden = outputs.encoder_last_hidden_state
        return {
            "encoder_outputs": BaseModelOutput(last_hidden_state=hidden),
            "attention_mask": given["attention_mask"],
            "decoder_input_ids": start,
        }


@dataclass(frozen=True)
class Generated:
    """Metric of what a model answers to some prompts.

    Attributes:
        metric: (predictions, references) -> float.
        generator: makes the answers.
        prompts: this rank's, as token ids.
        right: the right answers.
    """

    metric: Metric
    generator: Generator
    prompts: list[list[int]]
    right: list[str]

    def __call__(self, progress: Callable[[float], None] | None = None) -> tuple[float, list[str]]:
        """Returns the metric over the prompts of all ranks, and this rank's answers. All ranks must call
        this."""
        made = self.generator(self.prompts, progress)
        sharding = self.generator.sharding
        found = sharding.gather((sharding.rank, made, self.right))
        of_rank = {
            rank: (said, right) for rank, said, right in found
        }  # ranks may see the same data
        said, right = ([x for r in sorted(of_rank) for x in of_rank[r][part]] for part in (0, 1))
        return self.metric(said, right), made


def asked(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, most: int,
    posing: Posing | None = None,
) -> tuple[list[list[int]], list[str]]:  # fmt: skip
    """Returns the prompts of examples, as token ids that leave room for an answer, and the right answers.

    Args:
        tokenizer: the model's.
        examples: with answers.
        max_length: tokens of a prompt and its answer, and of an encoder's prompt alone.
        most: tokens of an answer.
        posing: makes the model's sequences; None: of a causal model.

    Raises:
        DataError: an example has no answer, or there is no room beside `most` new tokens.
    """
    if isinstance(posing, EncoderDecoder):
        for example in examples:
            refuse_undivided(example)
        said = [str(example.answer).strip() for example in examples]
        return posing.prompts([example.prompt for example in examples], max_length), said
    room = max_length - most
    if room < 1:
        raise DataError(
            f"--max-new-tokens {most} leaves no room for a prompt within --max-length {max_length}; lower "
            "the former or raise the latter"
        )
    answered = [e.prompt for e in examples if e.answer is not None]
    texts = iter(prompt_ids(tokenizer, answered))
    prompts, right = [], []
    for example in examples:
        if example.kind is Kind.MESSAGES:
            ids, answer = opening(tokenizer, Conversation.of_text(example.prompt))
        elif example.answer is not None:
            ids, answer = next(texts), example.answer.strip()
        else:
            raise DataError(
                f"text {example.prompt[:40]!r} has no answer to compare with; leave --metric out"
            )
        prompts.append(ids[-room:])
        right.append(answer)
    return prompts, right
