"""A forward that is split at the first module that trains: the losses of a whole one, for less."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_of
from deep import BEHIND, FIELDS, VISITS, WHOLE, assert_alike, data, deep, engine_of, numbered, steps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.trunk.alike import Alike

KINDS = ("llama", "opt", "neox", "gpt2", "roberta", "qwen-moe")
LAST = {"gpt2": ("*.h.1.*",), "qwen-moe": ("*.3.self_attn.*",)}


def late(kind: str) -> tuple[str, ...]:
    return LAST.get(kind, FIELDS["include"])


@pytest.mark.parametrize("probe", ["fused", "inplace"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_whole_forwards(kind: str, probe: str) -> None:
    fields = {"include": late(kind), "probe": probe}
    expected = steps(engine_of(deep(kind), **fields, **WHOLE))
    shared = engine_of(deep(kind), **fields)
    assert_alike(steps(shared), expected)
    cached = engine_of(deep(kind), **fields, trunk_cache="memory")
    assert_alike(steps(cached, numbers=True), expected)
    for engine in (shared, cached):
        trunk = engine.objective.trunk
        assert trunk is not None and trunk.found is not None and trunk.rest.way.tail is not None
        # BERT's attention normalises what its last map gave, and adds what entered to it.
        assert (trunk.rest.way.tail.last is None) == (kind == "roberta")


HEADED = ("llama", "neox")  # whose output layer trains above, and so must have a weight of its own


@pytest.mark.parametrize(
    "more",
    [
        {}, {"train_vectors": True, "micro_batch": 2}, {"method": "tezo-gn", "queries": 3},
        {"branch_chunk": 3}, {"method": "lozo", "rank": 2, "nu": 2},
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)  # fmt: skip
@pytest.mark.parametrize("kind", BEHIND)
def test_what_follows_the_last_attention_trains_alone(kind: str, more: dict[str, object]) -> None:
    fields = {"include": BEHIND[kind], **more}
    expected = steps(engine_of(deep(kind, kind not in HEADED), **fields, **WHOLE))
    shared = engine_of(deep(kind, kind not in HEADED), **fields)
    assert_alike(steps(shared), expected)
    cached = engine_of(deep(kind, kind not in HEADED), **fields, trunk_cache="memory")
    assert_alike(steps(cached, numbers=True), expected)
    for engine in (shared, cached):
        trunk = engine.objective.trunk
        assert trunk is not None and trunk.rest.way.tail is not None and trunk.rest.way.tail.alike
        assert ", the last one's attention once a step, the rest" in str(trunk)


def test_the_last_attention_runs_once_where_nothing_trains_before_its_last_map() -> None:
    names = ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.o_proj")
    batch = numbered([0, 1, 2])
    labels, every = int((batch["labels"][:, 1:] != -100).sum()), batch["input_ids"].numel()
    for first, attention in (("o", every), ("v", 4 * every)):
        include = (f"*.3.self_attn.{first}_proj*", "*.3.mlp*")
        engine, rows = engine_of(deep(), include=include, trunk_cache="memory"), []
        engine.step(batch)
        for name in names:
            engine.sharding.module.get_submodule(name).register_forward_pre_hook(
                lambda _, args, rows=rows: rows.append(args[0].shape[:-1].numel())
            )
        norm = engine.sharding.module.get_submodule("model.norm")
        of_norm = norm.forward
        norm.__dict__["forward"] = lambda x, rows=rows, forward=of_norm: (
            rows.append(x.shape[:-1].numel()) or forward(x)
        )
        engine.step(batch)
        assert rows == [attention, 4 * labels, 4 * (labels if first == "o" else every)]


@pytest.mark.parametrize(
    "fields",
    [
        {"train_vectors": True},
        {"micro_batch": 2},
        {"branch_chunk": 2},
        {"difference": "forward", "queries": 3},
        {"method": "lozo", "rank": 2, "nu": 2},
        {"method": "tezo-adam"},
        {"method": "mezo"},
        {"refresh_every": 2},
        {"rho": "auto"},
        {"memory_budget": 0.01},
        {"include": ("*lm_head*",)},
        {"include": ("*lm_head*", "*model.norm*"), "train_vectors": True},
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_fields_that_split_a_step_or_write_weights(fields: dict[str, object]) -> None:
    expected = steps(engine_of(deep(tied=False), **fields, **WHOLE))
    assert_alike(steps(engine_of(deep(tied=False), **fields)), expected)
    cached = engine_of(deep(tied=False), **fields, trunk_cache="memory")
    assert_alike(steps(cached, numbers=True), expected)
    trunk = cached.objective.trunk
    assert trunk is not None and trunk.found is not None


def test_bfloat16_and_a_loss_of_ones_own() -> None:
    def squares(outputs: object, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = outputs.logits.float()  # type: ignore[attr-defined]
        real = batch["attention_mask"]  # as a cache has nothing of padded positions
        return (logits.square().mean(dim=2) * real).sum(dim=1), real.sum(dim=1)

    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        found = []
        for fields in (WHOLE, {}, {"trunk_cache": "memory"}):
            engine = tezo_ds.initialize(deep().to(dtype), {**FIELDS, **fields}, squares)
            found.append([engine.step(numbered(rows)).loss for rows in VISITS])
        torch.testing.assert_close(found[1], found[0], rtol=close, atol=0)
        torch.testing.assert_close(found[2], found[0], rtol=close, atol=0)
        trunk = engine.objective.trunk
        assert trunk is not None and trunk.found is not None and trunk.found.dtype == dtype


def flops(engine: tezo_ds.Engine, batch: dict[str, Tensor]) -> int:
    engine.step(batch)
    with FlopCounterMode(display=False) as counter:
        engine.step(batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("queries", [1, 4])
def test_a_step_costs_what_it_should(queries: int) -> None:
    """ℓ + 2Q(L - ℓ) blocks shared, and 2Q(L - ℓ) cached, of 2Q L, less products with what enters the first
    block that trains, which are made once."""
    everything = data()
    everything["labels"][:, 1:] = everything["input_ids"][
        :, 1:
    ]  # so that nothing leaves the last block
    everything["attention_mask"][:] = 1
    batch = numbered([0, 1, 2], everything)
    only = {"include": ("*.2.self_attn.q*", "*.3.self_attn.q*"), "rank": 1, "queries": queries}
    whole = flops(engine_of(deep(), **only, **WHOLE), batch)
    shared = flops(engine_of(deep(), **only), batch)
    cached = flops(engine_of(deep(), **only, trunk_cache="memory"), batch)
    with FlopCounterMode(display=False) as counter:
        model = deep()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    head = 2 * 61 * 22 * batch["input_ids"].numel()
    block = (counter.get_total_flops() - head) / 4
    read = [model.get_submodule(f"model.layers.2.self_attn.{name}_proj") for name in "qkv"]
    alike = 2 * sum(each.weight.numel() for each in read) * batch["input_ids"].numel() / block
    saved = (2 * queries - 1.0) * alike
    # Beside these: both passes lack a few positions of the last block's second half, which carry no label.
    torch.testing.assert_close(
        [(whole - shared) / block, (whole - cached) / block],
        [2 * (2 * queries - 1.0) + saved, 4.0 * queries + saved], rtol=0, atol=0.1 * 2 * queries,
    )  # fmt: skip


def test_products_of_copies_are_made_once_while_they_are_copies() -> None:
    once, norm, layer, rows = torch.randn(3, 5, 7), nn.LayerNorm(7), nn.Linear(7, 4), []
    copies = once.repeat(6, 1, 1)

    def product(x: Tensor) -> Tensor:
        return alike.product(lambda given: rows.append(len(given)) or layer(given), x)

    alike = Alike(copies, once)
    with alike.within(nn.ModuleList([norm])):
        normed = norm(copies)
        torch.testing.assert_close(normed, norm(copies.clone()), rtol=0, atol=1e-6)
        torch.testing.assert_close(product(normed), layer(normed), rtol=0, atol=1e-6)
        normed += torch.arange(18.0)[
            :, None, None
        ]  # whoever writes to them ends that they are alike
        torch.testing.assert_close(product(normed), layer(normed), rtol=0, atol=1e-6)
    assert rows == [3, 18]
    assert "forward" not in norm.__dict__


def test_positions_without_a_label_leave_the_last_block() -> None:
    batch = numbered([0, 1, 2])
    engine, rows = engine_of(deep()), []
    engine.step(batch)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"):
        layer = engine.sharding.module.get_submodule(f"model.layers.3.{name}")
        layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    engine.step(batch)
    labels, every = int((batch["labels"][:, 1:] != -100).sum()), batch["input_ids"].numel()
    assert rows == [4 * every, 4 * labels, 4 * labels] and labels < every


def test_a_visit_that_is_cached_calls_late_modules_alone() -> None:
    engine = engine_of(deep(tied=False), trunk_cache="memory")
    called: list[str] = []
    for name, module in engine.sharding.module.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    engine.settle(numbered([0, 1, 2]))
    called.clear()
    engine.step(numbered([0, 1, 2]))
    assert (
        called.count("model.embed_tokens") == called.count("model.layers.0.self_attn.q_proj") == 1
    )
    assert called.count("model.norm") == 1 and called.count("lm_head") <= 1
    called.clear()
    engine.step(numbered([2, 0]))
    late = {name for name in called if "layers" in name}
    assert late and all(name.startswith(("model.layers.2", "model.layers.3")) for name in late)
    assert "model.embed_tokens" not in called


def test_one_pass_through_the_trunk_serves_all_forwards_of_a_step() -> None:
    for fields in ({"branch_chunk": 1}, {"probe": "inplace"}):
        engine, calls = engine_of(deep(), **fields), []
        engine.settle(numbered([0, 1]))
        first = engine.sharding.module.get_submodule("model.layers.0")
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        engine.step(numbered([0, 1]))
        assert len(calls) == 1


@pytest.mark.parametrize("more", [{"branch_chunk": 1}, {"probe": "inplace"}], ids=str)
def test_the_last_attention_of_one_copy_serves_all_forwards_of_a_step(more: dict[str, int]) -> None:
    engine, calls = engine_of(deep(tied=False), include=BEHIND["llama"], **more), []
    engine.settle(numbered([0, 1]))
    query = engine.sharding.module.get_submodule("model.layers.3.self_attn.q_proj")
    query.register_forward_pre_hook(lambda *_: calls.append(1))
    for count in (1, 2):
        engine.step(numbered([0, 1]))
        assert len(calls) == count


@pytest.mark.parametrize(
    ("model", "include", "message"),
    [
        ("T5ForConditionalGeneration", "decoder.block.1.*", "each block of a decoder reads the whole"),
        ("BartForConditionalGeneration", "*decoder.layers.1.*", "each block of a decoder reads the"),
        ("AlbertForMaskedLM", "*predictions.dense*", "calls a AlbertLayerGroup several times"),
        ("LlamaForCausalLM", "*", "embed_tokens.weight trains, and acts before the first block returns"),
    ],
)  # fmt: skip
def test_models_without_a_trunk_are_refused_by_name(model: str, include: str, message: str) -> None:
    more = {"num_layers": 2} if "T5" in model else {}
    if "Bart" in model:
        more = {"encoder_layers": 2, "decoder_layers": 2}
    made = tiny_of(model, 61, **more)
    batch = {**numbered([0, 1, 2])}
    if "Llama" not in model:
        batch["decoder_input_ids"] = batch["input_ids"]
    fields = {"include": (include,), "rank": 3, "rho": 1e-2, "trunk_cache": "memory"}
    engine = tezo_ds.initialize(made, fields)
    engine.objective.first = None
    with pytest.raises(ConfigError, match=f"(?s)trunk_cache: nothing to keep.*{message}") as error:
        engine.step(batch)
    assert "\n" not in str(error.value)


def test_bad_batches_and_fields() -> None:
    with pytest.raises(ConfigError, match="trunk_cache: needs shared_trunk"):
        engine_of(deep(), trunk_cache="memory", **WHOLE)
    with pytest.raises(ConfigError, match="use memory here"):
        engine_of(deep(), trunk_cache="disk")
    engine = engine_of(deep(), trunk_cache="memory")
    batch = numbered([0, 1, 2])
    with pytest.raises(ConfigError, match="the batch has no example_ids"):
        engine.step({k: v for k, v in batch.items() if k != "example_ids"})
    engine.step(batch)
    with pytest.raises(ConfigError, match="example 2 has other tokens than before"):
        engine.step({**batch, "example_ids": torch.tensor([2, 1, 0])})
    mask = batch["attention_mask"].flip(1)
    with pytest.raises(ConfigError, match="padded on the right"):
        engine.step({**batch, "attention_mask": mask})
    engine.step(batch)  # none of which has left anything behind
