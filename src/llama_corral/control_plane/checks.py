"""What a request must fulfil before anything of it is stored. Pure functions; all of them raise `BadInput`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import from_json

from ..exceptions import BadInput
from ..protocol.messages import ActionTypes, QueueMessage, TaskDefinition, TaskResult, TaskStream

MAX_ID_LENGTH: Final = 255
MAX_TIMEOUT: Final = 366 * 86_400.0


def check_id(value: str, what: str) -> str:
    """An id or a name that can stand in a URL, a topic and a log line."""
    fits = 0 < len(value) <= MAX_ID_LENGTH and value.isprintable() and value == value.strip()
    if not fits or "/" in value or value in (".", ".."):  # clients resolve dots before they send a path
        raise BadInput(
            f"{what} must be 1 to {MAX_ID_LENGTH} printable characters without '/', and not dots: {value[:40]!r}",
            hint="Leave it out to get a fresh one." if what != "service_name" else None,
            name=what,
        )
    return value


def check_timeout(timeout: float | None) -> float | None:
    if timeout is not None and not 0 < timeout <= MAX_TIMEOUT:
        raise BadInput(
            f"timeout must be more than 0 and at most {MAX_TIMEOUT:.0f} seconds: {timeout!r}", name="timeout"
        )
    return timeout


def check_number(name: str, value: float | None, least: float, most: float) -> None:
    """None is always right. NaN is never."""
    if value is not None and not least <= value <= most:
        raise BadInput(f"{name} must be from {least:g} to {most:.10g}: {value!r}", name=name)


def start_arguments(arguments: str | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Start arguments as JSON text, as they will be stored, and as the object that the text means."""
    if not isinstance(arguments, str):
        try:
            return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"), allow_nan=False), arguments
        except (TypeError, ValueError, RecursionError) as error:
            raise BadInput(f"The start arguments are no JSON: {error}") from error
    try:
        parsed = from_json(arguments, allow_inf_nan=False)
    except ValueError as error:
        raise BadInput(
            f"The start arguments are no JSON: {error}", hint='Send a JSON object, such as {"topic": "llamas"}.'
        ) from error
    if not isinstance(parsed, dict):
        raise BadInput(
            f"The start arguments are a JSON {_kind(parsed)}, not an object",
            hint='Send a JSON object, such as {"topic": "llamas"}.',
        )
    return arguments, parsed


def check_start(schema: str | None, arguments: Mapping[str, Any]) -> None:
    """What can be said without the workflow at hand: the fields that its start event requires are there."""
    required = _loaded(schema, {}).get("required", ())
    missing = [name for name in required if name not in arguments]
    if missing:
        raise BadInput(
            f"Missing start arguments: {', '.join(missing)}", hint=f"The workflow requires {', '.join(required)}."
        )


def check_event(events: str | None, payload: str) -> str:
    """An outside event by its shape and, where the service said what it takes, by its type.

    Args:
        events: As in `ServiceInfo`; None where the service did not say.
        payload: The event as upstream's JsonSerializer writes it.
    """
    try:
        event = from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise BadInput(f"The event is no JSON: {error}", hint=_EVENT_HINT) from error
    if not isinstance(event, dict):
        raise BadInput(f"The event is a JSON {_kind(event)}, not an object", hint=_EVENT_HINT)
    if events is None:
        return payload
    # The short form, too, and the same class under another path: as a service in this process takes them.
    name = event.get("qualified_name", event.get("type"))
    if not isinstance(name, str):
        raise BadInput("The event does not name its type", hint=_EVENT_HINT)
    known = [item["qualified_name"] for item in _loaded(events, [])]
    if name.rpartition(".")[2] not in (each.rpartition(".")[2] for each in known):
        raise BadInput(
            f"The workflow knows no event of type {name[:200]!r}",
            hint=f"It knows {', '.join(known) or 'none'}.",
            type=name,
        )
    return payload


_EVENT_HINT = (
    "Send the event as JsonSerializer writes it: "
    '{"__is_pydantic": true, "value": {...}, "qualified_name": "module.Class"}.'
)


def _loaded(text: str | None, default: Any) -> Any:
    return default if text is None else from_json(text)


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "value")


def message_data(message: QueueMessage) -> TaskDefinition | TaskStream | TaskResult:
    """What a message to the control plane says."""
    model = _MESSAGES.get(message.action) if message.action is not None else None
    if model is None:
        known = ", ".join(action.value for action in _MESSAGES)
        raise BadInput(
            f"The control plane takes no messages with action {message.action}.",
            hint=f"It takes {known}.",
            name="action",
        )
    try:
        return model.model_validate(message.data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(["data", *map(str, found["loc"])])
        raise BadInput(f"{where}: {found['msg']}", name=where) from error


_MESSAGES: Final[dict[ActionTypes, type[TaskDefinition | TaskStream | TaskResult]]] = {
    ActionTypes.NEW_TASK: TaskDefinition,
    ActionTypes.TASK_STREAM: TaskStream,
    ActionTypes.COMPLETED_TASK: TaskResult,
}
