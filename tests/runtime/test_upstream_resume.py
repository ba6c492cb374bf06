"""The contract with upstream: what the reducer makes of recorded ticks after a snapshot was resumed.

By hand, as in `test_upstream_ticks.py`. That no event is lost here is why 2.26.0 is the oldest version: 2.25 has neither
deliveries nor the keys by which one that comes twice is known.
"""

from __future__ import annotations

from workflows.events import HumanResponseEvent, StartEvent, StopEvent

from llama_corral.runtime import upstream as up

from .recorded import Done, Item, failed, kinds, returned


def test_nothing_is_done_again_where_nothing_was_under_way(chain):
    chain.ended(up.AddWaiter(waiter_id="w", event_type=HumanResponseEvent))
    again = chain.resumed()
    assert again.state.is_running
    assert again.state.rehydrate_with_ticks() == []
    assert kinds(again(up.TickSessionStart(), now=50.0)) == []
    answer = up.TickAddEvent(event=HumanResponseEvent(response="yes"))
    assert kinds(again(answer, now=51.0)) == ["RunWorker", "StepStateChanged"]


def test_a_waiter_with_requirements_asks_its_step_for_them(chain):
    chain.ended(up.AddWaiter(waiter_id="w", event_type=HumanResponseEvent, requirements={"user": "a"}))
    again = chain.resumed()
    (waiter,) = again.worker("first").collected_waiters
    assert (waiter.has_requirements, waiter.requirements) == (True, {})
    (asking,) = again.state.rehydrate_with_ticks()
    assert (str(asking.step_id), asking.event) == ("first", chain.started[0].event)
    again(up.TickSessionStart(), now=50.0)
    assert kinds(again(asking, now=50.0)) == ["RunWorker", "StepStateChanged"]


def test_a_call_that_was_under_way_starts_again_as_another(chain):
    chain.ended(failed(ConnectionError(), again_after=0.0))
    again = chain.resumed()
    assert kinds(again(up.TickSessionStart(), now=50.0)) == ["RunWorker", "StepStateChanged"]
    assert again.started[0].invocation_id not in {command.invocation_id for command in chain.started}
    call = again.call_of(again.started[0])
    assert (call.attempts, call.first_attempt_at) == (1, 1.0)


def test_a_retry_that_waited_waits_on(chain):
    chain.ended(failed(ConnectionError(), again_after=5.0))
    commands = chain.resumed()(up.TickSessionStart(), now=50.0)
    assert kinds(commands) == ["ScheduleWakeup"]
    assert commands[0].at_time == 7.0


def test_a_returned_event_that_nobody_had_got_is_delivered_once(chain):
    chain.ended(returned(Item(n=1)))
    again = chain.resumed()
    assert kinds(again(up.TickSessionStart(), now=50.0)) == ["QueueEvent"]
    (command,) = again.queued
    assert (command.event, command.emission) == (Item(n=1), chain.queued[0].emission)
    assert kinds(again.deliver(command, now=50.0)) == ["RunWorker", "StepStateChanged"]
    assert kinds(again.deliver(command, now=50.0)) == []


def test_a_sent_event_that_nobody_had_got_is_delivered_once(chain):
    sent = up.SentEvent(index=0, event=Item(n=5), step_id=up.StepId.root("second"), recovery_counts={"x": 1})
    assert kinds(chain.ended(returned(), sends=[sent])) == ["StepStateChanged"]
    again = chain.resumed()
    assert kinds(again(up.TickSessionStart(), now=50.0)) == ["QueueEvent"]
    (command,) = again.queued
    assert (command.event, str(command.step_id), command.recovery_counts) == (Item(n=5), "second", {"x": 1})
    assert kinds(again.deliver(command, now=50.0)) == ["RunWorker", "StepStateChanged"]
    assert kinds(again.deliver(command, now=50.0)) == []


def test_a_sent_event_that_came_before_its_senders_result_is_not_delivered_again(chain):
    call = chain.call_of(chain.started[0])
    context = up.StepWorkerContext(event=StartEvent(), state=call.shared_state, returns=up.Returns(return_values=[]))
    emission = context.record_send(Item(n=5), None, {})
    tick = up.TickAddEvent(event=Item(n=5), emission=emission)
    assert kinds(chain(tick)) == ["RunWorker", "StepStateChanged"]
    assert kinds(chain(tick)) == []
    chain.ended(returned(Item(n=6)), of=0, sends=context.sends.entries)
    assert [command.emission.index for command in chain.queued] == [1]  # sends are counted first
    again = chain.resumed()
    commands = again(up.TickSessionStart(), now=50.0)
    assert kinds(commands) == ["RunWorker", "StepStateChanged", "QueueEvent"]
    assert (commands[0].event, commands[2].event) == (Item(n=5), Item(n=6))


def test_what_a_step_sends_after_its_end_has_no_key(chain):
    call = chain.call_of(chain.started[0])
    context = up.StepWorkerContext(event=StartEvent(), state=call.shared_state, returns=up.Returns(return_values=[]))
    context.sends.closed = True
    assert context.record_send(Item(), None, {}) is None
    assert context.sends.entries == []


def test_an_ending_leaves_nothing_to_deliver(chain):
    chain.ended(returned(Item(n=1)))
    chain(up.TickAddEvent(event=Item(n=2)))
    chain.ended(returned(StopEvent()))
    assert chain.state.deliveries == {}
    again = chain.resumed()
    assert not again.state.is_running
    assert kinds(again(up.TickSessionStart(), now=50.0)) == []


def test_the_time_between_sessions_does_not_count(chain):
    chain(up.TickAddEvent(event=Done()), now=5.0)
    again = chain.resumed()
    assert again.state.elapsed_alive == 4.0
    again(up.TickSessionStart(), now=1000.0)
    commands = again(up.TickTimeout(timeout=10.0), now=1003.0)
    assert kinds(commands) == ["ScheduleTimeout"]
    assert commands[0].at_time == 1006.0
