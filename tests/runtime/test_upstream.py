"""The contract with upstream: what `runtime/upstream.py` relies on is what the runtime was written against.

If a test here fails after an upgrade of llama-index-workflows, the message names what moved. Compare it with the
runtime, adapt `runtime/upstream.py`, and write the new signature down here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent, UnhandledEvent, WorkflowIdleEvent

import llama_corral.runtime
from llama_corral.runtime import upstream as up

SOURCE = Path(up.__file__)


def imported_names() -> list[tuple[str, str]]:
    tree = ast.parse(SOURCE.read_text())
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("workflows")
        for alias in node.names
    ]


@pytest.mark.parametrize(("module", "name"), imported_names())
def test_every_name_is_there(module, name):
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(f"upstream moved the module {module!r}, from which {name!r} was taken")
    assert hasattr(found, name), f"upstream moved {name!r}: it is not in {module!r} any more"


def test_nobody_else_in_the_runtime_touches_upstream():
    for path in Path(llama_corral.runtime.__file__).parent.glob("*.py"):
        if path != SOURCE:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith("workflows"), f"{path.name} imports {node.module}"


PARAMETERS = {
    "reduce_tick": (up.reduce_tick, ["tick", "init", "now_seconds", "run_id"]),
    "decide_retry_delay": (
        up.decide_retry_delay,
        ["policy", "elapsed_time", "failures", "exception", "run_id", "step_name"],
    ),
    "event_matches": (up.event_matches, ["event", "accepted", "allow_subclasses"]),
    "step_accepts_event": (up.step_accepts_event, ["event", "accepted_events", "allow_subclasses"]),
    "infer_state_type": (up.infer_state_type, ["workflow"]),
    "is_durable_serialized_state": (up.is_durable_serialized_state, ["data"]),
    "PreContext": (up.PreContext.__init__, ["self", "workflow", "previous_context", "serializer"]),
    "InternalContext": (up.InternalContext.__init__, ["self", "internal_adapter", "workflow"]),
    "InternalContext.send_event": (up.InternalContext.send_event, ["self", "message", "step"]),
    "InternalContext._execute_task": (up.InternalContext._execute_task, ["self", "coro"]),
    "InternalContext._get_step_ctx": (up.InternalContext._get_step_ctx, ["fn"]),
    "ExternalContext": (up.ExternalContext.__init__, ["self", "workflow", "external_adapter", "serializer"]),
    "ExternalContext._execute_task": (up.ExternalContext._execute_task, ["self", "coro"]),
    "InMemoryStateStore": (up.InMemoryStateStore.__init__, ["self", "initial_state"]),
    "InMemoryStateStore.from_dict": (up.InMemoryStateStore.from_dict, ["serialized_state", "serializer"]),
    "Context._create_face": (up.Context._create_face, ["face"]),
    "BrokerState.from_workflow": (up.BrokerState.from_workflow, ["workflow"]),
    "BrokerState.from_serialized": (up.BrokerState.from_serialized, ["serialized", "workflow", "serializer"]),
    "BrokerState.rehydrate_with_ticks": (up.BrokerState.rehydrate_with_ticks, ["self"]),
    "StepId.root": (up.StepId.root, ["name"]),
    "Workflow._get_start_event_instance": (
        up.Workflow._get_start_event_instance,
        ["self", "start_event", "kwargs"],
    ),
    "Workflow._get_steps": (up.Workflow._get_steps, ["self"]),
    "Workflow._validate_valid_step_message": (
        up.Workflow._validate_valid_step_message,
        ["self", "step", "message"],
    ),
    "StepWorkerContext.record_send": (
        up.StepWorkerContext.record_send,
        ["self", "event", "step_id", "recovery_counts"],
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_callables_take_what_we_give(name):
    function, expected = PARAMETERS[name]
    actual = list(inspect.signature(function).parameters)
    assert actual == expected, f"upstream changed the parameters of {name}: {actual}, written against {expected}"


FIELDS = {
    up.TickAddEvent: {
        "event",
        "step_id",
        "origin_namespace",
        "recovery_counts",
        "scope_path",
        "emission",
        "stamped_at",
        "work_item_id",
    },
    up.TickStepResult: {
        *("step_id", "worker_id", "invocation_namespace", "event", "result"),
        *("stamped_at", "invocation_id", "sends"),
    },
    up.TickTimeout: {"timeout", "stamped_at"},
    up.TickWaiterTimeout: {"step_id", "waiter_id", "invocation_namespace", "stamped_at"},
    up.TickWakeup: {"due", "stamped_at"},
    up.TickSessionStart: {"stamped_at"},
    up.StepWorkerResult: {"result", "fanned_out"},
    up.StepWorkerFailed: {"exception", "failed_at", "retry_decision", "first_attempt_at"},
    up.RetryDecision: {"delay"},
    up.AddWaiter: {"waiter_id", "event_type", "requirements", "timeout", "waiter_event"},
    up.DeleteWaiter: {"waiter_id"},
    up.SentEvent: {"index", "event", "step_id", "recovery_counts"},
    up.StepWorkerContext: {"event", "state", "returns", "retry", "sends"},
    up.RetryAttempt: {"retry_number", "first_attempt_at", "last_exception", "last_failed_at", "recovery_counts"},
    up.InProgressState: {
        *("event", "attempts", "first_attempt_at", "shared_state"),
        *("invocation_id", "recovery_counts", "work_item_id"),
    },
    up.StepWorkerWaiter: {
        *("waiter_id", "waiting_for_event", "requirements", "has_requirements"),
        *("resolved_event", "timed_out", "work_item_id"),
    },
    up.BrokerState: {"workers", "config", "is_running", "children", "elapsed_alive"},
    up.CommandRunWorker: {"step_id", "event", "id", "invocation_id", "invocation_namespace", "bound_events"},
    up.CommandQueueEvent: {"event", "step_id", "origin_namespace", "recovery_counts", "scope_path", "emission"},
    up.CommandPublishEvent: {"event"},
    up.CommandCompleteRun: {"result"},
    up.CommandFailWorkflow: {"exception"},
    up.CommandHalt: {"exception"},
    up.CommandScheduleWaiterTimeout: {"step_id", "waiter_id", "timeout", "invocation_namespace"},
    up.CommandScheduleTimeout: {"timeout", "at_time"},
    up.CommandScheduleWakeup: {"at_time"},
    up.StepConfig: {
        *("accepted_events", "event_name", "context_parameter", "resources", "num_workers", "retry_policy"),
        *("collection_param", "bare_return_types", "accept_event_subclasses"),
    },
    up.UnhandledEvent: {"event_type", "qualified_name", "step_name", "idle"},
    up.RetryInfo: {"retry_number", "elapsed_seconds", "last_exception", "last_failed_at"},
}


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_data_has_the_fields_we_use(cls):
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    actual = {field.name for field in fields} or set(cls.model_fields)
    missing = FIELDS[cls] - actual
    assert not missing, f"upstream moved fields of {cls.__name__}: {sorted(missing)} are gone"


def test_the_runtime_knows_every_command_and_every_stamped_tick():
    from workflows.runtime.types import commands, ticks

    known = {name for _, name in imported_names()}
    there = {name for name in vars(commands) if name.startswith("Command")}
    assert there <= known, f"upstream added commands: {sorted(there - known)}"
    unstamped = {up.TickCancelRun, up.TickIdleCheck}
    stamped = set(up.STAMPED_TICK_TYPES)
    mine = {
        up.TickSessionStart,
        up.TickAddEvent,
        up.TickStepResult,
        up.TickTimeout,
        up.TickWaiterTimeout,
        up.TickWakeup,
    }
    assert mine == stamped, f"upstream changed STAMPED_TICK_TYPES: {sorted(t.__name__ for t in mine ^ stamped)}"
    assert not unstamped & stamped
    assert ticks.WorkflowTick is not None


class Item(Event):
    n: int = 0


class Sample(Workflow):
    @step
    async def first(self, ev: StartEvent) -> Item:
        return Item()

    @step
    async def second(self, ctx: Context, ev: Item) -> StopEvent:
        return StopEvent()


def test_private_attributes_of_a_workflow():
    workflow = Sample(timeout=3)
    assert set(up.step_functions(workflow)) == {"first", "second"}
    assert up.workflow_timeout(workflow) == 3
    assert up.workflow_resources(workflow) == {}
    assert up.step_version(workflow) == 0
    assert isinstance(up.start_event_of(workflow, None, {"a": 1}), StartEvent)
    config = up.step_config(up.step_functions(workflow)["second"])
    assert (config.event_name, config.context_parameter) == ("ev", "ctx")


class Recorded:
    """The reducer, fed with one tick after another."""

    def __init__(self):
        self.state = up.BrokerState.from_workflow(Sample())
        self.started: list[up.CommandRunWorker] = []

    def __call__(self, tick, now=1.0):
        self.state, commands = up.reduce_tick(up.stamped(tick, now), self.state, now, run_id="recorded")
        self.started += [command for command in commands if isinstance(command, up.CommandRunWorker)]
        return commands

    def result(self, *results, now=2.0, sends=()):
        command = self.started[-1]
        return self(
            up.TickStepResult(
                step_id=command.step_id,
                worker_id=command.id,
                event=command.event,
                result=list(results),
                stamped_at=now,
                invocation_id=command.invocation_id,
                sends=list(sends),
            )
        )


def kinds(commands):
    shown = []
    for command in commands:
        name = type(command).__name__.removeprefix("Command")
        if isinstance(command, up.CommandPublishEvent):
            name += f"({type(command.event).__name__})"
        shown.append(name)
    return shown


def started() -> Recorded:
    recorded = Recorded()
    assert kinds(recorded(up.TickSessionStart())) == []
    commands = recorded(up.TickAddEvent(event=StartEvent()))
    assert kinds(commands) == ["RunWorker", "PublishEvent(StepStateChanged)"]
    return recorded


def test_recorded_a_run_to_its_end():
    recorded = started()
    assert recorded.state.is_running
    commands = recorded.result(up.StepWorkerResult(result=Item(n=1)))
    assert kinds(commands) == ["PublishEvent(StepStateChanged)", "QueueEvent"]
    queued = commands[-1]
    commands = recorded(up.TickAddEvent(event=queued.event, emission=queued.emission))
    assert kinds(commands) == ["RunWorker", "PublishEvent(StepStateChanged)"]
    assert recorded(up.TickAddEvent(event=queued.event, emission=queued.emission)) == []  # delivered once
    commands = recorded.result(up.StepWorkerResult(result=StopEvent(result=1)))
    assert kinds(commands) == ["PublishEvent(StepStateChanged)", "PublishEvent(StopEvent)", "CompleteRun"]
    assert not recorded.state.is_running


def test_recorded_a_waiter_and_its_timeout():
    recorded = started()
    waiter = up.AddWaiter(waiter_id="w", event_type=HumanResponseEvent, timeout=9.0)
    commands = recorded.result(waiter)
    assert kinds(commands) == ["PublishEvent(StepStateChanged)", "ScheduleWaiterTimeout", "ScheduleIdleCheck"]
    assert kinds(recorded(up.TickIdleCheck())) == [f"PublishEvent({WorkflowIdleEvent.__name__})"]
    assert kinds(recorded(up.TickAddEvent(event=Event()))) == [
        f"PublishEvent({UnhandledEvent.__name__})",
        "ScheduleIdleCheck",
    ]
    scheduled = up.TickWaiterTimeout(step_id=up.StepId.root("first"), waiter_id="w")
    assert kinds(recorded(scheduled, now=11.0)) == ["RunWorker", "PublishEvent(StepStateChanged)"]
    assert recorded.started[-1].event == recorded.started[0].event


def test_recorded_a_waiter_gets_its_event():
    recorded = started()
    recorded.result(up.AddWaiter(waiter_id="w", event_type=HumanResponseEvent))
    commands = recorded(up.TickAddEvent(event=HumanResponseEvent(response="yes")))
    assert kinds(commands) == ["RunWorker", "PublishEvent(StepStateChanged)"]
    waiters = recorded.state.workers[up.StepId.root("first")].collected_waiters
    assert [waiter.resolved_event.response for waiter in waiters] == ["yes"]


def test_recorded_a_retry():
    recorded = started()
    failed = up.StepWorkerFailed(
        exception=ConnectionError(), failed_at=2.0, retry_decision=up.RetryDecision(delay=5.0), first_attempt_at=1.0
    )
    commands = recorded.result(failed)
    assert kinds(commands) == ["ScheduleWakeup", "PublishEvent(StepStateChanged)"] or kinds(commands) == [
        "PublishEvent(StepStateChanged)",
        "ScheduleWakeup",
    ]
    wakeup = next(command for command in commands if isinstance(command, up.CommandScheduleWakeup))
    assert wakeup.at_time == 7.0
    assert kinds(recorded(up.TickWakeup(due=7.0), now=7.0)) == ["RunWorker", "PublishEvent(StepStateChanged)"]


def test_recorded_a_failure_a_cancellation_and_a_timeout():
    recorded = started()
    failed = up.StepWorkerFailed(
        exception=LookupError(), failed_at=2.0, retry_decision=up.RetryDecision(delay=None), first_attempt_at=1.0
    )
    commands = recorded.result(failed)
    assert kinds(commands)[1:] == ["PublishEvent(WorkflowFailedEvent)", "FailWorkflow"]
    commands = started()(up.TickCancelRun())
    assert kinds(commands)[:2] == ["PublishEvent(WorkflowCancelledEvent)", "Halt"]
    commands = started()(up.TickTimeout(timeout=10.0), now=12.0)
    assert kinds(commands)[:2] == ["PublishEvent(WorkflowTimedOutEvent)", "Halt"]
    early = started()(up.TickTimeout(timeout=10.0), now=5.0)
    assert [command.at_time for command in early if isinstance(command, up.CommandScheduleTimeout)] == [11.0]
