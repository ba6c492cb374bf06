"""Generated workflows: upstream's runtime and ours, and ours in all configurations, tell the same of each."""

from __future__ import annotations

import asyncio
import json

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st
from workflows import Context

from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import RunHooks, RunOptions, make_run, open_run

from .compare import PATIENCE, Case, on_ours, run_on_upstream, told_outcome
from .generate import Asks, FanOut, People, Plain, Sends, answer_to, ends_in_a_race, make_workflow

FEW = settings(max_examples=80, deadline=None, derandomize=True, database=None)

numbers = st.integers(0, 4)
workers = st.sampled_from([1, 2, 4])
plain = st.builds(
    Plain,
    sync=st.booleans(),
    pauses=st.integers(0, 3),
    failures=st.sampled_from([0, 0, 1, 2, 3]),
    delay=st.sampled_from([0, 0, 0.001]),
    handled=st.booleans(),
)
fan_outs = st.builds(
    FanOut,
    members=numbers,
    work=st.sampled_from(["plain", "fails", "waits", "drops", "nests"]),
    workers=workers,
    sync=st.booleans(),
)
# Which are the first is only clear where one worker does one after the other.
takes = st.builds(FanOut, members=numbers, workers=st.just(1), sync=st.booleans(), take=st.integers(1, 3))
sends = st.builds(Sends, events=st.integers(1, 4), workers=workers)
descriptions = st.lists(
    st.one_of(plain, st.just(Asks()), st.just(People()), fan_outs, takes, sends), min_size=1, max_size=5
)


def case_of(stages):
    return Case(make_workflow(stages), {"n": 3}, reply=answer_to, parallel=True, cut=ends_in_a_race(stages))


async def hosted(case):
    async with open_asyncio_loop():
        return await on_ours(case, "asyncio")


@FEW
@given(descriptions)
def test_generated_workflows_are_told_the_same_everywhere(stages):
    case = case_of(stages)
    theirs = asyncio.run(run_on_upstream(case))
    told = {
        "trio-anyio": anyio.run(on_ours, case, "anyio", backend="trio"),
        "trio-asyncio": anyio.run(hosted, case, backend="trio"),
        "asyncio": anyio.run(on_ours, case, "anyio", backend="asyncio"),
    }
    assert {name: ours.outcome for name, ours in told.items()} == dict.fromkeys(told, theirs.outcome)
    for ours in told.values():
        assert ours.events == theirs.events


class Photographer(RunHooks):
    """Answers what is asked, and keeps what a snapshot has where a call starts, where one has ended and where the run is
    idle.

    Not while a step is at work that has sent events: started again it sends them again, as upstream's does.
    """

    def __init__(self, case):
        self.case = case
        self.run = None
        self.moments = []

    def on_event(self, event):
        for answer in self.case.reply(event):
            self.run.send_event(answer)

    async def before_step(self, step):
        self.take()

    def on_step_done(self):
        self.take()

    def on_idle(self):
        self.take()

    def take(self):
        if self.run.broker_state.is_running and not self.run.has_half_sent:
            self.moments.append((json.dumps(self.run.context.to_dict()), self.run.held_events()))


async def photographed(case):
    hooks = Photographer(case)
    options = RunOptions(internal_events=True)
    hooks.run = make_run(case.make(), hooks=hooks, start_kwargs=case.start, options=options)
    await hooks.run.drive()
    outcome, _ = await told_outcome(case, hooks.run.result())
    return outcome, hooks.moments


async def go_on(case, stored, held, flavour="anyio"):
    workflow = case.make()
    context = Context.from_dict(workflow, json.loads(stored))
    with anyio.fail_after(PATIENCE):
        async with open_run(workflow, context=context, flavour=flavour) as run:
            for event in held:
                run.send_event(event)
            async for event in run.events():
                for answer in case.reply(event):
                    run.send_event(answer)
            return (await told_outcome(case, run.result()))[0]


async def hosted_go_on(*args):
    async with open_asyncio_loop():
        return await go_on(*args, "asyncio")


@FEW
@given(descriptions, st.sampled_from(["trio", "asyncio"]), st.integers(0, 999))
def test_generated_workflows_go_on_from_any_moment(stages, backend, permille):
    case = case_of(stages)
    outcome, moments = anyio.run(photographed, case, backend=backend)
    # How many there are is also up to the threads of sync steps: nothing that hypothesis draws may depend on it.
    stored, held = moments[len(moments) * permille // 1000]
    for function, backend in ((go_on, "trio"), (hosted_go_on, "trio"), (go_on, "asyncio")):
        assert anyio.run(function, case, stored, held, backend=backend) == outcome
