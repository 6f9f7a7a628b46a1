"""Tiny models of the shapes that people fine-tune, with sizes that divide by nothing, and batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import tezo_ds

VOCABULARY = 61
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 22, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 64}


def tiny(kind: str = "llama", tied: bool = True, seed: int = 0, mlp: int = 37) -> nn.Module:
    """Makes a randomly initialised model of some 10,000 parameters, with weights large enough to have
    slopes."""
    torch.manual_seed(seed)
    shared = {**SIZES, **HEADS, "tie_word_embeddings": tied, "initializer_range": 0.1}
    if kind == "llama":
        config = LlamaConfig(**shared, intermediate_size=mlp, num_key_value_heads=1, head_dim=10)
        return LlamaForCausalLM(config).eval()
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(**shared, ffn_dim=mlp, word_embed_proj_dim=22)).eval()
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shared, intermediate_size=mlp)).eval()
    if kind == "roberta":
        config = RobertaConfig(**shared, intermediate_size=mlp, type_vocab_size=5)
        return RobertaForMaskedLM(config).eval()
    if kind == "gpt2":
        sizes = {"n_embd": 22, "n_layer": 2, "n_head": 2, "n_inner": mlp, "n_positions": 64}
        config = GPT2Config(vocab_size=61, **sizes, initializer_range=0.1, tie_word_embeddings=tied)
        return GPT2LMHeadModel(config).eval()
    if kind in ("mixtral", "qwen-moe"):  # experts fused into weights of three dims
        few = {"num_experts_per_tok": 2, "num_key_value_heads": 1, "head_dim": 10}
        few["experts_implementation"] = "eager"  # the others know no float64
        if kind == "mixtral":
            mixtral = MixtralConfig(**shared, **few, intermediate_size=mlp, num_local_experts=3)
            return MixtralForCausalLM(mixtral).eval()
        few |= {"num_experts": 3, "moe_intermediate_size": mlp}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared, **few)).eval()
    raise KeyError(kind)


def make_batch(examples: int, seed: int = 0, length: int = 11) -> dict[str, torch.Tensor]:
    """Makes a batch of random tokens with ragged ends and unequal label counts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (examples, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :3] = -100
    for row in range(examples):
        end = length - (row * 2) % 5
        mask[row, end:] = 0
        labels[row, end:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def part_of(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """Returns this rank's rows of a batch, as unequal as the sizes make them."""
    return {key: value.tensor_split(size)[rank] for key, value in batch.items()}


def losses_of_both_probes(
    make: Callable[[], nn.Module], head_mode: str, steps: int = 4
) -> tuple[list[float], list[float]]:
    """Returns the losses of a few steps on a fresh model each, fused and in-place."""
    losses = []
    for probe in ("fused", "inplace"):
        config = {"rank": 3, "rho": 1e-2, "lr": 1e-5, "queries": 2, "probe": probe}
        engine = tezo_ds.initialize(make(), config)
        losses.append([engine.step(make_batch(4, seed=step)).loss for step in range(steps)])
        assert engine.objective._head is not None and engine.objective._head.mode == head_mode
    return losses[0], losses[1]
