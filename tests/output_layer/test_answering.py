"""What logits answer at labelled positions that go on alone, and which models they are refused for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inner_states import MAPS, WORDS, one_label, states_of
from parts.families.models import make
from tiny import HEADS, SIZES, tiny
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.output_layer import answering
from tezo_ds.output_layer.answering import positions_before
from tezo_ds.output_layer.entry import Late
from tezo_ds.output_layer.inner import directions, tensors_of
from tezo_ds.trunk.found import Watch


@pytest.mark.parametrize("kind", MAPS)
def test_responses_are_the_backpropagated_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "PUSH", 1e-3)  # norms are in float32
    model: Any = tiny(kind).double()
    engine = tezo_ds.initialize(model, {"rank": 2})
    batch = one_label(7)
    _, inner = engine.output_layer.inner.of_blocks("layers:0-1")
    assert inner.path == MAPS[kind]
    _, found = states_of(engine, batch, "layers:0-1").inner
    given: list[Tensor] = []
    push = torch.zeros(7, inner.sizes[0], dtype=torch.float64, requires_grad=True)
    wanted = batch["labels"][:, 1:] != -100
    rows, places = wanted.nonzero(as_tuple=True)

    def add(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given.append(args[0].reshape(*wanted.shape[:1], -1, args[0].shape[-1]))  # OPT flattens
        at = push.new_zeros(*given[-1].shape[:2], len(push[0])).index_put((rows, places), push)
        return output + at.view_as(output)

    with inner.layer.register_forward_hook(add):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**inputs).logits[rows, places][:, WORDS]  # (7, C)
    torch.testing.assert_close(found.inputs, given[0][rows, places].detach())
    U = directions(model.get_output_embeddings().weight[WORDS]).double()
    for c in range(len(WORDS)):
        (slopes,) = torch.autograd.grad(logits[:, c].sum(), push, retain_graph=True)  # (7, d)
        assert (slopes @ U).abs().max() > 1e-3
        torch.testing.assert_close(found.responses[:, c].double(), slopes @ U, rtol=1e-2, atol=1e-3)


def test_positions_before_the_labelled_one() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
    rows, places = torch.tensor([0, 1, 1, 0]), torch.tensor([7, 1, 0, 2])
    found = positions_before(mask, rows, places)
    assert [x.tolist() for x in found] == [[0, 0, 0, 0, 1, 1, 1, 1], [2, 3, 4, 6, 0, 0, 0, 0]]


def test_a_map_that_sees_other_positions_is_refused() -> None:
    model: Any = tiny()
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:, :3]), whole(x[:, 3:])], dim=1)
    engine = tezo_ds.initialize(model, {"rank": 2, "include": ("*attn*",)})
    with pytest.raises(ConfigError, match=r"runs model.layers.1.mlp.down_proj on other positions"):
        states_of(engine, one_label(7), "layers:1")
    del model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.o_proj
    with pytest.raises(ConfigError, match=r"layers.1 of LlamaForCausalLM has no .* the 22 numbers"):
        engine.output_layer.inner.of_blocks("last:1")


class Forgetful(torch.nn.Module):
    """A causal model that keeps no keys and values, or goes on from them to something else."""

    def __init__(self, inner: Any, keeps: bool) -> None:
        super().__init__()
        self.inner, self.keeps, self.config = inner, keeps, inner.config

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None,
        past_key_values: Any = None, use_cache: bool = False,
    ) -> Any:  # fmt: skip
        position_ids = None if past_key_values is None else position_ids * 0
        out = self.inner(
            input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache
        )
        return out if self.keeps else out.logits


@pytest.mark.parametrize("maps", ["last", "values"])
def test_texts_are_shorter_than_a_sliding_window(maps: str) -> None:
    def made(window: int | None) -> Any:
        torch.manual_seed(0)
        config = MistralConfig(
            **SIZES, **HEADS, intermediate_size=37, num_key_value_heads=1, head_dim=10,
            sliding_window=window, initializer_range=0.1,
        )  # fmt: skip
        engine = tezo_ds.initialize(MistralForCausalLM(config).eval(), {"rank": 2})
        return vars(states_of(engine, one_label(7), "layers:1", maps=maps).inner[0])

    torch.testing.assert_close(made(12), made(None))  # of texts of 11 tokens
    why = r"window of 11 tokens, and texts are as long \(or lower --max-length\); leave"
    with pytest.raises(ConfigError, match=why):
        made(11)


def test_blocks_that_keep_no_keys_are_refused_where_they_would_run() -> None:
    engine = tezo_ds.initialize(make("LFM 2"), {"rank": 2})  # a convolution, then attention
    assert len(states_of(engine, one_label(7), "layers:1-2").inner) == 2
    with pytest.raises(ConfigError, match=r"no keys and values of some blocks; leave"):
        states_of(engine, one_label(7), "layers:0")
    model: Any = make("LFM 2")  # whose attention reads more of the convolution than hidden states
    seen: list[Tensor] = []
    one, two = model.model.layers[:2]
    one.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    own = two.forward
    two.forward = lambda x, *args, **kwargs: own(x + seen.pop(), *args, **kwargs)
    with pytest.raises(ConfigError, match=r"no keys and values of some blocks; leave"):
        states_of(tezo_ds.initialize(model, {"rank": 2}), one_label(7), "layers:1-2")


@pytest.mark.parametrize(("keeps", "why"), [(False, "keeps no keys"), (True, "to other logits")])
def test_a_model_that_cannot_go_on_is_refused(keeps: bool, why: str) -> None:
    engine = tezo_ds.initialize(Forgetful(tiny(), keeps), {"rank": 2})
    with pytest.raises(
        ConfigError, match=rf"inner_layers: Forgetful .*{why}.*leave inner_layers off"
    ):
        states_of(engine, one_label(7), "layers:0-1")


def calls(module: torch.nn.Module) -> list[int]:
    """Returns the numbers of rows of a block's calls, as they come."""
    found: list[int] = []
    module.register_forward_pre_hook(lambda _, args: found.append(len(args[0])))
    return found


def test_blocks_before_the_inner_layer_are_left_out() -> None:
    model: Any = tiny()
    first, second = (calls(block) for block in model.model.layers)
    engine = tezo_ds.initialize(model, {"rank": 2})
    states_of(engine, one_label(7), "layers:1")  # and once for a batch without labels
    branches = 1 + len(WORDS)
    assert first == [7, 7] and second == [7, 7 * branches, 7, branches]


def test_states_with_terms_come_from_forwards_that_begin_at_the_first_term() -> None:
    model: Any = tiny()
    engine = tezo_ds.initialize(model, {"rank": 2})
    batch, late = one_label(7), Late()
    plain = states_of(engine, batch, "layers:1", late)
    (inner,) = engine.output_layer.inner.of_blocks("layers:1")
    A = torch.randn(len(WORDS), inner.sizes[1], generator=torch.Generator().manual_seed(3))
    engine.output_layer.load(tensors_of([inner.path], [(plain.directions, A)]))
    whole = states_of(engine, batch, "none")
    first = calls(model.model.layers[0])
    begun = states_of(engine, batch, "none", late)
    assert first == [] and late.nbytes == 2 * 7 * 11 * 22 * 4
    assert not torch.allclose(begun.logits, plain.logits, atol=1e-3)
    assert torch.equal(begun.hidden, whole.hidden) and torch.equal(begun.logits, whole.logits)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("maps", ["last", "values"])
def test_blocks_that_later_ones_read_are_not_left_out(raises: bool, maps: str) -> None:
    """Block 1 reads what block 0 was given, as models do whose blocks share keys and values."""
    found = []
    for tries in (True, False):
        model: Any = tiny()
        one, two = model.model.layers
        seen: list[Tensor] = []

        def adding(
            x: Tensor,
            *args: Any,
            _own: Any = two.forward,
            _seen: list[Tensor] = seen,
            **kwargs: Any,
        ) -> Any:
            if raises:
                shared = _seen.pop()  # which fails where block 0 did not run
            else:
                shared = _seen[-1] if _seen[-1].shape == x.shape else torch.zeros_like(x)
            return _own(x + 10 * shared, *args, **kwargs)

        one.register_forward_pre_hook(lambda _, args, _seen=seen: _seen.append(args[0]))
        two.forward = adding
        engine = tezo_ds.initialize(model, {"rank": 2})
        with pytest.MonkeyPatch.context() as patch:
            if not tries:
                patch.setattr(Watch, "without_a_forward", lambda _: "as nobody looks")
            late = Late()
            found.append(states_of(engine, one_label(7), "layers:1", late, maps))
            assert late.nbytes == 0
    ours, whole = (vars(states.inner[0]) for states in found)
    torch.testing.assert_close(ours, whole, rtol=0, atol=0)
