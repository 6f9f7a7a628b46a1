"""The peak memory of a real process that trains 50 million weights, by each method."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from process_memory import BLOCK, may_take, process_peak
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

import tezo_ds
from tezo_ds.config.registry import METHODS
from tezo_ds.losses.objective import Objective
from tezo_ds.methods import tezo_adam
from tezo_ds.sharding import sharding_of

PLAIN, COPYING, WHOLE = "plain forward", "tezo, in place", "tezo-adam, matrices whole"
FIELDS = {PLAIN: {}, COPYING: {"probe": "inplace"}, WHOLE: {"method": "tezo-adam"}} | {
    method: {"method": method} for method in METHODS
}
LANES = (  # two at once; dense directions take longest
    ("mezo-adam", PLAIN, "tezo", "tezo-m", "tezo-adam-coef", COPYING, "lozo", "lozo-m"),
    ("mezo", "mezo-m", "tezo-adam", WHOLE, "tezo-gn"),
)
FORK = multiprocessing.get_context("fork")
ENVIRONMENT = {
    # From a fixed size on glibc gives each freed tensor back; else it keeps some, more or less by chance.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # fewer page faults, for speed
    "OMP_NUM_THREADS": "1",
}


def llama(hidden: int, layers: int) -> LlamaForCausalLM:
    """Makes a Llama with random weights of rank one, as these are made in no time."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    with no_init_weights():
        model = LlamaForCausalLM(config)
    noise = torch.randn(config.intermediate_size, generator=torch.manual_seed(0)) / 5
    for weight in (p.data for p in model.parameters() if p.dim() == 2):
        torch.outer(noise[: len(weight)], noise[: weight.shape[1]], out=weight)
    return model


def prepare(name: str, model: nn.Module) -> Callable[[], object]:
    """Prepares what is run: steps, or plain forwards of as many sequences."""
    ids = torch.randint(0, 61, (2, 8), generator=torch.manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    if name == PLAIN:
        objective = Objective(sharding_of(model.eval()), None)
        return lambda: objective(batch, 2)
    engine = tezo_ds.initialize(model, {"lr": 1e-7, **FIELDS[name]})
    return lambda: engine.step(batch)


def report(name: str) -> None:
    """Prints the name and the peak of one measurement."""
    if name == WHOLE:
        tezo_adam.BLOCK_NUMEL = 1 << 40
    peak = process_peak(llama(64, 1), lambda: llama(2048, 1), lambda model: prepare(name, model))
    print(json.dumps([name, peak]), flush=True)


def measure() -> dict[str, int]:
    """Measures each peak in a process of its own that is forked from one, so that imports and compilation
    are paid for once only."""
    process = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, timeout=300, check=True,
    )  # fmt: skip
    lines = process.stdout.splitlines()
    return dict(json.loads(line) for line in lines if line.startswith("["))


def run_lane(names: Sequence[str]) -> None:
    """Runs the measurements named, one after the other."""
    for name in names:
        child = FORK.Process(target=report, args=(name,))
        child.start()
        child.join()


@pytest.mark.launches
def test_each_method_takes_what_it_is_meant_to() -> None:
    peaks = measure()
    assert peaks.keys() == FIELDS.keys()
    weights = sum(p.numel() * p.itemsize for p in llama(2048, 1).parameters() if p.dim() == 2)
    assert weights > 2e8
    plain = peaks[PLAIN]
    limits = {method: may_take(method, plain, weights) for method in METHODS}
    assert not {m: (peaks[m] / plain, limits[m] / plain) for m in METHODS if peaks[m] > limits[m]}
    # Two parts of a quotient at a time: those of the block before are gone.
    assert peaks["tezo-adam"] < peaks["tezo"] + 2.2 * BLOCK
    # And a peak shows moments, a copy of the weights, and an update that is formed whole.
    assert peaks["mezo-m"] > plain + 0.99 * weights
    assert peaks["mezo-adam"] > plain + 1.99 * weights
    assert peaks[COPYING] > plain + 0.99 * weights
    assert peaks[WHOLE] > limits["tezo-adam"]


if __name__ == "__main__":
    import tezo_ds.rng.compiled

    gc.freeze()  # so that no fork's collections go through what is imported, nor copy its pages
    lanes = [FORK.Process(target=run_lane, args=(names,)) for names in LANES]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
