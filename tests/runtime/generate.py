"""Workflows made from a description: a chain of stages, each of which takes a number and gives one to the next.

[Plain(sync=True), FanOut(members=3, work="waits"), Asks()]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import anyio.lowlevel
from workflows import Context, Workflow, catch_error, step
from workflows.collect import Collect, Take
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StepFailedEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

MOST_STAGES = 6


class Question(InputRequiredEvent):
    stage: int
    n: int


def _event_class(name: str, base: type[Event]) -> type[Event]:
    cls = type(base)(name, (base,), {"__annotations__": {"n": int}, "__module__": __name__})
    globals()[name] = cls  # where a snapshot finds it
    return cls


# For each stage: what it takes, its answers, members, the done ones, their members, the done ones, what it sends.
E, A, M, D, N, ND, S = (
    [_event_class(f"{kind}{index}", base) for index in range(MOST_STAGES + 1)]
    for kind, base in (
        *(("E", Event), ("A", HumanResponseEvent), ("M", Event), ("D", Event)),
        *(("N", Event), ("ND", Event), ("S", Event)),
    )
)


@dataclass(frozen=True)
class Plain:
    """One step. `failures`: so often its call fails; 3 are too many. `handled`: then an error handler goes on."""

    sync: bool = False
    pauses: int = 0
    failures: int = 0
    delay: float = 0
    handled: bool = False


@dataclass(frozen=True)
class Asks:
    """One step that waits for an answer from outside."""


@dataclass(frozen=True)
class People:
    """A step that asks by what it returns, and another that takes the answer."""


@dataclass(frozen=True)
class FanOut:
    """A list, a step for each of its members, and a step that collects them, or the first `take` of them."""

    members: int
    work: Literal["plain", "fails", "waits", "drops", "nests"] = "plain"
    workers: int = 4
    sync: bool = False
    take: int | None = None


@dataclass(frozen=True)
class Sends:
    """A step that sends events, and one that gathers them with `collect_events`."""

    events: int
    workers: int = 4


Stage = Plain | Asks | People | FanOut | Sends


def ends_in_a_race(stages: Sequence[Stage]) -> bool:
    """Whether the run may end while steps work that make no difference to its outcome any more."""
    return any(isinstance(stage, FanOut) and stage.take is not None for stage in stages)


def answer_to(event: Event) -> Sequence[Event]:
    """What is sent from outside at a published event."""
    return [A[event.stage](n=event.n, value=event.n + 1)] if isinstance(event, Question) else []


def make_workflow(stages: Sequence[Stage]) -> type[Workflow]:
    """The workflow class of the description. Its result is the last number, and the stages that wrote to the store.

    All that it remembers is in its context, so that another instance can go on with it.
    """
    return _Builder(stages).build()


class _Builder:
    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.names: dict[str, Any] = {}
        self.events = [StartEvent, *E[1 : len(stages) + 1]]  # what each stage takes, and the final step

    def build(self) -> type[Workflow]:
        for index, stage in enumerate(self.stages):
            build = getattr(self, f"_{type(stage).__name__.lower()}")
            build(index, stage, self.events[index], self.events[index + 1])

        async def finish(self: Any, ctx: Context, ev: Any) -> StopEvent:
            return StopEvent(result=(ev.n, sorted((await ctx.store.get_state()).keys())))

        self.add(finish, {"ctx": Context, "ev": self.events[-1], "return": StopEvent})
        return type(Workflow)("Generated", (Workflow,), self.names)

    def add(self, function: Callable[..., Any], hints: dict[str, Any], name: str = "", **options: Any) -> None:
        function.__name__ = name or function.__name__
        function.__qualname__ = f"Generated.{function.__name__}"  # of a class: not a free function
        function.__annotations__ = hints
        decorate = options.pop("decorate", step)
        self.names[function.__name__] = decorate(**options)(function) if options else decorate(function)

    def _plain(self, index: int, stage: Plain, takes: Any, gives: Any) -> None:
        name = f"plain{index}"

        def call(self: Any, ctx: Context, ev: Any) -> Event:
            _fail_at_first(ctx, name, stage.failures)
            return gives(n=_n(ev) + 1)

        async def pause(self: Any, ctx: Context, ev: Any) -> Event:
            for _ in range(stage.pauses):
                await anyio.lowlevel.checkpoint()
            result = call(self, ctx, ev)
            await ctx.store.set(name, value=True)
            return result

        policy = retry_policy(wait=wait_fixed(stage.delay), stop=stop_after_attempt(3))
        hints = {"ctx": Context, "ev": takes, "return": gives}
        self.add(call if stage.sync else pause, hints, name, retry_policy=policy)
        if stage.handled:

            async def handle(self: Any, ev: StepFailedEvent) -> Event:
                return gives(n=_n(ev.input_event) + 100)

            hints = {"ev": StepFailedEvent, "return": gives}
            self.add(handle, hints, f"handle{index}", decorate=catch_error, for_steps=[name])

    def _asks(self, index: int, stage: Asks, takes: Any, gives: Any) -> None:
        async def ask(self: Any, ctx: Context, ev: Any) -> Event:
            return gives(n=await _answer(ctx, index, _n(ev)))

        self.add(ask, {"ctx": Context, "ev": takes, "return": gives}, f"ask{index}")

    def _people(self, index: int, stage: People, takes: Any, gives: Any) -> None:
        async def ask(self: Any, ev: Any) -> Question:
            return Question(stage=index, n=_n(ev))

        async def answered(self: Any, ev: Any) -> Event:
            return gives(n=ev.value)

        self.add(ask, {"ev": takes, "return": Question}, f"people{index}")
        self.add(answered, {"ev": A[index], "return": gives}, f"answered{index}")

    def _fanout(self, index: int, stage: FanOut, takes: Any, gives: Any) -> None:
        member, done = M[index], D[index]

        async def split(self: Any, ev: Any) -> list[Event]:
            return [member(n=_n(ev) + offset) for offset in range(stage.members)]

        async def join(self: Any, ctx: Context, members: list[Any]) -> Event:
            await ctx.store.set(f"join{index}", value=True)
            return gives(n=sum(event.n for event in members))

        self.add(split, {"ev": takes, "return": list[member]}, f"split{index}")
        self._member(index, stage, member, done)
        collected = list[done] if stage.take is None else Annotated[list[done], Collect(Take(stage.take))]
        self.add(join, {"ctx": Context, "members": collected, "return": gives}, f"join{index}")

    def _member(self, index: int, stage: FanOut, member: Any, done: Any) -> None:
        name = f"member{index}"
        hints = {"ctx": Context, "ev": member, "return": done | None}
        options = {"num_workers": stage.workers, "retry_policy": retry_policy(wait=wait_fixed(0))}

        def call(self: Any, ctx: Context, ev: Any) -> Event | None:
            if stage.work == "fails":
                _fail_at_first(ctx, name, ev.n % 2)
            return None if stage.work == "drops" and ev.n % 2 else done(n=ev.n)

        async def work(self: Any, ctx: Context, ev: Any) -> Event | None:
            if stage.work == "waits":
                return done(n=await _answer(ctx, index, ev.n))
            await anyio.lowlevel.checkpoint()
            return call(self, ctx, ev)

        if stage.work == "nests":
            self._nested(index, stage, member, done)
        else:
            self.add(call if stage.sync and stage.work != "waits" else work, hints, name, **options)

    def _nested(self, index: int, stage: FanOut, member: Any, done: Any) -> None:
        """Each member is a fan-out of two again."""
        inner, inner_done = N[index], ND[index]

        async def split(self: Any, ev: Any) -> list[Event]:
            return [inner(n=ev.n), inner(n=-1)]

        async def work(self: Any, ev: Any) -> Event:
            return inner_done(n=ev.n)

        async def join(self: Any, members: list[Any]) -> Event:
            return done(n=sum(event.n for event in members))

        self.add(split, {"ev": member, "return": list[inner]}, f"member{index}", num_workers=stage.workers)
        self.add(work, {"ev": inner, "return": inner_done}, f"inner{index}", num_workers=stage.workers)
        self.add(join, {"members": list[inner_done], "return": done}, f"inner_join{index}")

    def _sends(self, index: int, stage: Sends, takes: Any, gives: Any) -> None:
        sent = S[index]

        async def send(self: Any, ctx: Context, ev: Any) -> Event | None:
            for offset in range(stage.events):
                ctx.send_event(sent(n=_n(ev) + offset))
            return None

        async def gather(self: Any, ctx: Context, ev: Any) -> Event | None:
            events = ctx.collect_events(ev, [sent] * stage.events)
            return None if events is None else gives(n=sum(event.n for event in events))

        self.add(send, {"ctx": Context, "ev": takes, "return": sent | None}, f"send{index}")
        hints = {"ctx": Context, "ev": sent, "return": gives | None}
        self.add(gather, hints, f"gather{index}", num_workers=stage.workers)


def _n(event: Any) -> int:
    return int(event.get("n", getattr(event, "n", 0)) if isinstance(event, StartEvent) else event.n)


async def _answer(ctx: Context, index: int, n: int) -> int:
    got = await ctx.wait_for_event(A[index], waiter_event=Question(stage=index, n=n), requirements={"n": n})
    return int(got.value)


def _fail_at_first(ctx: Context, name: str, times: int) -> None:
    if ctx.retry_info().retry_number < times:
        raise ConnectionError(f"{name} failed")
