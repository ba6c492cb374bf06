"""What a client puts on the wire besides plain values: start arguments and events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..exceptions import BadInput

if TYPE_CHECKING:
    from pydantic import BaseModel


def start_arguments(arguments: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """The start arguments as a JSON object. pydantic models, dataclasses, dates and their like become JSON.

    Raises:
        BadInput: a value has no JSON form, or an argument is given twice.
    """
    twice = set(arguments or ()) & set(more)
    if twice:
        raise BadInput(f"given twice: {', '.join(sorted(twice))}", hint="Give each start argument once.")
    return {name: _jsonable(value, f"start argument {name}") for name, value in {**(arguments or {}), **more}.items()}


def event_text(event: Any, data: Mapping[str, Any] | None = None) -> str:
    """An event as upstream's JsonSerializer writes it.

    Args:
        event: An instance of a llama-index event (anything with `model_dump`), or the name of its class, best with its
            module in front.
        data: The fields, where `event` is a name.

    Raises:
        BadInput: it is neither, or a field has no JSON form.
    """
    if isinstance(event, str):
        name, value = event, _jsonable(dict(data or {}), f"event {event}")
    elif callable(getattr(event, "model_dump", None)) and not isinstance(event, type):
        if data is not None:
            raise BadInput("an event object has its fields already", hint="Give fields with the name of an event only.")
        kind = type(event)
        name = f"{kind.__module__}.{kind.__qualname__}"
        value = _dumped(event, name)
    else:
        raise BadInput(
            f"not an event: {type(event).__name__}",
            hint="Give an event object, or the name of its type and its fields.",
        )
    return json.dumps({"__is_pydantic": True, "value": value, "qualified_name": name}, allow_nan=False)


def _dumped(event: BaseModel, name: str) -> Any:
    try:
        return event.model_dump(mode="json")
    except Exception as error:  # whatever a user's serializer raises
        raise BadInput(f"{name} has no JSON form: {error}") from error


def _jsonable(value: Any, what: str) -> Any:
    try:
        try:
            json.dumps(value, allow_nan=False)
        except TypeError:
            # Loaded for whoever needs it: the command line does not.
            from pydantic_core import to_jsonable_python

            value = to_jsonable_python(value, inf_nan_mode="constants")
            json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{what} has no JSON form: {error}") from error
    return value
