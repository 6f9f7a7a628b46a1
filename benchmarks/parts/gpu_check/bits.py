"""Promises of bits on the device: random numbers, repeated losses, a run that was killed, shardings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tezo_ds
from parts.common.backends import place
from parts.gpu_check.rows import Options, Rows
from tezo_ds.directions.draws import dense, left_rows
from tezo_ds.rng.philox import derive_key, normals, philox
from tezo_ds.sharding.world import join_world, local_device

STEPS, KILLED_AFTER = 8, 4
FIELDS = {"rank": 3, "rho": 1e-2, "lr": 1e-3, "queries": 2, "seed": 5, "check_every": 0}
# A known answer of Random123 for philox4x32-10 (kat_vectors): all words of counter and key are ones.
COUNTER, KEY = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
KNOWN = (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def small_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Makes the same small Llama, of sizes that divide by nothing, on any device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=301, hidden_size=130, intermediate_size=317, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def batch_of(step: int) -> dict[str, Tensor]:
    """Draws a batch of ragged texts."""
    ids = torch.randint(5, 301, (6, 23), generator=torch.Generator().manual_seed(step))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(len(ids)):
        mask[row, 23 - row :], labels[row, 23 - row :] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def slopes(model: nn.Module, steps: int = 3, **fields: object) -> Tensor:
    """Returns the slopes of some steps, float64 (steps, Q)."""
    engine = tezo_ds.initialize(model, {**FIELDS, **fields})
    return torch.tensor([engine.step(batch_of(s)).kappa for s in range(steps)]).double()


def run(rows: Rows, options: Options) -> None:
    """Makes the checks."""
    device = local_device()
    rows.check("Philox's known answer", lambda: known_answer(device))
    rows.check("normals have the CPU's bits", lambda: same_normals(device))
    for dtype in (torch.float32, torch.bfloat16):
        name = f"four losses of a batch are one, {dtype_name(dtype)}"
        rows.check(name, partial(repeated_losses, device, dtype))
    rows.check("steps are the CPU's up to rounding", lambda: as_on_a_cpu(device))
    rows.check("a killed run goes on bit for bit", lambda: killed_run(options.work))
    rows.check("float64 is added up, world of one", float64_sums)
    for backend in ("fsdp2", "zero3"):
        rows.check(f"{backend} of one rank steps alike", partial(alike, backend, device))
        name = f"{backend} puts weights back in place"
        rows.check(name, partial(put_back, backend, device))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def known_answer(device: torch.device) -> str:
    """Checks the device's words against the published ones."""
    counter = tuple(torch.tensor([word], device=device) for word in COUNTER)
    found = tuple(int(word) for word in philox(counter, KEY))  # type: ignore[arg-type]
    assert found == KNOWN, f"{found} are not {KNOWN}"
    return "four words of Random123"


def same_normals(device: torch.device) -> str:
    """Compares normals, U's rows and a rectangle of MeZO's Z with the CPU's."""
    index = torch.arange(20_011)

    def drawn(rows: Tensor) -> list[Tensor]:
        return [
            normals(derive_key(7, "w", "U"), rows, 17, stream=3), left_rows("w", 16, 7, rows),
            dense("w", 7, 2, 1, rows, range(5, 33)),
        ]  # fmt: skip

    pairs = list(zip(drawn(index), drawn(index.to(device)), strict=True))
    for ours, theirs in pairs:
        odd = int((ours.view(torch.int32) != theirs.cpu().view(torch.int32)).sum())
        assert not odd, f"{odd} of {ours.numel()} numbers differ"
    return f"{sum(ours.numel() for ours, _ in pairs):,} numbers"


def repeated_losses(device: torch.device, dtype: torch.dtype) -> str:
    """Compares four losses of one batch."""
    engine = tezo_ds.initialize(small_llama(dtype).to(device), FIELDS)
    losses = {engine.loss(batch_of(0)) for _ in range(4)}
    assert len(losses) == 1, f"{len(losses)} different losses: {sorted(losses)}"
    return f"loss {losses.pop():.6f}"


def as_on_a_cpu(device: torch.device) -> str:
    """Compares slopes of the same steps, one after the other, on both devices."""
    ours, theirs = slopes(small_llama()), slopes(small_llama().to(device))
    worst = float((ours - theirs).abs().max() / ours.abs().max())
    assert worst < 1e-2, f"slopes differ by {worst:.1e} of the largest"
    return f"slopes differ by {worst:.1e} of the largest"


def stretch(folder: Path, until: int, kill: bool) -> None:
    """Makes the steps of a run that its folder does not have yet, in a process of its own; kills it then."""
    engine = tezo_ds.initialize(
        small_llama().to(local_device()), {**FIELDS, "method": "tezo-adam-coef"}
    )
    state = folder / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        engine.load_state(saved["tensors"], written=False)
        engine.step_index = saved["step"]
    for step in range(engine.step_index, until):
        report = engine.step(batch_of(step))
        torch.save({"tensors": engine.state(), "step": step + 1}, state)
        with (folder / "slopes").open("a") as file:
            print(*(kappa.hex() for kappa in report.kappa), file=file)
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_run(work: Path) -> str:
    """Compares a run that was killed and went on in a new process with one that was not."""
    found = []
    for name, parts in (
        ("whole", [(STEPS, False)]),
        ("killed", [(KILLED_AFTER, True), (STEPS, False)]),
    ):
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        for until, kill in parts:
            words = [
                sys.executable,
                sys.argv[0],
                "--stretch",
                str(folder),
                str(until),
                str(int(kill)),
            ]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            expected = -signal.SIGKILL if kill else 0
            assert done.returncode == expected, f"exit {done.returncode}: {done.stderr[-500:]}"
        found.append((folder / "slopes").read_text())
    assert found[0] == found[1], "slopes after the kill are others"
    return f"{STEPS} steps, killed after {KILLED_AFTER}"


def in_a_world() -> None:
    """Joins a world of one rank, if that was not done."""
    if not dist.is_initialized():
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577"
        )
        join_world(deepspeed=True, fsdp=False, timeout=120)


def float64_sums() -> str:
    """Adds up float64 numbers by the world's own backend."""
    in_a_world()
    numbers = torch.tensor([1e-300, 1 / 3, 1e300], dtype=torch.float64, device=local_device())
    sums = numbers.clone()
    dist.all_reduce(sums)
    assert torch.equal(sums, numbers), f"{sums.tolist()} of {numbers.tolist()}"
    return f"by {dist.get_backend()}"


def sharded(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    in_a_world()
    return place(small_llama(dtype).to(device), backend)


def alike(backend: str, device: torch.device) -> str:
    """Compares slopes over a sharding of one rank with those of a plain model."""
    ours, theirs = slopes(small_llama().to(device)), slopes(sharded(backend, device))
    worst = float((ours - theirs).abs().max() / ours.abs().max())
    assert worst < 1e-3, f"slopes differ by {worst:.1e} of the largest"
    return f"slopes differ by {worst:.1e} of the largest"


def put_back(backend: str, device: torch.device) -> str:
    """Compares weights after a step in place, at rate 0, with those before."""
    model = sharded(backend, device, torch.bfloat16)
    engine = tezo_ds.initialize(model, {**FIELDS, "probe": "inplace", "lr": 0.0})
    losses = []
    for step in range(2):
        losses.append(engine.loss(batch_of(0)))
        engine.step(batch_of(step))
    assert losses[0] == losses[1], f"loss {losses[0]} became {losses[1]}"
    return f"loss {losses[0]:.6f} before and after"
