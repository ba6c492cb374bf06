"""The sync parts by themselves."""

from __future__ import annotations

import math

import pytest

from llama_corral.runtime.timers import Timers
from llama_corral.runtime.upstream import TickWakeup


def wakeup(due: float) -> TickWakeup:
    return TickWakeup(due=due)


def test_timers_are_due_in_order():
    timers = Timers()
    assert timers.next_at() == math.inf
    for at in (3.0, 1.0, 2.0, 2.0):
        timers.schedule(at, wakeup(at))
    assert timers.next_at() == 1.0
    assert [tick.due for tick in timers.take_due(2.0)] == [1.0, 2.0, 2.0]
    assert len(timers) == 1
    assert timers.take_due(2.5) == []


def test_timers_with_a_key_replace_each_other():
    timers = Timers()
    timers.schedule(1.0, wakeup(1), key="a")
    timers.schedule(5.0, wakeup(5), key="a")
    timers.schedule(3.0, wakeup(3), key="b")
    assert len(timers) == 2
    assert timers.next_at() == 3.0
    timers.discard("b")
    timers.discard("b")
    assert [tick.due for tick in timers.take_due(10)] == [5]
    assert len(timers) == 0
    timers.discard("a")
    assert len(timers) == 0


@pytest.mark.promise("P12")
def test_discarded_timers_do_not_pile_up():
    timers = Timers()
    for n in range(10_000):
        timers.schedule(1e6 + n, wakeup(n), key="same")
    assert len(timers) == 1
    assert len(timers._heap) < 40
    assert [tick.due for tick in timers.take_due(1e9)] == [9999]
