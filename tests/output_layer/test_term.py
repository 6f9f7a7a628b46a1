"""The term in every forward of a model, and in what is exported of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from tiny import VOCABULARY, make_batch, tiny
from torch import Tensor, nn
from trained import logits, trained
from transformers import AutoModelForCausalLM, GenerationConfig

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.export.adapter import lora_tensors, not_to_merge, save_adapter, to_know
from tezo_ds.export.merged import save_merged
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.states import collect
from tezo_ds.output_layer.term import BIAS, TOKENS, WEIGHT

WORDS = torch.tensor([7, 40, 12])


def term(width: int = 22, words: Tensor = WORDS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(len(words), width, generator=generator) * 0.3
    return {TOKENS: words, WEIGHT: weight, BIAS: torch.tensor([0.5, -2.0, 1.0])[: len(words)]}


def with_rows(model: nn.Module) -> nn.Module:
    """Puts the term into an output layer of its own that has a bias: the reference."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    wide = nn.Linear(head.in_features, head.out_features).to(head.weight.dtype)
    with torch.no_grad():
        wide.weight.copy_(head.weight)
        wide.bias.zero_() if head.bias is None else wide.bias.copy_(head.bias)
        wide.weight[WORDS] += term()[WEIGHT]
        wide.bias[WORDS] += term()[BIAS]
    where, _, name = next(p for p, m in model.named_modules() if m is head).rpartition(".")
    setattr(model.get_submodule(where), name, wide)
    return model


KINDS = [("llama", True), ("llama", False), ("opt", True), ("neox", False), ("gpt2", True)]


@pytest.mark.parametrize(("kind", "tied"), [*KINDS, ("roberta", True)])
@pytest.mark.parametrize("probe", ["fused", "inplace"])
def test_steps_and_losses_are_those_of_a_model_with_such_rows(
    kind: str, tied: bool, probe: str
) -> None:
    fields = {"rank": 3, "rho": 1e-2, "lr": 1e-5, "queries": 2, "probe": probe}
    fields["include"] = ("*attn*", "*attention*")  # the same on both sides
    exclude = ["*embed*", "*wte*", "*wpe*", "*lm_head*", "*decoder.w*"]
    mine = tezo_ds.initialize(tiny(kind, tied), {**fields, "exclude": exclude})
    mine.output_layer.load(term())
    its = tezo_ds.initialize(with_rows(tiny(kind, tied)), {**fields, "exclude": exclude})
    plain = tezo_ds.initialize(tiny(kind, tied), {**fields, "exclude": exclude})
    batch = make_batch(4)
    assert mine.loss(batch) == pytest.approx(its.loss(batch), rel=1e-6)
    assert abs(mine.loss(batch) - plain.loss(batch)) > 0.01
    for seed in range(2):
        one, other = (engine.step(make_batch(4, seed=seed)) for engine in (mine, its))
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.kappa == pytest.approx(other.kappa, rel=1e-2, abs=1e-3)
    with mine.applied(), its.applied():
        found, expected = (logits(engine.sharding.module) for engine in (mine, its))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    engine = tezo_ds.initialize(tiny().to(dtype), {"rank": 2})
    reference = with_rows(tiny().to(dtype))
    before = logits(engine.sharding.module).clone()
    engine.output_layer.load(term())
    found = logits(engine.sharding.module)
    assert found.dtype == dtype
    others = [i for i in range(VOCABULARY) if i not in WORDS.tolist()]
    assert torch.equal(found[..., others], before[..., others])
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(found, logits(reference), rtol=0, atol=tolerance)
    with engine.output_layer.off():
        assert torch.equal(logits(engine.sharding.module), before)
    engine.output_layer.load({})
    assert torch.equal(logits(engine.sharding.module), before) and not engine.output_layer.state


@pytest.mark.parametrize("engines", [1, 2])  # of one model; the last's term is in effect
@pytest.mark.parametrize("words", [WORDS, torch.tensor([12, 3, 7]), torch.tensor([3, 11])], ids=str)
def test_of_choices_their_logits_and_terms_alone_are_computed(words: Tensor, engines: int) -> None:
    model, batch = tiny(), make_batch(4)
    for _ in range(engines):
        engine = tezo_ds.initialize(model, {"rank": 2})
        engine.output_layer.load(term())
        engine.output_layer.load({})
    batch["labels"][:] = -100
    batch["labels"][:, 3], batch["labels"][:, 5] = words[[0, 1, 1, 0]], words[-1]
    engine.output_layer.load(term())
    with torch.no_grad():
        whole = (
            engine.sharding.module(batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits[:, [2, 4]][..., words]
            .flatten(0, 1)
        )
    right = torch.tensor([i for first in (0, 1, 1, 0) for i in (first, len(words) - 1)])
    engine.objective.choices, widths, project = words, [], F.linear

    def count(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        widths.append(len(weight))
        return project(x, weight, *rest)

    for off in (False, True, False):  # the first settles how logits are taken
        if off:
            with engine.output_layer.off():
                without = engine.loss(batch)
            continue
        widths.clear()
        with mock.patch.object(F, "linear", count):
            found = engine.loss(batch)
        assert found == pytest.approx(F.cross_entropy(whole, right).item(), rel=1e-5)
    assert VOCABULARY not in widths
    # Of no word in the term nothing changes, and of others much.
    assert (abs(found - without) < 1e-9) == (not set(words.tolist()) & set(WORDS.tolist()))


def test_generation_sees_the_term() -> None:
    engine = tezo_ds.initialize(tiny(), {"rank": 2})
    model: Any = engine.sharding.module
    ids = make_batch(1)["input_ids"][:, :5]
    engine.output_layer.load({**term(), BIAS: torch.tensor([0.0, 1e4, 0.0])})
    with engine.applied():
        made = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert made[0, 5:].tolist() == [40, 40, 40]


def test_state_holds_the_term_and_gives_it_back() -> None:
    engine, other = (tezo_ds.initialize(tiny(), {"rank": 2}) for _ in range(2))
    engine.output_layer.load(term())
    other.load_state(engine.state(), written=False)
    assert torch.equal(logits(other.sharding.module), logits(engine.sharding.module))
    other.load_state(tezo_ds.initialize(tiny(), {"rank": 2}).state(), written=False)
    assert not other.output_layer.state


@pytest.mark.parametrize("wrong", [term(width=23), {**term(), TOKENS: torch.tensor([1, 2, 61])}])
def test_a_term_of_another_model_is_refused(wrong: dict[str, Tensor]) -> None:
    engine = tezo_ds.initialize(tiny(), {"rank": 2})
    with pytest.raises(ConfigError, match=r"output_layer: fitted for .* \(61, 22\); use the run's"):
        engine.output_layer.load(wrong)


@pytest.mark.parametrize(
    ("kind", "tied", "exclude"),
    [
        ("llama", True, []),  # a pair for the tied matrix, too
        ("llama", False, []),
        ("llama", True, ["*embed*"]),
        ("llama", False, ["*lm_head*"]),
        ("neox", False, []),
        ("gpt2", True, ["*wte*", "*wpe*"]),
        ("roberta", True, ["*token_type*", "*embeddings*"]),
    ],
)
def test_peft_and_the_biases_give_the_engines_logits(
    kind: str, tied: bool, exclude: list[str], tmp_path: Path
) -> None:
    engine = trained(tiny(kind, tied), exclude)
    engine.output_layer.load(term())
    save_adapter(engine, tmp_path / "adapter", "the base")
    with engine.applied():
        expected = logits(engine.sharding.module).clone()
    adapted = logits(PeftModel.from_pretrained(tiny(kind, tied), tmp_path / "adapter"))
    config = GenerationConfig.from_pretrained(tmp_path / "adapter")
    biases = {ids[0]: bias for ids, bias in config.sequence_bias}
    assert list(biases) == WORDS.tolist()
    for token, bias in biases.items():
        adapted[..., token] += bias
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-5)
    ranks = {t.shape[0] for n, t in lora_tensors(engine).items() if n.endswith("_A.weight")}
    names = {matrix.name for matrix in engine.space.matrices}
    both = bool(names & {"lm_head.weight", "embed_out.weight"}) or (tied and not exclude)
    assert ranks == {6 if both else 3}
    assert bool(not_to_merge(engine)) == tied
    assert "sequence_bias" in str(to_know(engine))


def test_generation_by_the_adapter_is_the_engines(tmp_path: Path) -> None:
    engine = trained(tiny())
    engine.output_layer.load(term())
    save_adapter(engine, tmp_path / "adapter", "the base")
    model: Any = engine.sharding.module
    ids = make_batch(1)["input_ids"][:, :5]
    engine.loss(make_batch(2))  # by which layers that share a product are found
    with engine.applied():
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    adapted: Any = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    config = GenerationConfig.from_pretrained(tmp_path / "adapter", max_new_tokens=6)
    assert torch.equal(adapted.generate(input_ids=ids, generation_config=config), expected)


def test_a_merged_model_has_the_rows_and_the_biases_beside(tmp_path: Path) -> None:
    engine = trained(tiny(tied=False))
    engine.output_layer.load(term())
    with engine.applied():
        expected = logits(engine.sharding.module).clone()
    save_merged(engine, tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    content = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    for (token,), bias in content["sequence_bias"]:
        merged[..., token] += bias
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_a_bias_of_the_output_layers_own_takes_the_term(tmp_path: Path) -> None:
    model = tiny(tied=False)
    model.lm_head = nn.Linear(22, VOCABULARY)  # type: ignore[assignment]
    engine = trained(model)
    before = dict(engine.state_dict())
    engine.output_layer.load(term())
    after = engine.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"lm_head.weight", "lm_head.bias"}
    torch.testing.assert_close(
        after["lm_head.bias"][WORDS], before["lm_head.bias"][WORDS] + term()[BIAS]
    )


def test_a_merged_model_of_a_tied_one_is_refused(tmp_path: Path) -> None:
    engine = trained(tiny(tied=True))
    engine.output_layer.load(term())
    with pytest.raises(ConfigError, match=r"lm_head shares its weight with model.embed_tokens, "):
        save_merged(engine, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ConfigError, match="export an adapter"):
        engine.state_dict()
    engine.output_layer.load({})
    save_merged(engine, tmp_path / "merged")


def gathered(model: nn.Module) -> States:
    engine = tezo_ds.initialize(model, {"rank": 2})
    batch = make_batch(4)
    chosen = torch.tensor([WORDS[i % 3] for i in range(4)])
    batch["labels"][:] = -100
    batch["input_ids"][:, 6] = batch["labels"][:, 6] = chosen
    layer = engine.output_layer.layer
    assert layer is not None
    held = torch.tensor([False, True, False, False])
    with engine.applied():
        return collect(engine.objective, layer, [(batch, held)] * 2, WORDS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
def test_states_give_the_logits(kind: str) -> None:
    model: Any = tiny(kind)
    states = gathered(model)
    head = model.get_output_embeddings()
    assert states.hidden.shape == (8, 22) and states.truth.tolist() == [0, 1, 2, 0] * 2
    assert states.held.tolist() == [False, True, False, False] * 2
    expected = states.hidden @ head.weight[WORDS].t() + (
        0 if head.bias is None else head.bias[WORDS]
    )
    torch.testing.assert_close(states.logits, expected, rtol=0, atol=1e-5)


class Changed(nn.Module):
    """A causal model that goes on with its output layer's result."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.inner = tiny()
        self.config = self.inner.config
        self.change = change

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()  # type: ignore[operator]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        out = self.inner(input_ids, attention_mask=attention_mask).logits
        if self.change == "cap":
            return out.tanh()
        if self.change == "length":  # a factor, but of each position another one
            return out / out.norm(dim=-1, keepdim=True)
        if self.change == "cast":
            return out.double()
        if self.change == "backwards":
            return out.flip(1)
        return self.inner.model(input_ids).last_hidden_state @ self.inner.lm_head.weight.t()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("cap", "goes on to change"),
        ("length", "goes on to change"),
        ("backwards", "does not take"),
        ("other", "does not take"),
    ],
)
def test_a_model_that_changes_its_logits_is_refused(change: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"output_layer: Changed {expected}.*; leave it frozen"):
        gathered(Changed(change))


def test_a_model_that_casts_its_logits_is_not() -> None:
    assert torch.equal(gathered(Changed("cast")).hidden, gathered(tiny()).hidden)


def test_the_python_api_says_who_fits() -> None:
    with pytest.raises(ConfigError, match="output_layer: fit is fitted by `tezo-ds train`"):
        tezo_ds.initialize(tiny(), {"output_layer": "fit"})
