"""What runs cost that wait for an event: memory, CPU meanwhile, the time to start and to answer them."""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

from .candidates import OpenRuns, Result, Side
from .workloads import Answer, Waiter, Waiting, expect

WARM_UP_RUNS = 10
"""Few: what they leave free, the measured ones use without growing."""
SETTLE, SETTLED_CPU, SETTLE_LIMIT = 0.5, 0.005, 30.0
"""Runs are at rest when they took less CPU than that in so many seconds; beyond the limit they never are."""


async def measure_waiting(workload: Waiting, share: float, seconds: float, side: Side) -> Result:
    """`seconds`: how long to look at the CPU while all wait."""
    runs = max(1, round(workload.runs * share))

    async def measurement() -> Result:
        async with side.open():
            return await _measure(workload, runs, seconds, side)

    return await side.inside(measurement)


async def _measure(workload: Waiting, runs: int, seconds: float, side: Side) -> Result:
    async with _waiting(workload, WARM_UP_RUNS, side) as opened:
        await _answer(opened, WARM_UP_RUNS)
    gc.collect()
    process = psutil.Process()
    before, spent = process.memory_info().rss, _Spent()
    async with _waiting(workload, runs, side) as opened:
        start_wall, start_cpu = spent.lap()
        await _settle(side)
        gc.collect()
        size = process.memory_info().rss - before
        wakes = process.num_ctx_switches().voluntary
        spent.lap()
        await side.sleep(seconds)
        idle_wall, idle_cpu = spent.lap()
        wakes = process.num_ctx_switches().voluntary - wakes
        spent.lap()
        await _answer(opened, runs)
        answer_wall, answer_cpu = spent.lap()
    return {
        "runs": runs,
        "bytes_a_run": size / runs,
        "start_wall": start_wall,
        "start_cpu": start_cpu,
        "idle_wall": idle_wall,
        "idle_cpu": idle_cpu,
        "idle_wakes": wakes,
        "answer_wall": answer_wall,
        "answer_cpu": answer_cpu,
    }


@asynccontextmanager
async def _waiting(workload: Waiting, runs: int, side: Side) -> AsyncIterator[OpenRuns]:
    """So many runs, all of which have asked."""
    all_asked = side.new_event()
    asked = 0

    def on_asked() -> None:
        nonlocal asked
        asked += 1
        if asked == runs:
            all_asked.set()

    shared = Waiter(on_asked)
    workflows = [Waiter(on_asked) if workload.own_workflows else shared for _ in range(runs)]
    starts = [{"number": number} for number in range(runs)]
    async with side.open_runs(workflows, starts, driven=workload.driven) as opened:
        await all_asked.wait()
        yield opened


async def _answer(opened: OpenRuns, runs: int) -> None:
    for number in range(runs):
        opened.send(number, Answer(text=f"answer {number}"))
    expect(await opened.results(), [f"{number}: answer {number}" for number in range(runs)])


async def _settle(side: Side) -> None:
    """Let the runs get to where they wait: when all have asked, the last have yet to return from asking."""
    end = time.perf_counter() + SETTLE_LIMIT
    while time.perf_counter() < end:
        cpu = time.process_time()
        await side.sleep(SETTLE)
        if time.process_time() - cpu < SETTLED_CPU:
            return


class _Spent:
    """Wall and CPU time since the last lap."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        wall, cpu = self._wall, self._cpu
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self._wall - wall, self._cpu - cpu
