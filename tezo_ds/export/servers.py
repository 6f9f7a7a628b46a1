"""LoRA adapters as servers take them: what vLLM and llama.cpp's converter read, and what they refuse.

Rules as of vLLM 0.33.0 (vllm/config/lora.py, vllm/lora/peft_helper.py, lora_model.py and utils.py) and of
llama.cpp's convert_lora_to_gguf.py at 0b03adaa63.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import is_classifier, is_encoder_decoder, is_masked_lm, kind_of

SERVERS = ("vllm", "llama.cpp")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
INSTEAD = "write the merged model (tezo-ds export --merged), which they serve"


def refuse_unfit(module: nn.Module, paths: Sequence[str], server: str, embeddings: bool) -> None:
    """Checks that a server takes an adapter.

    Args:
        module: the model that it is for.
        paths: those of the model's modules that the adapter has pairs for.
        server: one of `SERVERS`.
        embeddings: whether pairs of the input's and the output's embedding were asked for, which servers add
            for some architectures only.

    Raises:
        ConfigError: another kind of model, layers that they do not add to, or embeddings unasked for.
    """
    if is_masked_lm(module) or is_classifier(module) or is_encoder_decoder(module):
        raise ConfigError(f"--for {server}: adapters are added to causal models alone; {INSTEAD}")
    kinds = {path: kind_of(module.get_submodule(path)) for path in paths}
    turned = sorted(path for path, kind in kinds.items() if kind == "conv1d")
    if turned:
        raise ConfigError(
            f"--for {server}: {turned[0]} ({len(turned)} such) keeps its weight the other way round, "
            f"which it does not expect of a pair; {INSTEAD}"
        )
    output: Any = getattr(module, "get_output_embeddings", lambda: None)()
    found = {path: module.get_submodule(path) for path in sorted(paths)}
    ends = {p: m for p, m in found.items() if isinstance(m, nn.Embedding) or m is output}
    named = " and ".join(ends)
    if ends and not embeddings:
        raise ConfigError(
            f"--for {server}: {named} have learnt, and servers add to embeddings for some architectures "
            "only; train with --exclude '*embed*' --exclude '*lm_head*', or add --embeddings"
        )
    if server == "llama.cpp" and len({id(m.weight) for m in ends.values()}) < len(ends):
        raise ConfigError(
            f"--for llama.cpp: {named} are tied, and its converter refuses a pair for the output layer then; "
            f"train with --exclude '*embed*', or {INSTEAD}"
        )


def fitted(
    tensors: dict[str, Tensor], config: dict[str, Any], server: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns pairs and adapter_config.json as a server takes them: of one rank, with lora_alpha / r = 1.

    vLLM's rank is the next of `RANKS`, with zeros in the pairs' further columns: the adapter's function is
    the same, and its rank is a `--max-lora-rank`.

    Args:
        tensors: A (r, in) and B (out, r) by peft's names; of embeddings (r, rows) and (columns, r).
        config: content of adapter_config.json, without patterns.
        server: one of `SERVERS`.

    Raises:
        ConfigError: a rank above all that vLLM takes.
    """
    rank = int(config["r"])
    wanted = rank if server == "llama.cpp" else next((r for r in RANKS if r >= rank), 0)
    if not wanted:
        raise ConfigError(
            f"--for vllm: rank {rank} is above {RANKS[-1]}, its largest; lower rank or the number of "
            f"periods, or {INSTEAD}"
        )
    scale, more, made = config["lora_alpha"] / rank, wanted - rank, {}
    for name, part in tensors.items():
        inner = ".lora_A." in name or name.endswith("lora_embedding_A")
        padded = nn.functional.pad(part, (0, 0, 0, more) if inner else (0, more))
        made[name] = padded if inner else padded * scale
    return made, {**config, "r": wanted, "lora_alpha": wanted}


def how_to_serve(server: str, folder: str, base_model: str, rank: int) -> str:
    """Returns the command that serves an adapter."""
    if server == "vllm":
        return f"vllm serve {base_model} --enable-lora --max-lora-rank {rank} --lora-modules tezo={folder}"
    return f"python convert_lora_to_gguf.py --base {base_model} {folder}"
