"""Bytes over the link between two hosts, and seconds of a step: SmolLM2-135M in bfloat16 on TREC.

Two hosts of two CPU ranks each, in network namespaces of this machine (tests/helpers/two_hosts.py), joined
by a link of limited rate. Each way of sharding is launched once, by launch/hostfile.sh, and makes some steps
at each rate. Bytes are what the counters of link and connections grew by from one step's line in the
journal to a later one's.

    python benchmarks/two_nodes.py                     all, as root; what is finished is not repeated
    python benchmarks/two_nodes.py --ways zero3-fused --rates 100mbit
    python benchmarks/two_nodes.py --report            only writes docs/clusters.md and its picture
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Any

from parts.common.machine import describe
from parts.methods.report import Record, Results, put_between_markers
from parts.two_nodes.report import MARKERS, draw, markdown
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
from command_line import flags  # noqa: E402
from fault_runs import done_in, fresh  # noqa: E402
from two_hosts import TwoHosts, two_hosts  # noqa: E402

from tezo_ds.run.folder import METRICS, read_metrics  # noqa: E402

LOADING = "1gbit"  # the rate while a model is read and evaluated
RANKS, PORT = 2, 29500  # a host; of the store in which ranks meet and leave notes
DISCARDED = (
    2,
    1,
)  # steps that are not counted, as DeepSpeed learns the order of layers; at later rates
PATIENCE = 1200  # seconds without a step


@dataclass(frozen=True)
class Way:
    """One way of sharding and measuring.

    Attributes:
        name: name in tables.
        options: options of `tezo-ds train`.
        zero: DeepSpeed's zero_optimization block, on top of ds_configs/zero3_bf16.json; None: FSDP2.
    """

    name: str
    options: dict[str, Any]
    zero: dict[str, Any] | None = None


HYBRID = {"fsdp": True, "fsdp_replicas": 2, "dtype": "bfloat16", "probe": "fused"}
WAYS = {
    "zero3-inplace": Way("ZeRO-3 over all ranks, in place", {"probe": "inplace"}, {}),
    "zero3-fused": Way("ZeRO-3 over all ranks, fused", {"probe": "fused"}, {}),
    "hpz-fused": Way(
        "ZeRO-3 with hpZ, fused", {"probe": "fused"}, {"zero_hpz_partition_size": RANKS}
    ),
    "hybrid-fused": Way("FSDP2, a copy a host, fused", HYBRID),
    "hybrid-per-rank": Way(
        "FSDP2, a copy a host, fused, `per_rank`", {**HYBRID, "placement": "per_rank"}
    ),
}


class Benchmark:
    """The measurements that the arguments ask for, and those that are finished."""

    def __init__(self, args: argparse.Namespace, results: Results, console: Console) -> None:
        self._args, self._results, self._console = args, results, console

    def _key(self, way: str, rate: str) -> Record:
        names = ("queries", "batch_size", "steps", "model")
        return {"way": way, "rate": rate} | {name: getattr(self._args, name) for name in names}

    def run(self) -> None:
        """Measures what is not finished."""
        for name in self._args.ways:
            rates = [r for r in self._args.rates if not self._results.find(self._key(name, r))]
            if not rates:
                continue
            with two_hosts(LOADING) as hosts:
                for record in self._measure(hosts, name, rates):
                    self._results.add(record)
                    self._console.print(
                        f"{name}, {record['rate']}: {record['step_seconds']:.2f} s a step, "
                        f"{record['sent']:,.0f} bytes to the other host, {record['received']:,.0f} back"
                    )

    def _measure(self, hosts: TwoHosts, name: str, rates: Sequence[str]) -> Iterator[Record]:
        """Launches one way, and yields a record for each rate once it is measured."""
        args, started = self._args, time.monotonic()
        folder = fresh(args.out / name)
        run, skipped = folder / "run", [DISCARDED[min(n, 1)] for n in range(len(rates))]
        total = sum(skipped) + len(rates) * args.steps
        with (folder / "output").open("w") as log:
            process = self._start(hosts, WAYS[name], folder, total, log)
            done = 0
            for rate, skip in zip(rates, skipped, strict=True):
                _reach(run, done, process)
                hosts.limit(rate)
                _reach(run, done + skip, process)
                before = _crossed(hosts)
                done += skip + args.steps
                _reach(run, done, process)
                after = _crossed(hosts)
                hosts.limit(LOADING)
                lines = read_metrics(run / METRICS)[0][-args.steps :]
                grown = {kind: (after[kind] - before[kind]) / args.steps for kind in after}
                yield {
                    **self._key(name, rate), **grown,
                    "step_seconds": statistics.median(line["seconds"] for line in lines),
                    "seconds": [line["seconds"] for line in lines],
                    "weights": (Path(args.model) / "model.safetensors").stat().st_size // 2,
                    "machine": describe(), "command": " ".join(["python", *sys.argv]),
                }  # fmt: skip
            if process.wait(PATIENCE):
                raise RuntimeError(f"{name} ended with {process.returncode}; see {folder}/output")
        self._console.print(f"{name}: {time.monotonic() - started:.0f} s in all")

    def _start(self, hosts: TwoHosts, way: Way, folder: Path, steps: int, log: Any) -> Popen[str]:
        """Starts the launcher, on the first host."""
        args = self._args
        options = {
            "model": args.model, "task": "trec", "data": args.data, "objective": "choices",
            "test_examples": 2 * RANKS, "output": folder / "run", "steps": steps,
            "batch_size": args.batch_size, "queries": args.queries, "rank": 16, "lr": 1e-6,
            "exclude": "*embed*", "check_every": 0, "timeout": PATIENCE, **way.options,
        }  # fmt: skip
        if way.zero is not None:
            config = json.loads((ROOT / "ds_configs/zero3_bf16.json").read_text())
            config["zero_optimization"] |= way.zero
            options["deepspeed"] = folder / "deepspeed.json"
            options["deepspeed"].write_text(json.dumps(config))
        environment = {
            "HOSTFILE": hosts.hostfile(RANKS), "MASTER_PORT": PORT, "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1,
        }  # fmt: skip
        return hosts.first.start(
            ROOT / "launch/hostfile.sh", *flags(options), stdout=log, stderr=STDOUT,
            env={**os.environ, **{key: str(value) for key, value in environment.items()}},
        )  # fmt: skip


def _reach(run: Path, steps: int, process: Popen[str]) -> None:
    """Waits until `steps` steps are on disk. Raises RuntimeError if no further one comes."""
    deadline, done = time.monotonic() + PATIENCE, 0
    while done < steps:
        time.sleep(0.005)
        if (now := done_in(run)) > done:
            deadline, done = time.monotonic() + PATIENCE, now
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{run} has {done} of {steps} steps; see {run.parent}/output")


def _crossed(hosts: TwoHosts) -> dict[str, int]:
    """Counts bytes so far: on the wire, `sent` and `received` by the first host; and without headers, in both
    directions, those of its connections by what they are for."""
    received, sent = hosts.first.bytes()
    counts = {"sent": sent, "received": received, "ranks": 0, "store": 0, "ssh": 0}
    ports = {str(PORT): "store", "22": "ssh"}
    connections = hosts.first.run("ss", "-tinH").split("\nESTAB")
    for text in (text for text in connections if hosts.second.address in text):
        ends = re.findall(r":(\d+)\s", text)[:2]
        kind = next((ports[port] for port in ends if port in ports), "ranks")
        counts[kind] += sum(map(int, re.findall(r"bytes_(?:sent|received):(\d+)", text)))
    return counts


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, cache = parser.add_argument, ROOT / ".cache/quickstart"
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--rates", nargs="+", default=["1gbit", "100mbit"], help="of the link, as tc writes them")
    add("--steps", type=int, default=3, help="that are measured at each rate")
    add("--queries", type=int, default=2)
    add("--batch-size", type=int, default=4)
    add("--model", default=str(cache / "SmolLM2-135M-Instruct"))
    add("--data", default=str(cache / "trec"))
    add("--out", type=Path, default=ROOT / "runs/two-nodes", help="folder of results.jsonl")
    add("--page", type=Path, default=ROOT / "docs/clusters.md", help="where the table goes")
    add("--no-page", dest="page", action="store_const", const=None, help="on the screen only")
    add("--report", action="store_true", help="run nothing, report what there is")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args, console = arguments().parse_args(words), Console(soft_wrap=True)
    results = Results(args.out / "results.jsonl")
    if not args.report:
        console.print(describe())
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            Benchmark(args, results, console).run()
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
        except RuntimeError as error:
            raise SystemExit(f"two_nodes: error: {error}") from None
    content = markdown(results.records, {key: way.name for key, way in WAYS.items()})
    console.print(content, markup=False)
    if args.page is not None:
        picture = f"![Seconds and bytes of a step]({args.page.stem}.png)"
        put_between_markers(args.page, f"{content}\n\n{picture}", MARKERS)
        draw(results.records, {k: w.name for k, w in WAYS.items()}, args.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
