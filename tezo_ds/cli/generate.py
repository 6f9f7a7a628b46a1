"""The command `tezo-ds generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.options import DeepSpeed, complete, takes
from tezo_ds.errors import ConfigError
from tezo_ds.settings import Settings

GENERATE_HELP = """Show what a run's result, or a bare model, answers to prompts: greedy, as it comes in a
terminal.

Under a launcher the ranks shard the model as the run did, and rank 0 prints; otherwise one process holds
the whole model.

```
tezo-ds generate --run runs/chats --prompt "What is 2 times 3?" --chat

tezo-ds generate --model ./SmolLM2 --prompt "Once upon a time" --max-new-tokens 100
```
"""
ONLY = (
    "model", "trust_remote_code", "max_length", "max_new_tokens", "stop", "dtype", "compute_dtype", "fsdp",
    "fsdp_replicas", "fsdp_offload_params",
)  # fmt: skip


@complete
@takes(Settings, only=ONLY)
def generate(
    run: Annotated[
        Path | None, typer.Option(help="run folder; its model and result are used")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="text to go on from; may be given several times; \\n and \\t are a newline and a tab"
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="the prompt is a user's message, for the chat template")
    ] = False,
    deepspeed: DeepSpeed = None,
    **given: Any,
) -> None:
    """Generates text; see GENERATE_HELP."""
    with uncollected():
        from transformers import TextStreamer  # imported late, as --help need not wait for it

        from tezo_ds.cli.opened import results_of
        from tezo_ds.cli.options import unescaped
        from tezo_ds.intake.tokens import embedding_rows, padding_id
        from tezo_ds.kinds import ModelKind, kind_named
        from tezo_ds.models.loading import load_tokenizer
        from tezo_ds.tasks.chat import asking
        from tezo_ds.tasks.generation import Generator
        from tezo_ds.tasks.posing import posing_of
        from tezo_ds.training import session
        from tezo_ds.training.display import Display

    if not prompt:
        raise ConfigError('--prompt is missing; add it, e.g. --prompt "Once upon a time"')
    if run is None and given["model"] is None:
        raise ConfigError("--run or --model is missing; name a run folder, or a model")
    asked = results_of(run, deepspeed, {**given, "task": "unsaid"} if run is None else given)
    settings = asked.settings
    tokenizer = load_tokenizer(settings.model, trust=settings.trust_remote_code)
    texts = [unescaped(text) for text in prompt]
    if chat and kind_named(settings.model, settings.trust_remote_code) is not ModelKind.CAUSAL:
        raise ConfigError(f"--chat: {settings.model} is no causal model; leave --chat out")
    prompts = [asking(tokenizer, text) for text in texts] if chat else []
    engine = session.open_engine(settings, asked.config, asked.deepspeed, asked.result.ranks)
    sharding = engine.sharding
    asked.give(engine, Display(sharding.rank, sharding.world_size, log_every=1, stderr=True))
    posing = posing_of(sharding.module, tokenizer, None, words_alone=False)
    prompts = prompts or posing.prompts(texts, settings.max_length)
    pad = padding_id(tokenizer, embedding_rows(sharding.module))
    generator = Generator(engine, tokenizer, pad, settings.max_new_tokens, settings.stop, 1)
    streams = sharding.everyone == 1 and sys.stdout.isatty()
    for ids, text in zip(prompts, texts, strict=True):
        if len(prompts) > 1 and sharding.place == 0:
            print(f"> {text}")
        streamer = (
            TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        )
        (answer,) = generator([ids[-settings.max_length :]], streamer=streamer)
        if streamer is None and sharding.place == 0:
            print(answer)
