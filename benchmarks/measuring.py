"""One measurement of `benchmarks.runtime`, in a process of its own.

    python -m benchmarks.measuring '{"candidate": "trio", "workload": "one-step", "spans": false, "share": 1}'

Prints what came out as JSON; a wrong answer ends it with exit code 1. `measure(order)` starts that process.
"""

from __future__ import annotations

import cProfile
import gc
import json
import pstats
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .candidates import CANDIDATES, Result, Side
from .waiting import measure_waiting
from .workloads import WAITING, WORKLOADS, WrongAnswer

WARM_UP = 0.1
"""Operations before the measured ones, as a share of them."""
TIME_LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class Order:
    """What to measure. `spans`: with a span handler and an event handler attached. `share`: of the usual amount of work.
    `seconds`: how long to look at runs that wait. `profile`: print where the CPU goes, so many lines of it, instead of
    measuring."""

    candidate: str
    workload: str
    spans: bool = False
    share: float = 1.0
    seconds: float = 5.0
    profile: int = 0


class Failed(Exception):
    """The measurement's process failed; it has said why."""


def measure(order: Order) -> Result:
    """Carry out the order in a process of its own.

    Raises:
        Failed: a wrong answer, or an error.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measuring", json.dumps(asdict(order))],
        stdout=None if order.profile else subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        timeout=TIME_LIMIT,
    )
    if done.returncode:
        raise Failed(f"{order.candidate}, {order.workload}: exit code {done.returncode}")
    if order.profile:
        return {}
    result: Result = json.loads(done.stdout)
    return result


# In the process


@contextmanager
def counted_spans(attached: bool) -> Iterator[Counter[str]]:
    """Counts of what simple handlers at the root dispatcher saw."""
    seen: Counter[str] = Counter()
    if not attached:
        yield seen
        return
    from llama_index_instrumentation import get_dispatcher
    from llama_index_instrumentation.base import BaseEvent
    from llama_index_instrumentation.event_handlers import BaseEventHandler
    from llama_index_instrumentation.span import BaseSpan
    from llama_index_instrumentation.span_handlers import BaseSpanHandler

    class Spans(BaseSpanHandler[BaseSpan]):
        def new_span(self, id_: str, *args: Any, parent_span_id: str | None = None, **kwargs: Any) -> BaseSpan:
            seen["enter"] += 1
            return BaseSpan(id_=id_, parent_id=parent_span_id)

        def prepare_to_exit_span(self, id_: str, *args: Any, **kwargs: Any) -> BaseSpan | None:
            seen["exit"] += 1
            return self.open_spans.get(id_)

        def prepare_to_drop_span(self, id_: str, *args: Any, **kwargs: Any) -> BaseSpan | None:
            seen["drop"] += 1
            return self.open_spans.get(id_)

    class Events(BaseEventHandler):
        def handle(self, event: BaseEvent, **kwargs: Any) -> None:
            seen[event.class_name()] += 1

    root, spans, events = get_dispatcher(), Spans(), Events()
    root.add_span_handler(spans)
    root.add_event_handler(events)
    try:
        yield seen
    finally:
        root.span_handlers.remove(spans)
        root.event_handlers.remove(events)


async def repeat(order: Order, seen: Counter[str], side: Side) -> Result:
    """Wall and CPU time of the workload's operations, one after the other."""
    workload = WORKLOADS[order.workload]
    operations = max(1, round(workload.operations * order.share))
    async with side.open():
        once = workload.prepare(side)
        for _ in range(max(1, round(operations * WARM_UP))):
            await once()
        gc.collect()
        seen.clear()
        with profiled(order.profile):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(operations):
                await once()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "units": operations * workload.units,
        "wall": wall,
        "cpu": cpu,
        "seen": {name: count / operations for name, count in sorted(seen.items())},
    }


@contextmanager
def profiled(lines: int) -> Iterator[None]:
    """Print what took the time in the block, by function."""
    if not lines:
        yield
        return
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(lines)


def carry_out(order: Order) -> Result:
    candidate = CANDIDATES[order.candidate]
    if waiting := WAITING.get(order.workload):
        with profiled(order.profile):
            return candidate.loop(partial(measure_waiting, waiting, order.share, order.seconds), candidate.side)
    with counted_spans(order.spans) as seen:
        return candidate.loop(partial(repeat, order, seen), candidate.side)


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    try:
        result = carry_out(order)
    except* WrongAnswer as wrong:
        error: BaseException = wrong
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"wrong answer: {error}")
    if not order.profile:
        json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
