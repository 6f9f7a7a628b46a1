"""Tiny models of the families that people fine-tune, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY, LENGTH, BLOCKS = 61, 11, 3
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0,
}  # fmt: skip
_MLP = {**_SIZES, "intermediate_size": 44}
_GROUPED = {**_MLP, "num_key_value_heads": 2}
_SIZED = {**_GROUPED, "head_dim": 10}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": BLOCKS}
_WINDOW = {"sliding_window": 2 * LENGTH}
_IMAGES = {**_MLP, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
# Of a family the beginning of its config's name, and what that is given.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", _SIZED),
    "Mistral": ("Mistral", {**_SIZED, **_WINDOW}),
    "Qwen 2": ("Qwen2", _GROUPED),
    "Qwen 3": ("Qwen3", _SIZED),
    "Gemma": ("Gemma", _SIZED),
    "Gemma 2": ("Gemma2", {**_SIZED, **_WINDOW, "query_pre_attn_scalar": 10}),
    "Gemma 3": ("Gemma3Text", {**_SIZED, **_WINDOW, "query_pre_attn_scalar": 10}),
    "Gemma 3 with a tower for images": (
        "Gemma3",
        {"text_config": {**_SIZED, **_WINDOW, "query_pre_attn_scalar": 10}, "vision_config": _IMAGES,
         "mm_tokens_per_image": 4, "boi_token_index": 58, "eoi_token_index": 59, "image_token_index": 60},
    ),
    "Phi": ("Phi", _GROUPED),
    "Phi 3": ("Phi3", _GROUPED),
    "OLMo 2": ("Olmo2", _GROUPED),
    "OLMo 3": ("Olmo3", {**_GROUPED, **_WINDOW}),
    "Granite": ("Granite", {**_GROUPED, "logits_scaling": 4.0}),
    "Command R": ("Cohere", _GROUPED),
    "SmolLM 3": ("SmolLM3", _GROUPED),
    "GLM": ("Glm", {**_SIZED, "head_dim": 8}),
    "EXAONE 4": ("Exaone4", {**_GROUPED, **_WINDOW}),
    "StableLM": ("StableLm", _GROUPED),
    "StarCoder 2": ("Starcoder2", _GROUPED),
    "Nemotron": ("Nemotron", _GROUPED),
    "Falcon": ("Falcon", _SIZES),
    "OPT": ("OPT", {**_SIZES, "ffn_dim": 44, "word_embed_proj_dim": 32}),
    "GPT-NeoX, Pythia": ("GPTNeoX", _MLP),
    "GPT-2": ("GPT2", _GPT2),
    "GPT-J": ("GPTJ", {**_GPT2, "rotary_dim": 4}),
    "BLOOM": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": BLOCKS, "n_head": 4}),
    "DeepSeek V3, dense blocks": (
        "DeepseekV3",
        {**_GROUPED, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
         "qk_nope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_group": 1, "topk_group": 1, "first_k_dense_replace": BLOCKS},
    ),
    "Mixtral": ("Mixtral", {**_SIZED, **_EXPERTS, "num_local_experts": 3}),
    "Qwen 3 MoE": ("Qwen3Moe", {**_SIZED, **_EXPERTS, "num_experts": 3, "moe_intermediate_size": 12}),
    "gpt-oss": ("GptOss", {**_SIZED, **_EXPERTS, **_WINDOW, "num_local_experts": 3}),
    "LFM 2": ("Lfm2", {**_GROUPED, "full_attn_idxs": [1, 2]}),
    "Qwen 3 Next, dense": (
        "Qwen3Next",
        {**_SIZED, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "num_experts": 0,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "Mamba": ("Mamba", _MAMBA),
    "Mamba 2": ("Mamba2", {**_MAMBA, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
}  # fmt: skip


def make(family: str) -> nn.Module:
    """Makes the model of a family, in float64, the same each time."""
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.double().eval()


def batch(count: int, words: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Makes examples that are padded on the right; with words one of them is each example's only label, at
    its end."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    if words:
        labels = torch.full_like(ids, -100)
        rows, last = torch.arange(count), lengths - 1
        ids[rows, last] = labels[rows, last] = torch.tensor(words)[rows % len(words)]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
