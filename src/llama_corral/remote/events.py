"""What comes from a remote run, as events, results and errors. No class is looked up by a name that comes from there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

from pydantic import Field, TypeAdapter, ValidationError
from workflows.context import JsonSerializer
from workflows.errors import WorkflowCancelledByUser, WorkflowTimeoutError
from workflows.events import (
    Event,
    HumanResponseEvent,
    InputRequiredEvent,
    StartEvent,
    StopEvent,
    WorkflowCancelledEvent,
    WorkflowFailedEvent,
    WorkflowTimedOutEvent,
)

from ..client import TaskEvent
from ..client.tasks import outcome
from ..exceptions import BadInput, TaskCancelled, TaskTimedOut
from ..protocol.messages import TaskResult

logger = logging.getLogger(__name__)

_ALWAYS_KNOWN: Final = (Event, HumanResponseEvent, InputRequiredEvent)
_ENDINGS: Final = frozenset(
    cls.__name__ for cls in (StopEvent, WorkflowFailedEvent, WorkflowCancelledEvent, WorkflowTimedOutEvent)
)


class RemoteEvent(Event):
    """An event of a remote run whose class is not known here: the name of the class, and the fields as JSON gives them.

    Sent to a remote run, it arrives there as an event of the class that it names.
    """

    name: str
    fields: dict[str, Any] = Field(default_factory=dict)


class RemoteCancelled(TaskCancelled, WorkflowCancelledByUser):
    """Somebody cancelled the remote run."""


class RemoteTimedOut(TaskTimedOut, WorkflowTimeoutError):
    """The remote run's time was over."""


class EventTypes:
    """The event classes that a user gave, and upstream's own. The wire has their bare names.

    Raises:
        BadInput: a class that is no event's, or two of one name.
    """

    def __init__(self, given: Iterable[type[Event]]) -> None:
        self._given = list(dict.fromkeys(given))
        self._misfits: set[type[Event]] = set()
        names: dict[str, type[Event]] = {}
        for cls in self._given:
            if not (isinstance(cls, type) and issubclass(cls, Event)):
                raise BadInput(f"not a class of events: {cls!r}")
            if cls.__name__ in names:
                raise BadInput(
                    f"two classes of events are called {cls.__name__}: {names[cls.__name__]!r} and {cls!r}",
                    hint="Give one of them; the other's events come as RemoteEvent.",
                )
            names[cls.__name__] = cls
        self._classes = {cls.__name__: cls for cls in _ALWAYS_KNOWN} | names
        self._serializer = JsonSerializer(allowed_types=self._classes.values())

    def reading(self) -> AbstractContextManager[None]:
        """A block in which fields that hold events, or exceptions, get them of these classes only: upstream's would look for
        any other name and import it."""
        return self._serializer.validation_context()

    def __iter__(self) -> Iterator[type[Event]]:
        return iter(self._given)

    def event_of(self, item: TaskEvent) -> Event:
        """The event as an object of its class, or a `RemoteEvent` where that is not known or refuses its fields. Upstream's
        stop events come without fields: the record of the task has what they say."""
        name = item.type.rpartition(".")[2]
        cls = self._classes.get(name)
        if cls is None:
            return StopEvent() if name in _ENDINGS else RemoteEvent(name=item.type, fields=item.data)
        try:
            with self.reading():
                return cls(**item.data)
        except Exception as error:  # ValidationError, and what validators of the user's let through
            if cls not in self._misfits:
                self._misfits.add(cls)
                logger.warning("events of the type %s do not fit %r: %s", item.type, cls, error)
            return StopEvent() if issubclass(cls, StopEvent) else RemoteEvent(name=item.type, fields=item.data)


def start_arguments(event: StartEvent) -> dict[str, Any]:
    """The fields of a start event, declared or not, as JSON.

    Raises:
        BadInput: one of them has no JSON form.
    """
    try:
        arguments = event.model_dump(mode="json")
    except Exception as error:  # whatever a user's serializer raises
        raise BadInput(f"{type(event).__name__} has no JSON form: {error}") from error
    more = arguments.pop("_data", {})
    return {**arguments, **more}


def ended_with(
    record: TaskResult, last: Event | None, types: EventTypes, result_type: TypeAdapter[Any] | None
) -> StopEvent:
    """The stop event of a remote run.

    Args:
        last: The last event of its stream.
        result_type: What the result is to be; None: as it comes.

    Raises:
        TaskFailed, RemoteCancelled, RemoteTimedOut: it ended so; the field `error` holds its record.
        BadInput: the result is not of `result_type`.
    """
    value = _value(record)
    if result_type is not None:
        try:
            with types.reading():
                value = result_type.validate_json(json.dumps(value))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise BadInput(
                f"the result of the task {record.task_id} is not what was asked for: {where or 'it'}: {first['msg']}",
                task_id=record.task_id,
            ) from error
        return value if isinstance(value, StopEvent) else StopEvent(result=value)
    # One of an own class is the result, as upstream has it.
    return last if isinstance(last, StopEvent) and type(last) is not StopEvent else StopEvent(result=value)


def _value(record: TaskResult) -> Any:
    try:
        return outcome(record)
    except TaskCancelled as error:
        raise RemoteCancelled(error.message, **error.fields) from None
    except TaskTimedOut as error:
        raise RemoteTimedOut(error.message, **error.fields) from None
