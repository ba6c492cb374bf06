"""hello, counter, form and workloads."""

from __future__ import annotations

import json

import pytest
from workflows import Context
from workflows.errors import WorkflowRuntimeError

from llama_corral.examples.counter import counter
from llama_corral.examples.form import Question, form
from llama_corral.examples.hello import hello
from llama_corral.examples.workloads import Tick, Waiting, workload

pytestmark = pytest.mark.anyio


async def test_hello_greets_the_world_or_whom_it_is_told(run_example):
    assert (await run_example(hello)).result == "Hello, world!"
    assert (await run_example(hello, name="Trio")).result == "Hello, Trio!"


async def test_hello_refuses_what_is_no_name(run_example):
    with pytest.raises(WorkflowRuntimeError, match="name"):
        await run_example(hello, name=["not", "a", "name"])


async def test_the_counter_remembers_within_a_session_only(run_example):
    session = Context(counter)
    first = (await run_example(counter, context=session)).result
    # What is between two runs of a service is JSON.
    session = Context.from_dict(counter, json.loads(json.dumps(session.to_dict())))
    second = (await run_example(counter, context=session, by=5)).result
    other = (await run_example(counter, by=-2)).result

    assert (first.count, first.history) == (1, [1])
    assert (second.count, second.history) == (6, [1, 5])
    assert (other.count, other.history) == (-2, [-2])
    assert second.model_dump(mode="json") == {"count": 6, "history": [1, 5]}
    assert str(second) == "6"


async def test_the_counters_history_is_bounded(run_example, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llama_corral.examples.counter.HISTORY", 2)
    session = Context(counter)
    for by in (1, 2, 3):
        counted = (await run_example(counter, context=session, by=by)).result
    assert (counted.count, counted.history) == (6, [2, 3])


async def test_the_form_asks_for_one_field_after_the_other(run_example):
    outcome = await run_example(form, answers=["Ada", "12", "yes"])
    assert [question.field for question in outcome.of(Question)] == ["name", "quantity", "confirmed"]
    assert outcome.of(Question)[-1].prefix == "Order 12 x llama for Ada?"
    assert outcome.result.model_dump(mode="json") == {
        "item": "llama",
        "name": "Ada",
        "quantity": 12,
        "confirmed": True,
    }
    assert str(outcome.result) == "12 x llama for Ada (confirmed)"


async def test_the_form_asks_again_and_says_why(run_example):
    outcome = await run_example(
        form, item="alpaca", answers=["  ", "Ada", "many", "0", "00000000100000", "²", "3", "perhaps", "NO"]
    )
    asked = [(question.field, question.problem is not None) for question in outcome.of(Question)]
    assert asked == [
        ("name", False),
        ("name", True),
        ("quantity", False),
        *[("quantity", True)] * 4,
        ("confirmed", False),
        ("confirmed", True),
    ]
    assert "'many' is not a whole number" in (outcome.of(Question)[3].problem or "")
    assert (outcome.result.item, outcome.result.quantity, outcome.result.confirmed) == ("alpaca", 3, False)


async def test_a_workload_does_what_it_is_told_in_its_order(run_example):
    outcome = await run_example(workload, waits=2, events=3, payload=10, sleep_ms=1, cpu_ms=2, answers=["", ""])
    kinds = [type(event) for event in outcome.events if isinstance(event, Waiting | Tick)]
    assert kinds == [Waiting, Waiting, Tick, Tick, Tick]
    assert [tick.number for tick in outcome.of(Tick)] == [1, 2, 3]
    assert outcome.of(Tick)[0].payload == "x" * 10
    assert (outcome.result.waits, outcome.result.events, outcome.result.sleep_ms) == (2, 3, 1)
    assert outcome.result.cpu_ms >= 2


async def test_a_workload_without_a_load_does_nothing(run_example):
    outcome = await run_example(workload)
    assert outcome.result.model_dump(mode="json") == {"waits": 0, "events": 0, "sleep_ms": 0, "cpu_ms": 0}
    assert outcome.of(Tick) == []
