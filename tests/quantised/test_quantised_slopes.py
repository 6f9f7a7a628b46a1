"""κ on a quantised model is that of a dense one which holds the dequantised weights and Δ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_batch
from torch import nn
from trained import groups
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tezo_ds
from tezo_ds.models.loading import load_model
from tezo_ds.quantised.packed import packed_weights

RANK, RHO, SEED = 3, 1e-2, 4
CONFIG = {"rank": RANK, "rho": RHO, "lr": 1e-2, "queries": 2, "seed": SEED}
FLOAT, BRAIN = torch.float32, torch.bfloat16
# Error of κ relative to the largest.
WITHIN = {
    ("int8", FLOAT): 2e-5, ("int4", FLOAT): 2e-5, ("4bit", FLOAT): 2e-5, ("int8", BRAIN): 0.1,
    ("int4", BRAIN): 0.1, ("4bit", BRAIN): 0.1,
}  # fmt: skip


def saved(folder: Path, hidden: int, mlp: int) -> Path:
    """Saves a tiny Llama whose layers have the sizes that a format needs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def dense_of(model: nn.Module) -> nn.Module:
    """Makes the model in float64, with the dequantised weights."""
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(model.config)
    packed = packed_weights(model)
    values = {
        name: packed[name].dequantised() if name in packed else model.state_dict()[name]
        for name, _ in dense.named_parameters()
    }
    dense = dense.to_empty(device="cpu").double()
    dense.model.rotary_emb = type(dense.model.rotary_emb)(dense.config)
    for name, parameter in dense.named_parameters():
        parameter.data.copy_(values[name])
    return dense.eval()


def loss_at(dense: nn.Module, change: dict[str, torch.Tensor], batch: dict) -> float:
    """Returns the mean loss of the dense model with a change added to its weights."""
    parameters = dict(dense.named_parameters())
    for name, part in change.items():
        parameters[name].data.add_(part)
    logits = dense(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for name, part in change.items():
        parameters[name].data.sub_(part)
    targets = batch["labels"][:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
    return loss.item()


@torch.no_grad()
def expected(dense: nn.Module, engine: tezo_ds.Engine, batch: dict) -> torch.Tensor:
    """Returns κ of the step to come, by the definition: float64 (Q,)."""
    step, kappas = engine.step_index, []
    a = engine.coefficients()
    for q in range(CONFIG["queries"]):
        losses = []
        for sign in (1, -1):
            change = {}
            for matrix in engine.space.matrices:
                U, V = tezo_ds.factors(matrix.name, matrix.shape, RANK, SEED)
                U, V = (part.to(matrix.dtype).double() for part in (U, V))
                tau = tezo_ds.tau(matrix.name, RANK, SEED, step, q)
                change[matrix.name] = U * (a[matrix.name] + sign * RHO * tau) @ V.t()
            losses.append(loss_at(dense, change, batch))
        kappas.append((losses[0] - losses[1]) / (2 * RHO))
    return torch.tensor(kappas, dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), 64, 128)


@pytest.mark.parametrize(("load_in", "dtype"), list(WITHIN), ids=str)
def test_slopes_are_those_of_the_dequantised_model(
    folder: Path, load_in: str, dtype: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes" if load_in == "4bit" else "torchao")
    name = str(dtype).removeprefix("torch.")
    model = load_model(str(folder), name, load_in=load_in)
    engine = tezo_ds.initialize(model, CONFIG)
    assert engine.probe.name == "fused" and engine.sharding.quantised
    assert {m.shape for m in engine.space.matrices} >= {(32, 64), (128, 64), (64, 128)}
    assert all(m.dtype == dtype for m in engine.space.matrices)
    dense = dense_of(model)
    for step in range(2):
        batch = make_batch(6, seed=step)
        wanted = expected(dense, engine, batch)
        found = torch.tensor(engine.step(batch).kappa, dtype=torch.float64)
        assert (found - wanted).abs().max() <= WITHIN[load_in, dtype] * wanted.abs().max()
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups(engine) == [["embed_tokens"], *block, *block, ["lm_head"]]  # shared products
