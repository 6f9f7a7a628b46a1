"""The oracle of adapters on tiny models: layers of known places, wrapped one by one in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gauss_newton_oracle
import torch
from tiny import make_batch, tiny
from torch import Tensor, nn

import tezo_ds
from tezo_ds.methods import reference_adapters
from tezo_ds.methods.reference import Record

STEPS, MODES = 11, (2, 2)  # into a third epoch of five; modes of 22, and of a bottleneck of 6
RUN = {"rho": 1e-2, "lr": 3e-2, "seed": 11, "queries": 2, "bottleneck": 6, "tt_rank": 3}
PUBLISHED = {"adapter": "tt", "tt_init": "published"}
# Where adapters stand in tiny("llama"), in their own words.
LAYERS = ("model.layers.0", "model.layers.1")
AFTER, BEFORE = ("self_attn.o_proj", "mlp.down_proj"), ("mlp.gate_proj", "mlp.up_proj")
QUERY_VALUE = ("self_attn.q_proj", "self_attn.v_proj")


def batch_of(step: int) -> dict[str, Tensor]:
    return make_batch(7, seed=step)


def parameters_of(engine: tezo_ds.Engine) -> dict[str, Tensor]:
    """Returns an engine's adapter parameters in their shapes."""
    shapes = {
        f"{site.name}.{name}": shape
        for site in engine.selection.adapters.sites
        for name, shape in site.adapter.shapes.items()
    }
    return {name: part.view(shapes[name]) for name, part in engine.coefficients().items()}


@contextmanager
def wrapped(model: nn.Module, parameters: dict[str, Tensor], fields: dict) -> Iterator[None]:
    """Context manager: the model's forwards inside have the oracle's adapters."""

    def of(path: str) -> dict[str, Tensor]:
        prefix = f"{path}.adapter."
        found = {k.removeprefix(prefix): p for k, p in parameters.items() if k.startswith(prefix)}
        assert found, path
        return found

    def tensor_train(path: str, h: Tensor) -> Tensor:
        act = fields.get("tt_act", "relu")
        return reference_adapters.tensor_train_adapter(h, of(path), MODES, act)

    with ExitStack() as stack:

        def after(path: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
            module = model.get_submodule(path)
            hook = module.register_forward_hook(lambda _, args, y: change(args[0], y))
            stack.callback(hook.remove)

        for layer in LAYERS:
            if fields["adapter"] == "lora":
                for path in (f"{layer}.{name}" for name in QUERY_VALUE):
                    after(path, lambda x, y, p=path: reference_adapters.lora(x, y, of(p), 16))
                continue
            whole = fields.get("adapter_sites", "after") == "after"
            for path in (f"{layer}.{name}" for name in (AFTER if whole else AFTER[1:])):
                after(path, lambda _, y, p=path: tensor_train(p, y))
            for path in (f"{layer}.{name}" for name in (() if whole else BEFORE)):
                hook = model.get_submodule(path).register_forward_pre_hook(
                    lambda _, args, p=path: (tensor_train(p, args[0]),)
                )
                stack.callback(hook.remove)
        yield


def loss_of(model: nn.Module, parameters: dict[str, Tensor], fields: dict, step: int) -> float:
    """Returns the mean loss of a step's batch in plain torch."""
    batch = batch_of(step)
    with torch.no_grad(), wrapped(model, parameters, fields):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        ).item()


def all_queries(fields: dict, step: int) -> int:
    return tezo_ds.TezoConfig(**fields).queries_at(step)


@functools.cache
def _run(method: str, tied: bool, items: tuple[tuple[str, Any], ...]) -> tuple[Record, ...]:
    fields = {**RUN, **dict(items), "method": method}
    start = parameters_of(tezo_ds.initialize(tiny(tied=tied).double(), fields))
    model = tiny(tied=tied).double()
    options = {k: fields[k] for k in ("seed", "momentum", "betas", "eps") if k in fields}
    return tuple(
        reference_adapters.run(
            method, start, lambda step, p: loss_of(model, p, fields, step), STEPS, fields["lr"],
            fields["rho"], lambda step: all_queries(fields, step), **options,
        )
    )  # fmt: skip


def oracle(method: str, fields: dict, tied: bool = True) -> tuple[Record, ...]:
    """Returns the records of the oracle's run of a float64 model, of every example."""
    return _run(method, tied, tuple(sorted(fields.items())))


def gauss_newton(fields: dict, damping: float, scales: tuple[float, ...]) -> dict[str, Tensor]:
    """Returns the parameters after 6 steps of tezo-gn, by its own oracle."""
    start = parameters_of(tezo_ds.initialize(tiny().double(), fields))
    model = tiny().double()

    def logits(step: int, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = batch_of(step)
        labels = batch["labels"][:, 1:].flatten()
        with torch.no_grad(), wrapped(model, parameters, fields):
            found = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
        return found[labels != -100], labels[labels != -100]

    *_, (last, _) = gauss_newton_oracle.run(
        start, logits, 6, fields["queries"], None, fields["seed"], fields["rho"], damping, scales
    )
    return last


def assert_the_oracle(
    engine: tezo_ds.Engine, records: tuple[Record, ...], rank: int, size: int, close: float
) -> None:
    """Asserts that an engine takes the oracle's steps, each rank with its part of the examples.

    Args:
        engine: at the start of the run.
        records: the oracle's.
        rank, size: of this process, among those that see different examples.
        close: how near slopes and changes have to be, over the largest.
    """
    start = parameters_of(engine)
    for record in records:
        batch = {k: v.tensor_split(size)[rank] for k, v in batch_of(record.step).items()}
        report = engine.step(batch)
        assert len(report.kappa) == len(record.kappas)
        ours, theirs = torch.tensor([report.kappa, record.kappas], dtype=torch.float64)
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=close * max(1.0, theirs.abs().max()))
    found = parameters_of(engine)
    assert found.keys() == records[-1].weights.keys()
    for name, expected in records[-1].weights.items():
        change = expected - start[name]
        scale = change.abs().max().item()
        assert scale > 1e-4, name
        assert (found[name] - expected).abs().max().item() < close * scale, name
