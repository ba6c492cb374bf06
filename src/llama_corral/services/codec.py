"""Between a workflow's Python values and the JSON that is stored and sent.

Types that come from the wire are looked up in an allow-list collected from the workflow (`allow_list.py`), and never
imported by name (P11).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import pydantic
import pydantic_core
from workflows import Context, Workflow
from workflows.context import JsonSerializer
from workflows.events import Event, StartEvent, StopEvent

from ..exceptions import BadInput
from ..protocol.records import EventRecord
from ..runtime import ContextSerializer, KeptElsewhere
from .allow_list import collect_types
from .sizes import EVENT_LIMIT, shortened, size_of

logger = logging.getLogger(__name__)


class WorkflowCodec:
    """Encodes and decodes for one workflow.

    Args:
        workflow: The workflow whose types are allowed.
        types: More types to allow.
    """

    def __init__(self, workflow: Workflow, types: Iterable[type[Any]] = ()) -> None:
        self._workflow = workflow
        self._types = collect_types(workflow, types)
        self._serializer = _AllowedSerializer(allowed_types=_without_clashes(self._types))
        self._events: dict[str, type[Event]] = {}
        for cls in self._types:
            if _comes_from_outside(cls):
                self._events.setdefault(cls.__name__, cls)
                self._events[f"{cls.__module__}.{cls.__name__}"] = cls
                self._events[f"{cls.__module__}.{cls.__qualname__}"] = cls

    @property
    def serializer(self) -> JsonSerializer:
        """Upstream's JSON serializer with the allow-list."""
        return self._serializer

    # Start

    def start_event(self, arguments: Mapping[str, Any]) -> StartEvent:
        """The workflow's start event. Raises BadInput where the workflow refuses the arguments."""
        cls: type[StartEvent] = self._workflow.start_event_class
        try:
            with self._serializer.validation_context():  # fields that hold events get them of allowed types only
                return cls(**arguments)
        except Exception as exc:  # ValidationError, and what validators of the user's let through
            raise BadInput(
                f"the workflow refuses its start arguments: {_first_error(exc)}",
                hint=f"{cls.__name__} takes: {_fields(cls)}",
            ) from exc

    def start_schema(self) -> str | None:
        """The JSON schema of the start event, None where pydantic cannot make one."""
        return _schema(self._workflow.start_event_class)

    # Events

    def event_types(self) -> str:
        """JSON text of `[{"name", "qualified_name", "schema"}]`: the events that can be sent from outside."""
        described: dict[str, dict[str, Any]] = {}
        for cls in self._types:
            if _comes_from_outside(cls):
                name = f"{cls.__module__}.{cls.__name__}"
                schema = _schema(cls)
                described[name] = {
                    "name": cls.__name__,
                    "qualified_name": name,
                    "schema": json.loads(schema) if schema else None,
                }
        return json.dumps(list(described.values()))

    def decode_event(self, payload: str) -> Event:
        """An event from upstream's serialization, or from `{"type": NAME, "value": {...}}`.

        Raises:
            BadInput: not JSON, no event, a type that is not allowed (start and stop events are not: a run is started and
                ended by other means), or fields that the type refuses.
        """
        try:
            data = json.loads(payload)
        except (ValueError, RecursionError) as exc:
            raise BadInput(f"the event is not JSON: {exc}") from exc
        name, value = _name_and_value(data)
        cls = self._events.get(name)
        if cls is None:
            # The same class under another path: the original's clients know events by their old modules.
            cls = self._events.get(name.rpartition(".")[2])
        if cls is None:
            raise BadInput(
                f"the workflow does not know an event of type {name!r}",
                hint="it knows: " + ", ".join(sorted({known.__name__ for known in self._events.values()})),
            )
        try:
            with self._serializer.validation_context():
                return cls.model_validate(value)
        except Exception as exc:  # ValidationError, and what validators of the user's let through
            raise BadInput(f"{cls.__name__} refuses its fields: {_first_error(exc)}") from exc

    def canonical_event(self, payload: str) -> str:
        """The event as upstream's serializer writes it, after `decode_event` has accepted it."""
        return self._serializer.serialize(self.decode_event(payload))

    def encode_event(self, event: Event) -> EventRecord:
        """An event for the log. One that cannot be encoded becomes a record that says so, not a failed run; it has what
        JSON does not know (the raw output of an agent's tool, for one) as its `str()`, where the rest can be encoded. So
        does one that is too large."""
        record = self._encode(event)
        if (size := size_of(record.payload)) > EVENT_LIMIT:
            problem = f"the event takes {size} bytes, and may take {EVENT_LIMIT}"
            return EventRecord(record.type, json.dumps({"error": problem}))
        return record

    def _encode(self, event: Event) -> EventRecord:
        name = type(event).__name__
        try:
            return EventRecord(name, json.dumps(event.model_dump(mode="json"), allow_nan=False))
        except Exception as exc:  # whatever a user's serializer raises
            problem = shortened(f"{name} cannot be encoded as JSON: {type(exc).__name__}: {exc}")
        try:
            rest = json.loads(pydantic_core.to_json(event, fallback=str, inf_nan_mode="null"))
        except Exception:  # the same serializer, or a cycle
            rest = {}
        return EventRecord(
            name, json.dumps({**rest, "error": problem} if isinstance(rest, dict) else {"error": problem})
        )

    # Results

    def encode_result(self, stop: StopEvent) -> tuple[str, str]:
        """The result as JSON text and as the original's text. What JSON does not know is written as its `str()`."""
        value = stop.result if type(stop) is StopEvent else stop
        text = printable(str(value))
        try:
            return pydantic_core.to_json(value, fallback=str, inf_nan_mode="null").decode(), text
        except Exception:  # lone surrogates, cycles, a serializer of the user's that fails
            return json.dumps(text), text

    # Contexts

    def encode_context(self, context: Context[Any]) -> str:
        """The context as JSON text. Raises what the serializer raises for state that is not JSON.

        Upstream leaves out a memory that cannot be encoded. Here that is an error, except for the memory of a run that
        has ended and that keeps its messages somewhere else: whoever made it makes it again.
        """
        serializer = _NotingSerializer()
        data = context.to_dict(serializer)
        for failure in serializer.failures:
            if data["is_running"] or not isinstance(failure, KeptElsewhere):
                raise failure
            logger.warning("a context is stored without its memory: %s", failure)
        return json.dumps(data)

    def decode_context(self, payload: str) -> Context[Any]:
        """A context that can start or resume a run. Raises ContextSerdeError for what does not fit the workflow."""
        return self.context_of(json.loads(payload))

    def context_of(self, data: dict[str, Any]) -> Context[Any]:
        """`decode_context` for what is decoded from JSON already."""
        return Context.from_dict(self._workflow, data, self._serializer)


class _AllowedSerializer(ContextSerializer):
    """Imports nothing, and says where a type is allowed."""

    def resolve_class(self, qualified_name: str) -> type[Any]:
        try:
            return super().resolve_class(qualified_name)
        except ValueError:
            raise ValueError(
                f"a value of the type {qualified_name} is refused: the workflow does not name it (WorkflowService takes "
                "more types as types=[...])"
            ) from None


class _NotingSerializer(ContextSerializer):
    """Notes what one encoding could not write: upstream's Context may go on without it. It looks up no types."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[BaseException] = []

    def serialize(self, value: Any) -> str:
        try:
            return super().serialize(value)
        except ValueError as exc:
            self.failures.append(exc.__cause__ or exc)
            raise


def printable(text: str) -> str:
    """The text with what not every database and socket takes (lone surrogates, NUL) written as escapes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode(errors="backslashreplace").decode()
    return text.replace("\0", "\\x00")


def _without_clashes(types: list[type[Any]]) -> list[type[Any]]:
    """Upstream refuses two classes of one name; the first one collected has it."""
    names: dict[str, type[Any]] = {}
    kept: list[type[Any]] = []
    for cls in types:
        own = {f"{cls.__module__}.{cls.__qualname__}", f"{cls.__module__}.{cls.__name__}"}
        if all(names.get(name, cls) is cls for name in own):
            names.update(dict.fromkeys(own, cls))
            kept.append(cls)
    return kept


def _name_and_value(data: Any) -> tuple[str, Any]:
    if isinstance(data, dict):
        if isinstance(data.get("qualified_name"), str) and "value" in data:
            return data["qualified_name"], data["value"]
        if isinstance(data.get("type"), str):
            return data["type"], data.get("value", {})
    raise BadInput(
        "an event is a JSON object with its type",
        hint='for example {"type": "HumanResponseEvent", "value": {"response": "yes"}}',
    )


def _schema(cls: type[pydantic.BaseModel]) -> str | None:
    try:
        return json.dumps(cls.model_json_schema())
    except Exception:  # a field of a type that pydantic cannot describe; the service works without
        return None


def _comes_from_outside(cls: type[Any]) -> TypeGuard[type[Event]]:
    return issubclass(cls, Event) and not issubclass(cls, (StartEvent, StopEvent))


def _first_error(exc: Exception) -> str:
    if not isinstance(exc, pydantic.ValidationError):
        return f"{type(exc).__name__}: {exc}"
    first = exc.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]


def _fields(cls: type[pydantic.BaseModel]) -> str:
    if not cls.model_fields:
        return "any fields"
    return ", ".join(
        f"{name}{'' if field.is_required() else ' (optional)'}" for name, field in cls.model_fields.items()
    )
