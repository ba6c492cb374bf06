"""`FaultyCoordinator`: what goes through, what does not, and what comes through late."""

from __future__ import annotations

from typing import Any

import pytest

from llama_corral.abc import Coordinator
from llama_corral.exceptions import Unavailable
from llama_corral.protocol.records import Checkpoint, InboxPage, Report, ReportAnswer, ServiceInfo, Ticket
from llama_corral.testing import FaultyCoordinator
from llama_corral.testing.coordinator_faults import CALLS

pytestmark = [pytest.mark.anyio]


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


class Recorder:
    """Answers everything and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return InboxPage("ok") if name == "pull" else ReportAnswer("ok", len(self.calls))

        return call

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


@pytest.fixture
def inner() -> Recorder:
    return Recorder()


@pytest.fixture
def line(inner: Any) -> FaultyCoordinator:
    return FaultyCoordinator(inner)


def report(seq: int = 1) -> Report:
    return Report("t", 1, seq, 1.0)


async def test_every_call_goes_through_as_it_is(line, inner):
    checkpoint = Checkpoint("{}", 0)
    await line.register(ServiceInfo("{}", "svc", "i", 1))
    await line.claim(Ticket("t", "svc"), "i", "n")
    await line.report(report())
    await line.release("t", 1, checkpoint, idle=True, wake_at=7.0)
    await line.heartbeat("i", ())
    await line.pull("t", 1, 3)
    await line.deregister("i")
    seam = {name for name in vars(Coordinator) if not name.startswith("_")}
    assert set(inner.names()) == seam
    assert seam - set(CALLS) == {"register", "deregister"}
    assert inner.calls[3] == ("release", ("t", 1, checkpoint), {"idle": True, "wake_at": 7.0})
    assert line.fault_statistics() == {}


async def test_an_answer_is_lost_and_a_call_is_lost(line, inner):
    line.lose_answer("report")
    line.refuse("claim", nth=2, times=2)
    with pytest.raises(Unavailable):
        await line.report(report())
    assert (await line.report(report())).status == "ok"
    for times in range(4):
        if times in (1, 2):
            with pytest.raises(Unavailable):
                await line.claim(Ticket("t", "svc"), "i", "n")
        else:
            await line.claim(Ticket("t", "svc"), "i", "n")
    assert inner.names() == ["report"] * 2 + ["claim"] * 2
    assert line.fault_statistics() == {"lose_answer report": 1, "refuse claim": 2}


async def test_a_call_is_delivered_twice_and_another_late(line, inner):
    line.duplicate("release")
    assert (await line.release("t", 1, None)).next_index == 2
    line.delay()
    with pytest.raises(Unavailable):
        await line.report(report(1))
    await line.report(report(2))
    assert [answer.status for answer in await line.deliver_held()] == ["ok"]
    assert [args[0].seq for name, args, _ in inner.calls if name == "report"] == [2, 1]


async def test_a_fault_without_a_name_spares_the_registration(line, inner):
    line.refuse(times=float("inf"))
    await line.register(ServiceInfo("{}", "svc", "i", 1))
    await line.deregister("i")
    with pytest.raises(Unavailable):
        await line.pull("t", 1, 0)
    line.heal()
    await line.pull("t", 1, 0)
    assert inner.names() == ["register", "deregister", "pull"]


async def test_a_stopped_fault_strikes_no_more(line):
    fault = line.refuse("pull", times=5)
    with pytest.raises(Unavailable):
        await line.pull("t", 1, 0)
    fault.stop()
    await line.pull("t", 1, 0)
    assert fault.applied == 1
