"""The runtime alone: runs a second and CPU a run of a one-step workflow, beside upstream's own `await workflow.run()`.

    python -m benchmarks.runtime_micro [--rounds 7] [--runs 300] [--json FILE]

No service, store or HTTP. Runs one after the other; the candidates take turns, in another order every round.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial

import trio

from llama_corral.aio import open_asyncio_loop
from llama_corral.examples.hello import hello
from llama_corral.runtime import StepFlavour, run_workflow

from . import machine, report

UPSTREAM = "upstream, asyncio"


@dataclass(frozen=True, slots=True)
class Sample:
    candidate: str
    round: int
    runs_per_second: float
    cpu_us: float


async def ours(flavour: StepFlavour) -> None:
    assert await run_workflow(hello, flavour=flavour, name="Ada") == "Hello, Ada!"


async def upstream() -> None:
    assert await hello.run(name="Ada") == "Hello, Ada!"


async def repeat(run: Callable[[], Awaitable[None]], runs: int) -> tuple[float, float]:
    """Wall and CPU seconds of so many runs, after a tenth as warm-up."""
    for _ in range(runs // 10 + 1):
        await run()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(runs):
        await run()
    return time.perf_counter() - wall, time.process_time() - cpu


async def _on_hosted_loop(runs: int) -> tuple[float, float]:
    async with open_asyncio_loop():
        return await repeat(partial(ours, "asyncio"), runs)


CANDIDATES: dict[str, Callable[[int], tuple[float, float]]] = {
    UPSTREAM: lambda runs: asyncio.run(repeat(upstream, runs)),
    "run_workflow, asyncio": lambda runs: asyncio.run(repeat(partial(ours, "anyio"), runs)),
    "run_workflow, Trio, anyio steps": lambda runs: trio.run(repeat, partial(ours, "anyio"), runs),
    "run_workflow, Trio, asyncio steps": lambda runs: trio.run(_on_hosted_loop, runs),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime_micro", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=300, help="runs of each candidate in a round")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here")
    args = parser.parse_args()
    samples: list[Sample] = []
    for round_ in range(args.rounds):
        for name in report.rotated(list(CANDIDATES), round_):
            wall, cpu = CANDIDATES[name](args.runs)
            samples.append(Sample(name, round_, args.runs / wall, cpu / args.runs * 1e6))
    base = {sample.round: sample.cpu_us for sample in samples if sample.candidate == UPSTREAM}
    rows: list[list[str]] = []
    for name in CANDIDATES:
        own = [sample for sample in samples if sample.candidate == name]
        rows.append(
            [
                name,
                report.spread((sample.runs_per_second for sample in own), 0),
                report.spread((sample.cpu_us for sample in own), 0),
                report.spread(sample.cpu_us / base[sample.round] for sample in own),
            ]
        )
    print(report.table(["one step", "runs/s", "CPU us a run", "x upstream's CPU"], rows))
    if args.json:
        report.write_json(args.json, {"machine": machine.describe(), "samples": [asdict(sample) for sample in samples]})


if __name__ == "__main__":
    main()
