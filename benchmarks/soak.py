"""Does a process that runs workflows for ever stay as it is? Many runs of every kind, and what is left of them.

    python -m benchmarks.soak [--runs 50000] [--configurations trio,trio-hosted,asyncio] [--json FILE]

Each configuration has a process of its own. After every tenth of the runs it collects garbage and looks at its resident
memory and at what the runtime and upstream have made that is still there. The first tenth is warm-up: caches fill and the
allocator finds its size. After it the number of objects must not grow by more than one for every thousand runs, or the
script ends with exit code 1; memory is shown, because an allocator keeps what it likes. Cancel scopes are not counted: Trio
keeps up to a thousand that have exited before it sweeps its heap of deadlines.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial

import anyio
import anyio.lowlevel
import psutil
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import StepFlavour, open_run, run_workflow

from . import machine, report

CONFIGURATIONS: dict[str, tuple[str, StepFlavour]] = {
    "trio": ("trio", "anyio"),
    "trio-hosted": ("trio", "asyncio"),
    "asyncio": ("asyncio", "anyio"),
}
AT_ONCE = 10
LOOKS = 10
COUNTED = ("workflows", "llama_corral", "anyio", "trio", "trio_asyncio", "asyncio", "_asyncio", "_contextvars")
NOT_COUNTED = ("CancelScope", "CancelReason")


class Item(Event):
    n: int


class Plain(Workflow):
    @step
    async def first(self, ctx: Context, ev: StartEvent) -> Item:
        await ctx.store.set("seen", "x" * 1000)
        for n in range(5):
            ctx.write_event_to_stream(Item(n=n))
        return Item(n=1)

    @step
    async def second(self, ev: Item) -> StopEvent:
        await anyio.lowlevel.checkpoint()
        return StopEvent(result="done")


class Fails(Workflow):
    @step(retry_policy=retry_policy(wait=wait_fixed(0), stop=stop_after_attempt(2)))
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError("gone")


class Asks(Workflow):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="?"), timeout=60)
        return StopEvent(result="done")


class Threaded(Workflow):
    @step
    def work(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result="done")


class FansOut(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=n) for n in range(5)]

    @step
    async def join(self, items: list[Item]) -> StopEvent:
        return StopEvent(result="done" if len(items) == 5 else "wrong")


class Nests(Workflow):
    def __init__(self, inner: Workflow) -> None:
        super().__init__()
        self.inner = inner

    @step
    async def call(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=await run_workflow(self.inner))


async def to_its_end(workflow: Workflow, flavour: StepFlavour) -> None:
    assert await run_workflow(workflow, flavour=flavour) == "done"


async def with_a_reader(workflow: Workflow, flavour: StepFlavour) -> None:
    async with open_run(workflow, flavour=flavour) as run:
        async for event in run.events():
            if isinstance(event, InputRequiredEvent):
                run.send_event(HumanResponseEvent(response="yes"))
        assert await run.result() == "done"


async def to_its_error(workflow: Workflow, flavour: StepFlavour) -> None:
    try:
        await run_workflow(workflow, flavour=flavour)
    except LookupError:
        return
    raise AssertionError("the run did not fail")


async def cut_off(workflow: Workflow, flavour: StepFlavour) -> None:
    async with open_run(workflow, flavour=flavour) as run:
        await anext(aiter(run.events()))


def kinds(flavour: StepFlavour) -> list[Callable[[], Awaitable[None]]]:
    """One function for each way in which a run can go, over workflows that are made once."""
    plain, asks = Plain(), Asks()
    return [
        partial(to_its_end, plain, flavour),
        partial(with_a_reader, plain, flavour),
        partial(to_its_error, Fails(), flavour),
        partial(with_a_reader, asks, flavour),
        partial(cut_off, asks, flavour),
        partial(to_its_end, Threaded(), flavour),
        partial(to_its_end, FansOut(), flavour),
        partial(to_its_end, Nests(plain), flavour),
    ]


@dataclass(frozen=True, slots=True)
class Look:
    configuration: str
    runs: int
    resident_kb: int
    objects: int
    most: list[tuple[str, int]]


def look(configuration: str, runs: int) -> Look:
    """What there is of the runtime's and upstream's making, and how large the process is."""
    gc.collect()
    ours = Counter(
        f"{type(obj).__module__}.{type(obj).__qualname__}"
        for obj in gc.get_objects()
        if str(type(obj).__module__).partition(".")[0] in COUNTED and type(obj).__name__ not in NOT_COUNTED
    )
    size = psutil.Process().memory_info().rss // 1024
    return Look(configuration, runs, size, sum(ours.values()), ours.most_common(3))


async def soak(configuration: str, runs: int) -> None:
    flavour = CONFIGURATIONS[configuration][1]
    async with contextlib.AsyncExitStack() as stack:
        if configuration == "trio-hosted":
            await stack.enter_async_context(open_asyncio_loop())
        functions = kinds(flavour)
        for tenth in range(LOOKS):
            for batch in range(runs // LOOKS // AT_ONCE):
                async with anyio.create_task_group() as tasks:
                    for number in range(AT_ONCE):
                        tasks.start_soon(functions[(batch * AT_ONCE + number) % len(functions)])
            print(json.dumps(asdict(look(configuration, runs // LOOKS * (tenth + 1)))), flush=True)


def in_a_process(configuration: str, runs: int) -> list[Look]:
    command = [sys.executable, "-m", "benchmarks.soak", "--child", configuration, "--runs", str(runs)]
    looks: list[Look] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            looks.append(Look(**json.loads(line)))
            seen = looks[-1]
            print(
                f"{seen.configuration:12} {seen.runs:7} runs: {seen.resident_kb:7} kB, {seen.objects} objects",
                flush=True,
            )
    if child.returncode:
        raise SystemExit(f"{configuration}: exit code {child.returncode}")
    return looks


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50_000)
    parser.add_argument(
        "--configurations", metavar="C,C", default=",".join(CONFIGURATIONS), help=", ".join(CONFIGURATIONS)
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured here")
    parser.add_argument("--child", metavar="CONFIGURATION", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        anyio.run(soak, args.child, args.runs, backend=CONFIGURATIONS[args.child][0])
        return
    looks = {name: in_a_process(name, args.runs) for name in args.configurations.split(",")}
    rows = [
        [name, f"{seen[0].resident_kb} -> {seen[-1].resident_kb} kB", f"{seen[0].objects} -> {seen[-1].objects}"]
        for name, seen in looks.items()
    ]
    print(report.table([f"after {args.runs // LOOKS} and {args.runs} runs", "memory", "objects"], rows))
    if args.json:
        everything = [asdict(one) for seen in looks.values() for one in seen]
        report.write_json(args.json, {"machine": machine.describe(), "looks": everything})
    if any(seen[-1].objects - seen[0].objects > args.runs // 1000 for seen in looks.values()):
        raise SystemExit("what the runs leave behind grows")


if __name__ == "__main__":
    main()
