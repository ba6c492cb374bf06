"""The contract with upstream, second half: what the reducer makes of recorded ticks.

The expectations are written by hand from what the runtime was written against: what a run may count on after each tick.
Each recording is reduced twice: with upstream's state, which it copies at each tick, and with ours, which stays in place.
Streams and resuming have files of their own.
"""

from __future__ import annotations

from workflows import Workflow, catch_error, step
from workflows.events import HumanResponseEvent, InputRequiredEvent, StartEvent, StepFailedEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed, wait_random

from llama_corral.runtime import upstream as up

from .recorded import Done, Item, Recorded, failed, kinds, returned

# A run to its end


def test_a_run_to_its_end(chain):
    assert chain.state.is_running
    assert kinds(chain.ended(returned(Item(n=1)))) == ["StepStateChanged", "QueueEvent"]
    assert kinds(chain.deliver()) == ["RunWorker", "StepStateChanged"]
    assert chain.started[-1].event == Item(n=1)
    commands = chain.ended(returned(StopEvent(result=1)))
    assert kinds(commands) == ["StepStateChanged", "StopEvent", "CompleteRun"]
    assert commands[-1].result.result == 1
    assert not chain.state.is_running


def test_a_step_that_is_busy_takes_its_next_event_when_it_has_ended(chain):
    chain.ended(returned(Item(n=1)))
    chain.deliver()
    assert kinds(chain(up.TickAddEvent(event=Item(n=2)))) == ["StepStateChanged"]
    assert [attempt.event.n for attempt in chain.worker("second").queue] == [2]
    assert kinds(chain.ended(returned())) == ["StepStateChanged", "RunWorker", "StepStateChanged"]
    assert chain.started[-1].event == Item(n=2)
    assert kinds(chain.ended(returned())) == ["StepStateChanged", "ScheduleIdleCheck"]


def test_an_event_goes_to_the_step_it_is_for_and_an_untaken_one_is_reported(chain):
    for_nobody = up.TickAddEvent(event=Item(), step_id=up.StepId.root("first"))
    commands = chain(for_nobody)
    assert kinds(commands) == ["UnhandledEvent"]
    assert (commands[0].event.event_type, commands[0].event.step_name) == ("Item", "first")
    assert kinds(chain(up.TickAddEvent(event=Item(), step_id=up.StepId.root("second")))) == [
        "RunWorker",
        "StepStateChanged",
    ]


def test_a_question_is_published_and_nobody_has_to_take_it(chain):
    commands = chain.ended(returned(InputRequiredEvent(prefix="?")))
    assert kinds(commands) == ["StepStateChanged", "InputRequiredEvent", "QueueEvent"]
    assert kinds(chain.deliver()) == ["ScheduleIdleCheck"]
    assert kinds(chain(up.TickIdleCheck())) == ["WorkflowIdleEvent"]


def test_every_call_has_an_id_of_its_own(chain):
    chain.ended(returned(Item()))
    chain.deliver()
    chain(up.TickAddEvent(event=StartEvent()))
    assert len({command.invocation_id for command in chain.started}) == 3
    assert [chain.call_of(command).shared_state.step_name for command in chain.started[1:]] == ["second", "first"]


# Waiting


def test_a_waiter_and_its_timeout(chain):
    commands = chain.ended(up.AddWaiter(waiter_id="w", event_type=HumanResponseEvent, timeout=9.0))
    assert kinds(commands) == ["StepStateChanged", "ScheduleWaiterTimeout", "ScheduleIdleCheck"]
    assert (commands[1].waiter_id, commands[1].timeout) == ("w", 9.0)
    assert kinds(chain(up.TickIdleCheck())) == ["WorkflowIdleEvent"]
    assert kinds(chain(up.TickAddEvent(event=Done()))) == ["UnhandledEvent", "ScheduleIdleCheck"]
    due = up.TickWaiterTimeout(step_id=up.StepId.root("first"), waiter_id="w")
    assert kinds(chain(due, now=11.0)) == ["RunWorker", "StepStateChanged"]
    assert chain.started[-1].event == chain.started[0].event
    assert [waiter.timed_out for waiter in chain.worker("first").collected_waiters] == [True]


def test_a_waiter_gets_its_event(chain):
    question = InputRequiredEvent(prefix="?")
    waiter = up.AddWaiter(
        waiter_id="w", event_type=HumanResponseEvent, waiter_event=question, requirements={"user": "a"}
    )
    assert kinds(chain.ended(waiter)) == ["StepStateChanged", "InputRequiredEvent", "ScheduleIdleCheck"]
    other = up.TickAddEvent(event=HumanResponseEvent(response="no", user="b"))
    assert kinds(chain(other)) == ["UnhandledEvent", "ScheduleIdleCheck"]
    mine = up.TickAddEvent(event=HumanResponseEvent(response="yes", user="a"))
    assert kinds(chain(mine)) == ["RunWorker", "StepStateChanged"]
    (shown,) = chain.call_of(chain.started[-1]).shared_state.collected_waiters
    assert shown.resolved_event.response == "yes"
    assert kinds(chain.ended(returned(Item()), up.DeleteWaiter(waiter_id="w"))) == ["StepStateChanged", "QueueEvent"]
    assert chain.worker("first").collected_waiters == []


def test_a_step_that_failed_keeps_the_answer_for_its_next_attempt(chain):
    chain.ended(up.AddWaiter(waiter_id="w", event_type=HumanResponseEvent))
    chain(up.TickAddEvent(event=HumanResponseEvent(response="yes")))
    chain.ended(up.DeleteWaiter(waiter_id="w"), failed(ConnectionError(), again_after=0.0))
    (shown,) = chain.call_of(chain.started[-1]).shared_state.collected_waiters
    assert shown.resolved_event.response == "yes"


# Failing


def test_a_retry(chain):
    commands = chain.ended(failed(ConnectionError("away"), again_after=5.0))
    assert kinds(commands) == ["StepStateChanged", "ScheduleWakeup"]
    assert commands[1].at_time == 7.0
    assert kinds(chain(up.TickWakeup(due=6.0), now=6.0)) == []
    assert kinds(chain(up.TickIdleCheck())) == []  # who waits for its next attempt is not idle
    assert kinds(chain(up.TickWakeup(due=7.0), now=7.0)) == ["RunWorker", "StepStateChanged"]
    call = chain.call_of(chain.started[-1])
    assert (call.attempts, call.first_attempt_at, call.last_failed_at) == (1, 1.0, 2.0)
    assert str(call.last_exception) == "away"


def test_a_failure(chain):
    commands = chain.ended(failed(LookupError("gone")))
    assert kinds(commands) == ["StepStateChanged", "WorkflowFailedEvent", "FailWorkflow"]
    assert str(commands[-1].exception) == "gone"
    assert not chain.state.is_running


def test_a_cancellation_leaves_a_run_that_can_go_on(chain):
    commands = chain(up.TickCancelRun())
    assert kinds(commands) == ["WorkflowCancelledEvent", "Halt"]
    assert isinstance(commands[-1].exception, up.WorkflowCancelledByUser)
    assert chain.state.is_running


def test_a_timeout_counts_from_the_start_of_the_session(chain):
    early = chain(up.TickTimeout(timeout=10.0), now=5.0)
    assert kinds(early) == ["ScheduleTimeout"]
    assert early[0].at_time == 11.0
    late = chain(up.TickTimeout(timeout=10.0), now=11.0)
    assert kinds(late) == ["WorkflowTimedOutEvent", "Halt"]
    assert late[0].event.active_steps == ["first"]
    assert isinstance(late[1].exception, up.WorkflowTimeoutError)


def decide(policy, failures, run_id="r"):
    return up.decide_retry_delay(
        policy, elapsed_time=1.0, failures=failures, exception=ValueError(), run_id=run_id, step_name="first"
    )


def test_the_policy_decides_and_its_jitter_is_the_runs():
    assert decide(None, 1) is None
    twice = retry_policy(wait=wait_fixed(5), stop=stop_after_attempt(3))
    assert [decide(twice, failures) for failures in (1, 2, 3)] == [5, 5, None]
    jitter = retry_policy(wait=wait_random(0, 1000), stop=stop_after_attempt(3))
    assert decide(jitter, 1) == decide(jitter, 1) != decide(jitter, 1, run_id="other")


# Errors that a step of the workflow takes


class Careful(Workflow):
    @step
    async def first(self, ev: StartEvent) -> Item:
        return Item()

    @step
    async def second(self, ev: Item) -> StopEvent:
        raise NotImplementedError

    @catch_error(for_steps=["second"], max_recoveries=1)
    async def rescue(self, ev: StepFailedEvent) -> Item | StopEvent:
        return Item()


def test_an_error_goes_to_its_handler_as_often_as_it_is_allowed_to(kept):
    careful = Recorded(Careful(), kept).begin()
    careful.ended(returned(Item(n=1)))
    careful.deliver()
    assert kinds(careful.ended(failed(LookupError("once")))) == ["StepStateChanged", "QueueEvent"]
    (told,) = careful.queued
    assert (str(told.step_id), told.recovery_counts) == ("rescue", {"rescue": 1})
    assert (told.event.step_name, str(told.event.exception), told.event.attempts) == ("second", "once", 1)
    assert told.event.input_event == Item(n=1)

    assert kinds(careful.deliver()) == ["RunWorker", "StepStateChanged"]
    assert str(careful.started[-1].step_id) == "rescue"
    assert kinds(careful.ended(returned(Item(n=2)))) == ["StepStateChanged", "QueueEvent"]
    assert careful.queued[0].recovery_counts == {"rescue": 1}  # what comes of the rescue counts with it
    assert kinds(careful.deliver()) == ["RunWorker", "StepStateChanged"]
    assert careful.call_of(careful.started[-1]).recovery_counts == {"rescue": 1}
    assert kinds(careful.ended(failed(LookupError("twice")))) == [
        "StepStateChanged",
        "WorkflowFailedEvent",
        "FailWorkflow",
    ]


def test_the_error_of_a_handler_and_of_a_step_without_one_end_the_run(kept):
    careful = Recorded(Careful(), kept).begin()
    assert kinds(careful.ended(failed(LookupError())))[-1] == "FailWorkflow"
    careful = Recorded(Careful(), kept).begin()
    careful.ended(returned(Item()))
    careful.deliver()
    careful.ended(failed(LookupError()))
    careful.deliver()
    commands = careful.ended(failed(KeyError("in the handler")))
    assert kinds(commands) == ["StepStateChanged", "WorkflowFailedEvent", "FailWorkflow"]
    assert isinstance(commands[-1].exception, KeyError)
