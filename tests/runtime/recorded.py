"""The reducer by itself: fed with one tick after another, as a run would, and asked for commands."""

from __future__ import annotations

from workflows import Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from llama_corral.runtime import upstream as up


class Item(Event):
    n: int = 0


class Done(Event):
    n: int = 0


class Chain(Workflow):
    @step
    async def first(self, ev: StartEvent) -> Item:
        return Item()

    @step(num_workers=1)
    async def second(self, ev: Item) -> StopEvent:
        return StopEvent()


class Recorded:
    """A broker's state and what was started on it.

    Args:
        workflow: Whose run it is.
        kept: Makes the state that is reduced of a fresh or restored one: the runtime reduces in place, upstream copies.
        state: The state to go on with.
    """

    def __init__(self, workflow, kept, state=None):
        up.validate_workflow(workflow)
        self.workflow = workflow
        self.kept = kept
        self.state = kept(state if state is not None else up.BrokerState.from_workflow(workflow))
        self.started: list[up.CommandRunWorker] = []
        self.queued: list[up.CommandQueueEvent] = []

    def __call__(self, tick, now=1.0):
        self.state, commands = up.reduce_tick(up.stamped(tick, now), self.state, now, run_id="recorded")
        self.started += [command for command in commands if isinstance(command, up.CommandRunWorker)]
        self.queued += [command for command in commands if isinstance(command, up.CommandQueueEvent)]
        if self.state.deliveries:
            # 2.26.0 asks for an idle check also while an event is on its way. A run looks when nothing is any more.
            commands = [command for command in commands if not isinstance(command, up.CommandScheduleIdleCheck)]
        return commands

    def begin(self, now=1.0):
        assert kinds(self(up.TickSessionStart(), now)) == []
        assert kinds(self(up.TickAddEvent(event=up.StartEvent()), now)) == ["RunWorker", "StepStateChanged"]
        return self

    def deliver(self, command=None, now=1.0):
        """Queue what a command asks to be queued: by default what was asked for first and is not queued yet."""
        command = command if command is not None else self.queued.pop(0)
        return self(
            up.TickAddEvent(
                event=command.event,
                step_id=command.step_id,
                recovery_counts=command.recovery_counts,
                scope_path=command.scope_path,
                emission=command.emission,
            ),
            now,
        )

    def ended(self, *results, of=-1, now=2.0, sends=()):
        """A step call has ended: by default the one that was started last."""
        command = self.started[of]
        return self(
            up.TickStepResult(
                step_id=command.step_id,
                worker_id=command.id,
                event=command.event,
                result=list(results),
                invocation_id=command.invocation_id,
                sends=list(sends),
            ),
            now,
        )

    def worker(self, name):
        return self.state.workers[up.StepId.root(name)]

    def call_of(self, command):
        """The state's record of a step call."""
        found = self.state.workers[command.step_id].in_progress
        return next(call for call in found if call.invocation_id == command.invocation_id)

    def resumed(self):
        """The same run elsewhere: its state through a snapshot, before its session begins."""
        serializer = up.workflow_serializer(self.workflow)
        snapshot = up.SerializedContext.model_validate_json(self.state.to_serialized(serializer).model_dump_json())
        state = up.BrokerState.from_serialized(snapshot, self.workflow, serializer)
        return Recorded(self.workflow, self.kept, state)


def kinds(commands):
    """What the commands are, those that publish as what they publish."""
    return [
        type(command.event if isinstance(command, up.CommandPublishEvent) else command).__name__.removeprefix("Command")
        for command in commands
    ]


def returned(event=None):
    return up.StepWorkerResult(result=event)


def fanned_out(*events):
    """What a step that returned a list says."""
    return [up.StepWorkerResult(result=event, fanned_out=True) for event in events or (None,)]


def failed(exception, *, again_after=None, at=2.0):
    return up.StepWorkerFailed(
        exception=exception,
        failed_at=at,
        retry_decision=up.RetryDecision(delay=again_after),
        first_attempt_at=1.0,
    )
